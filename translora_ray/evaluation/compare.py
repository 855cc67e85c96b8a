"""The arms of a comparison on one test set: the same rows, the same cut of answers, one engine per base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from translora_ray import adapters, kit
from translora_ray.config import Adapter, Task, Training
from translora_ray.engines.base import AdapterRef, Engine, Generate, OpenEngine, Sampling
from translora_ray.errors import UsageError
from translora_ray.evaluation.metrics import METRICS
from translora_ray.evaluation.statistics import flips, mcnemar, paired_interval, wilson
from translora_ray.progress import Display
from translora_ray.prompts import Prompt, few_shot_prompt, task_prompt
from translora_ray.records import TaskRow, read_rows
from translora_ray.storage import ADAPTER, EVALUATION, MANIFEST, RunStore
from translora_ray.training.task import task_pairs, train_adapter

CHUNK = 128


def evaluate(run: str, data: str, oracle: str | None, open_engine: OpenEngine, display: Display) -> dict[str, Any]:
    """Accuracy of every arm on `data`, with Wilson's 95 % interval, and recovery where there is an `oracle` training set.

    The oracle is an adapter on the target base, trained on the real rows exactly as the transferred one was on synthetic rows.
    """
    store = RunStore(run)
    if not store.exists(MANIFEST):
        raise UsageError(f"{run} is not a finished run: it has no {MANIFEST}; run `translora transfer` to its end.")
    manifest = store.read_json(MANIFEST)
    loaded = kit.load(manifest["kit_path"])
    if loaded.digest != manifest["kit"]:
        raise UsageError(f"The kit at {loaded.path} is not the one {run} was made from: bring back the original.")
    rows = read_rows(data)
    oracle_rows = read_rows(oracle) if oracle else None
    task = loaded.task
    with tempfile.TemporaryDirectory() as scratch:
        transferred = AdapterRef("transferred", str(store.fetch_folder(ADAPTER, Path(scratch) / ADAPTER)))
        if adapters.inspect(transferred.path).digest != manifest["adapter_digest"]:
            raise UsageError(f"The adapter in {run} is not the one its manifest describes: remove the run, and transfer again.")
        bare = [task_prompt(task.prompt, row.input, task.format) for row in rows]
        shots = [(seed.input, seed.target) for seed in loaded.seeds]
        few = [few_shot_prompt(task.prompt, shots, row.input, task.format) for row in rows]
        source_arms = {"source_base": (bare, None), "source_adapter": (bare, loaded.adapter)}
        target_arms = {"target_base": (bare, None), "target_few_shot": (few, None), "transferred": (bare, transferred)}
        if oracle_rows:
            target_arms["oracle"] = (bare, AdapterRef("oracle", _oracle(manifest, task, oracle_rows, Path(scratch), display)))
        scores: dict[str, list[float]] = {}
        for base, arms in ((manifest["source_base"], source_arms), (manifest["target_base"], target_arms)):
            used = [adapter for _, adapter in arms.values() if adapter]
            scores |= _answer(open_engine(base, used), arms, task, loaded.seeds, rows, display)
    result = summary(scores, task.metric)
    store.write_json(f"{EVALUATION}/result.json", result)
    return result


def _answer(
    engine: Engine, arms: dict[str, tuple[list[Prompt], AdapterRef | None]], task: Task, seeds: list[TaskRow], rows: list[TaskRow], display: Display
) -> dict[str, list[float]]:
    """Scores per row of the arms that share an engine. Text answers end at the line where all seeds' answers are one line."""
    stop = ("\n",) if task.format == "text" and not any("\n" in seed.target for seed in seeds) else ()
    sampling = Sampling(task.max_new_tokens, stop=stop)
    metric = METRICS[task.metric]
    scores = {}
    for arm, (prompts, adapter) in arms.items():
        phase = display.phase(arm)
        answers = []
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            answers += engine.generate([Generate(prompt, sampling, adapter) for prompt in part])
            phase.update(len(answers), len(rows))
        scores[arm] = [metric(answer.text.strip(), row.target) for answer, row in zip(answers, rows, strict=True)]
    engine.close()
    return scores


def _oracle(manifest: dict[str, Any], task: Task, rows: list[TaskRow], scratch: Path, display: Display) -> str:
    out = scratch / "oracle"
    chosen = {"learning_rate": manifest["training"]["learning_rate"], "learning_rates": None}
    settings = Training(**manifest["recipe"]["training"] | chosen)
    pairs = task_pairs(task, rows)
    adapter = Adapter(**manifest["training"]["adapter"])
    train_adapter(manifest["target_base"], pairs, adapter, settings, manifest["recipe"]["seed"], out, display.phase("oracle training").step)
    return str(out)


def summary(scores: dict[str, list[float]], metric: str) -> dict[str, Any]:
    """The stable `--json` output from scores per arm and row.

    `against` compares transferred with the better of source adapter and bare target, row by row: the mean difference with its 95 % interval, and
    McNemar's p. `negative_flips` counts rows that the bare target got right and the transferred adapter gets wrong.
    """
    arms = {}
    for arm, values in scores.items():
        low, high = wilson(sum(values), len(values))
        arms[arm] = {"accuracy": sum(values) / len(values), "low": low, "high": high}
    ours = scores["transferred"]
    against = max(("source_adapter", "target_base"), key=lambda arm: arms[arm]["accuracy"])
    difference, low, high = paired_interval(ours, scores[against])
    paired = {"arm": against, "difference": difference, "low": low, "high": high, "p": mcnemar(ours, scores[against])}
    flipped = len(flips(scores["target_base"], ours))
    return {"n": len(ours), "metric": metric, "arms": arms, "recovery": recovery(arms), "against": paired, "negative_flips": flipped}


def recovery(arms: dict[str, dict[str, float]]) -> float | None:
    """(transferred - bare target) / (oracle - bare target); None without an oracle or where the oracle gains nothing."""
    if "oracle" not in arms or arms["oracle"]["accuracy"] <= arms["target_base"]["accuracy"]:
        return None
    bare = arms["target_base"]["accuracy"]
    return (arms["transferred"]["accuracy"] - bare) / (arms["oracle"]["accuracy"] - bare)
