"""`translora fleet --dry-run`: what would be done, with which engines, and what it takes at least. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

import ray
from rich.console import Console
from rich.table import Table

from translora_ray.config import EngineKind
from translora_ray.fleet.groups import Transfer, check_all, grouped
from translora_ray.fleet.manifest import Fleet, Wanted
from translora_ray.models import load_tokenizer
from translora_ray.placement import fit_beside, ray_session
from translora_ray.progress import Display
from translora_ray.prompts import answer_ids, prompt_ids, task_prompt

HOW = "Tokens are estimates from below: each example as long as the mean seed, every candidate accepted. A rejected candidate costs what it is long besides."


def show_plan(fleet: Fleet, wanted: Sequence[Wanted], engine: EngineKind, display: Display) -> int:
    """Print the plan; returns 1 where a transfer could not begin. Raises `UsageError` where the cluster is too small."""
    sound, failures = check_all(wanted, engine, display)
    done = {each.name for each, checked in sound if checked.finished}
    with ray_session(fleet.cluster) as local:
        groups, unplanned = grouped([(each, checked) for each, checked in sound if each.name not in done], local)
        there = ray.cluster_resources()
        console = Console()
        for number, group in enumerate(groups, 1):
            console.print(_table(f"stream {number} of {len(groups)}", group))
            for line in _engines(fleet, group):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    lines = [f"The cluster has {there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU." if groups else "There is nothing left to compute.", HOW]
    lines += [f"{name}: finished already" for name in done]
    lines += [f"{name}: {reason}" for name, reason in {**failures, **unplanned}.items()]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return int(bool(failures or unplanned))


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
    return generated, plan.quota * plan.recipe.training.epochs * trained // len(kit.seeds)


def _engines(fleet: Fleet, group: Sequence[Transfer]) -> list[str]:
    plan, worker = group[0].plan, group[0].worker
    low, high = plan.cluster.engines
    lines = [
        f"  {low} to {high} engines of {plan.engine_cpus:g} CPU and {plan.engine_gpus:g} GPU: {pool.engine} with {pool.base} ({', '.join(pool.roles)})"
        for pool in plan.pools()
    ]
    when = "beside the stream" if fit_beside(plan, worker, fleet.trainings) else "after the stream"
    workers = plan.cluster.workers[0]
    lines.append(f"  trainings {when}, {fleet.trainings} at once, each {workers} workers of {worker.cpus:g} CPU and {worker.gpus:g} GPU")
    return lines
