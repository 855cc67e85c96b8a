"""The arms of a comparison on one test set: the same rows, the same cut of answers, one engine per base."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora_ray import adapters, identity, kit, models
from translora_ray.answers import check_labels
from translora_ray.engines.base import AdapterRef, Engine, Generate, OpenEngine, Sampling
from translora_ray.errors import Diverged, UsageError
from translora_ray.evaluation import arms, gate, page
from translora_ray.evaluation.distance import distances
from translora_ray.evaluation.metrics import METRICS
from translora_ray.evaluation.statistics import FEW, flips, mcnemar, paired_interval, wilson
from translora_ray.progress import Display
from translora_ray.prompts import Prompt, clean_answer, few_shot_prompt, prompt_ids, task_prompt
from translora_ray.records import TaskRow, read_rows
from translora_ray.storage import ADAPTER, ANSWERS, MAP, REPORT, RESULT, RunStore
from translora_ray.stream.dedup import normal
from translora_ray.stream.discriminate import verdicts

CHUNK = 128
Asked = dict[str, tuple[list[Prompt], AdapterRef | None]]
"""Of each arm, its prompts and the adapter that answers them."""


@dataclass
class Answered:
    """An arm's answers to the test rows and their scores."""

    texts: list[str]
    scores: list[float]


def evaluate(
    run: str,
    data: str,
    oracle: str | None,
    extra: Sequence[str],
    open_engine: OpenEngine,
    display: Display,
    train: str | None = None,
    trainings: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Accuracy of every arm on `data`, with Wilson's 95 % interval, and recovery where there is an `oracle` training set; `extra` are names of `arms.EXTRA`.

    `train` are the rows that the source adapter learnt from, which the test rows must not be among. The oracle is an adapter on the target base, trained on the
    real rows for as many epochs, and at the same rate, as the transferred one on its examples; for more where rows are fewer, up to `EPOCHS`. With several
    `trainings` transferred adapter and oracle are trained so often in all, on the same rows with other random numbers: how far one training is chance.
    `device` is where prompts are embedded, by default a GPU if there is one.
    """
    store = RunStore(run)
    manifest = store.manifest(run)
    store.check_writable()
    loaded = kit.behind(manifest, run)
    rows = read_rows(data)
    oracle_rows = read_rows(oracle) if oracle else []
    check_rows(loaded, rows, data, {"--oracle": oracle_rows, "--train": read_rows(train) if train else []})
    _say_how_little(rows, data, display)
    task, recipe = loaded.task, identity.of_manifest(manifest, loaded)
    with tempfile.TemporaryDirectory() as scratch:
        transferred = _transferred(store, manifest, Path(scratch), run)
        made = arms.Arms(loaded, manifest, recipe, store, Path(scratch), display)
        made.check(extra)
        bare = [task_prompt(task.prompt, row.input, task.format) for row in rows]
        _check_room(bare, manifest, [loaded.adapter, transferred], task.max_new_tokens, data)
        judged = loaded.discriminator is not None and loaded.base == loaded.teacher_base
        with closing(open_engine(manifest["source_base"], [loaded.adapter, *([loaded.discriminator_adapter] if judged else [])])) as engine:
            found = answer_all(engine, {"source_base": (bare, None), "source_adapter": (bare, loaded.adapter)}, loaded, rows, display)
            sets = made.sets(extra, engine)
            real = verdicts(engine, task.name, [row.input for row in rows], loaded.discriminator_adapter) if judged else None
        if oracle_rows:
            sets["oracle"] = oracle_rows
        trained = made.trained(extra, sets)
        learnt: dict[str, Sequence[TaskRow]] = {"transferred": made.trained_on, **({"oracle": oracle_rows} if oracle_rows else {})}
        repeated = _repeated(made, learnt, trainings, display)
        others: Asked = {adapter.name: (bare, adapter) for again in repeated for adapter in again.values()}
        target_arms: Asked = {"transferred": (bare, transferred), **{name: (bare, adapter) for name, adapter in trained.items()}}
        with closing(open_engine(manifest["target_base"], [adapter for _, adapter in (target_arms | others).values() if adapter])) as engine:
            few = _few_shots(engine, loaded, rows, display)
            found |= answer_all(engine, {"target_base": (bare, None), "target_few_shot": (few, None), **target_arms}, loaded, rows, display)
            answered = answer_all(engine, others, loaded, rows, display)
    result = summary({arm: answered.scores for arm, answered in found.items()}, task.metric)
    if repeated:
        every = {arm: [found[arm].scores, *(answered[again[arm].name].scores for again in repeated)] for arm in learnt}
        result["trainings"] = {arm: [sum(scores) / len(rows) for scores in each] for arm, each in every.items()}
    result |= {"rows_digest": kit.rows_digest(rows), "gate": gate.on_rows(recipe.gate, result["against"])}
    if real is not None:
        result["verdicts"] = {"real": real}
    learnt_from = [row.input for row in made.trained_on]
    result["looked_at"] = {"train": train is not None, "among_examples": len(_inputs(rows) & {*map(normal, learnt_from)})}
    result["distance"], points = distances(loaded.base, device, learnt_from, made.candidates, [row.input for row in rows], loaded.seed_inputs, display)
    store.write(ANSWERS, _lines(rows, found))
    store.write_json(MAP, points)
    store.write_json(RESULT, result)
    page.write(store, manifest, loaded.seeds)
    display.say(f"report: {page.place(store)}/{REPORT}")
    return result


def _transferred(store: RunStore, manifest: dict[str, Any], scratch: Path, run: str) -> AdapterRef:
    """The run's adapter, as its manifest describes it."""
    found = AdapterRef("transferred", str(store.fetch_folder(ADAPTER, scratch / ADAPTER)))
    adapters.require(found.path, manifest["adapter_digest"], run)
    return found


def compared(store: RunStore, data: str) -> bool:
    """Whether the run was evaluated on the rows at `data`; as far as that can be told, where they are gone by now or an older version did not say on which."""
    if not store.exists(RESULT):
        return False
    digest = store.read_json(RESULT).get("rows_digest")
    return digest is None or not Path(data).exists() or bool(digest == kit.rows_digest(read_rows(data)))


def _few_shots(engine: Engine, loaded: kit.Kit, rows: Sequence[TaskRow], display: Display) -> list[Prompt]:
    """All seeds before each row, or as many as leave room for all rows, maybe none."""
    task, shots = loaded.task, [(seed.input, seed.target) for seed in loaded.seeds]
    for shown in range(len(shots), -1, -1):
        prompts = [few_shot_prompt(task.prompt, shots[:shown], row.input, task.format) for row in rows]
        if all(engine.fits(prompt, task.max_new_tokens) for prompt in prompts):
            break
    if shown < len(shots):
        display.say(f"target_few_shot: {shown} of {len(shots)} seeds are shown, as more do not fit into the target's context.")
    return prompts


def _check_room(prompts: Sequence[Prompt], manifest: dict[str, Any], taught: Sequence[AdapterRef], new_tokens: int, data: str) -> None:
    """Raise `UsageError` where a row and its answer are too long for one of the bases: found before anything is trained."""
    for side, adapter in zip(("source_base", "target_base"), taught, strict=True):
        base = manifest[side]
        tokenizer, context = models.load_tokenizer(base), models.context_of(models.skeleton(base))
        most = context - new_tokens - adapters.inspect(adapter.path).virtual_tokens
        for number, prompt in enumerate(prompts, 1):
            if (length := len(prompt_ids(tokenizer, prompt))) > most:
                raise UsageError(f"{data}: row {number} has {length} tokens with its prompt, {base} takes {most} beside an answer: take it out, or shorten it.")


def check_rows(loaded: kit.Kit, rows: Sequence[TaskRow], data: str, learnt: Mapping[str, Sequence[TaskRow]]) -> None:
    """Raise `UsageError` for test rows that were seen in training, as seeds or by `learnt`, or that have no label of the task."""
    check_labels(loaded.task, rows, data)
    tested = _inputs(rows)
    for name, known in {"the kit's seeds": loaded.seeds, **learnt}.items():
        if common := tested & _inputs(known):
            raise UsageError(f"{data}: {len(common)} of its inputs are among {name}, which adapters learn from: take them out.")


def _inputs(rows: Sequence[TaskRow]) -> set[str]:
    return {normal(row.input) for row in rows}


def _say_how_little(rows: Sequence[TaskRow], data: str, display: Display) -> None:
    """What few rows tell."""
    if len(rows) < FEW:
        low, high = wilson(len(rows) / 2, len(rows))
        display.say(f"{data} has {len(rows)} rows: an accuracy of 0.5 would have an interval of {low:.2f} to {high:.2f}. Take {FEW} or more.")


def answer_all(engine: Engine, asked: Asked, loaded: kit.Kit, rows: list[TaskRow], display: Display) -> dict[str, Answered]:
    """Answers of the arms that share an engine."""
    sampling = Sampling(loaded.task.max_new_tokens, stop=loaded.answer_stops)
    metric = METRICS[loaded.task.metric]
    found = {}
    for arm, (prompts, adapter) in asked.items():
        phase = display.phase(arm)
        answers: list[str] = []
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            answers += [clean_answer(answer.text) for answer in engine.generate([Generate(prompt, sampling, adapter) for prompt in part])]
            phase.update(len(answers), len(rows))
        found[arm] = Answered(answers, [metric(answer, row.target) for answer, row in zip(answers, rows, strict=True)])
    return found


def _repeated(made: arms.Arms, learnt: dict[str, Sequence[TaskRow]], trainings: int, display: Display) -> list[dict[str, AdapterRef]]:
    """The adapters of all trainings but the first, by arm. One whose loss is not a number is told, and left out."""
    found = []
    for number in range(1, trainings):
        try:
            found.append(made.trained((), learnt, number))
        except Diverged as failure:
            display.say(f"Training {number + 1} of {trainings} came to nothing, and is left out: {failure}")
    return found


def _lines(rows: Sequence[TaskRow], found: dict[str, Answered]) -> bytes:
    """JSONL: each test row with every arm's answer and score."""
    lines = []
    for number, row in enumerate(rows):
        answers = {arm: answered.texts[number] for arm, answered in found.items()}
        scores = {arm: answered.scores[number] for arm, answered in found.items()}
        lines.append(json.dumps({"input": row.input, "target": row.target, "answers": answers, "scores": scores}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def summary(scores: dict[str, list[float]], metric: str) -> dict[str, Any]:
    """The stable `--json` output from scores per arm and row.

    Each arm but `transferred` has a `paired` comparison with it; `against` is that of the better of source adapter and bare target. Each has its `recovery`,
    and its `negative_flips`: rows that the bare target got right and the arm gets wrong.
    """
    ours, found = scores["transferred"], dict[str, dict[str, Any]]()
    for arm, values in scores.items():
        low, high = wilson(sum(values), len(values))
        found[arm] = {"accuracy": sum(values) / len(values), "low": low, "high": high, "negative_flips": len(flips(scores["target_base"], values))}
        if arm != "transferred":
            found[arm]["paired"] = paired(ours, values)
    for arm in found:
        found[arm]["recovery"] = recovery(found, arm)
    against = max(("source_adapter", "target_base"), key=lambda arm: float(found[arm]["accuracy"]))
    result = {"n": len(ours), "metric": metric, "arms": found, "against": {"arm": against, **found[against]["paired"]}}
    return result | {name: found["transferred"][name] for name in ("recovery", "negative_flips")}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours minus theirs, row by row: the mean difference with its 95 % interval, and McNemar's p. Where no row is lost, or none is gained, a bootstrap finds
    none either: that end of the interval is then Wilson's for none of so many rows."""
    difference, low, high = paired_interval(ours, theirs)
    unseen, apart = wilson(0, len(ours))[1], [a - b for a, b in zip(ours, theirs, strict=True)]
    low = max(-1.0, min(low, difference - unseen)) if min(apart) >= 0 else low
    high = min(1.0, max(high, difference + unseen)) if max(apart) <= 0 else high
    return {"difference": difference, "low": low, "high": high, "p": mcnemar(ours, theirs)}


def recovery(accuracies: dict[str, dict[str, Any]], arm: str = "transferred") -> float | None:
    """(`arm` - bare target) / (oracle - bare target); None without an oracle or where the oracle gains nothing."""
    if "oracle" not in accuracies or accuracies["oracle"]["accuracy"] <= accuracies["target_base"]["accuracy"]:
        return None
    bare, oracle, ours = (float(accuracies[name]["accuracy"]) for name in ("target_base", "oracle", arm))
    return (ours - bare) / (oracle - bare)
