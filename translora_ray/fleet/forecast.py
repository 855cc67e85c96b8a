"""`translora fleet --dry-run`: what would be done, with which engines, and what it takes at least. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from translora_ray.cluster import Cluster
from translora_ray.config import EngineKind
from translora_ray.fleet.groups import Transfer, check_all, grouped
from translora_ray.fleet.manifest import Fleet, Wanted
from translora_ray.models import load_tokenizer
from translora_ray.placement import fit_beside, nodes_of, ray_session, trainings_at_once
from translora_ray.progress import Display
from translora_ray.prompts import answer_ids, prompt_ids, task_prompt
from translora_ray.storage import MANIFEST, RunStore
from translora_ray.stream.plan import Plan

HOW = "Tokens are estimates from below: each example as long as the mean seed, every candidate accepted. A rejected candidate costs what it is long besides."


def show_plan(fleet: Fleet, wanted: Sequence[Wanted], engine: EngineKind, display: Display, pace: str | None = None) -> int:
    """Print the plan; returns 1 where a transfer could not begin. Raises `UsageError` where the cluster is too small, or `pace` is no finished run."""
    paces = [RunStore(pace).manifest(pace)] if pace else []
    sound, failures = check_all(wanted, engine, display)
    done = {each.name: checked.store.read_json(MANIFEST) for each, checked in sound if checked.finished}
    with ray_session(fleet.cluster) as local:
        groups, unplanned = grouped([(each, checked) for each, checked in sound if each.name not in done], local)
        there = _there(nodes_of(fleet.cluster), fleet.cluster, local)
        console = Console()
        for number, group in enumerate(groups, 1):
            console.print(_table(f"stream {number} of {len(groups)}", group))
            for line in _engines(fleet, group):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    plans = [transfer.plan for group in groups for transfer in group]
    lines = [there, HOW, _hours(list(done.values()) or paces, sum(plan.wanted for plan in plans), sum(map(_passed, plans)))]
    lines = lines if groups else ["There is nothing left to compute."]
    lines += [f"{name}: finished already" for name in done]
    lines += [f"{name}: {reason}" for name, reason in {**failures, **unplanned}.items()]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return int(bool(failures or unplanned))


def _there(nodes: Sequence[Mapping[str, float]], cluster: Cluster, local: bool) -> str:
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    if cluster.expect:
        return f"The cluster can grow to {cpus:g} CPU and {gpus:g} GPU."
    return f"This machine has {cpus - 1:g} CPU and {gpus:g} GPU." if local else f"The cluster has {cpus:g} CPU and {gpus:g} GPU."  # one is for Ray Data alone


def _passed(plan: Plan) -> int:
    """Examples that training passes over, each as often as there are epochs."""
    return plan.quota * plan.recipe.training.passes


def _hours(finished: Sequence[dict[str, Any]], answered: int, passed: int) -> str:
    """What so many answered candidates, and examples passed over in training, take at the pace of finished runs, given their manifests."""
    if not finished:
        return "Hours are told by the pace of finished transfers, of which the fleet has none yet; or by that of a run like them (--pace RUN)."
    training = sum(manifest["seconds"]["training"] for manifest in finished)
    engines = sum(sum(manifest["seconds"].values()) for manifest in finished) - training
    streamed = engines / sum(manifest["counts"]["accepted"] for manifest in finished) * answered / 3600
    trained = training / sum(manifest["counts"]["trained"] * manifest["recipe"]["training"]["epochs"] for manifest in finished) * passed / 3600
    return f"At the pace of {len(finished)} finished the others take {streamed:.1f} hours of an engine and {trained:.1f} hours of training."


def _table(title: str, group: Sequence[Transfer]) -> Table:
    table = Table(title=title)
    for column in ("transfer", "target", "examples", "answered", "tokens generated", "tokens trained"):
        table.add_column(column, justify="left" if column in ("transfer", "target") else "right", overflow="fold")
    for transfer in group:
        plan = transfer.plan
        generated, trained = _tokens(transfer)
        table.add_row(transfer.name, plan.target, str(plan.quota), str(plan.wanted), f"{generated:,}", f"{trained:,}")
    return table


def _tokens(transfer: Transfer) -> tuple[int, int]:
    """Least tokens that are generated and trained on, as `HOW` says."""
    plan, kit = transfer.plan, transfer.plan.kit
    source, target = load_tokenizer(kit.base), load_tokenizer(plan.target)
    written = answered = trained = 0
    for seed in kit.seeds:
        prompt = task_prompt(kit.task.prompt, seed.input, kit.task.format)
        written += len(source(seed.input, add_special_tokens=False)["input_ids"])
        answered += len(answer_ids(source, prompt, seed.target)) * plan.recipe.selection.votes
        trained += len(prompt_ids(target, prompt)) + len(answer_ids(target, prompt, seed.target))
    generated = plan.wanted * (written + answered) // len(kit.seeds)
    return generated, _passed(plan) * trained // len(kit.seeds)


def _engines(fleet: Fleet, group: Sequence[Transfer]) -> list[str]:
    plan, worker = group[0].plan, group[0].worker
    low, high = plan.cluster.engines
    lines = [
        f"  {low} to {high} engines of {plan.engine_cpus:g} CPU and {plan.engine_gpus:g} GPU: {pool.engine} with {pool.base} ({', '.join(pool.roles)})"
        for pool in plan.pools()
    ]
    wanted, workers = min(fleet.trainings, len(group)), plan.cluster.workers[0]
    when = "beside the stream" if fit_beside(plan, worker, wanted) else "after the stream"
    at_once = trainings_at_once(plan, worker, wanted)
    lines.append(f"  trainings {when}, {at_once} at once, each {workers} workers of {worker.cpus:g} CPU and {worker.gpus:g} GPU")
    return lines
