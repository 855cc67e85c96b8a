"""Making a transfer kit, while the task's rows are at hand: the only place where they are read."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from translora_ray import __version__, adapters, adapting, models
from translora_ray.answers import copied, find_answers
from translora_ray.config import Adapter, Task, Training
from translora_ray.disk import commit_folder
from translora_ray.engines.base import AdapterRef, Engine, OpenEngine, Score
from translora_ray.errors import RunFailed, UsageError
from translora_ray.evaluation.metrics import well_formed
from translora_ray.kit import ADAPTER, DISCRIMINATOR, FACTS, GENERATOR, SEEDS, choose_seeds, digest_of, order_for_discriminator, rows_digest
from translora_ray.progress import Display, Phase
from translora_ray.prompts import NO, YES, Prompt, discriminator_prompt, learnt_prompt, several_lines
from translora_ray.recipe import Synthesis
from translora_ray.records import TaskRow, derive_seed, read_rows, request_pack
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import SeedFilter, Seen
from translora_ray.stream.discriminate import calibrate, outline, verdicts
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.training import task as training
from translora_ray.training.private import planned, train_privately

NEGATIVE_TRIES = 4
NO_SOURCE = adapters.AdapterInfo(path="", base="", type="lora", parameters=0, digest="", shapes={})
"""What an adapter takes over from that has no other before it: nothing."""


def prepare(task: Task, base: str, out: str | Path, adapter: str | None, discriminate: bool, open_engine: OpenEngine, progress: Display) -> dict[str, Any]:
    """Make the kit for `task` at `out`, which must not exist. Returns the facts.

    Order (Trans-LoRA, section 3.1): source adapter on the rows; negatives from the source base; discriminator on inputs against
    negatives, with `kit.HELD_OUT` of both kept apart to measure its accept rates; generator adapter where the task asks for one.
    """
    if "://" in str(out):
        raise UsageError(f"--out {out} must be a directory: make the kit on local disk, then copy it.")
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it.")
    RunStore(str(out)).check_writable()
    rows = read_rows(task.train)
    task = find_answers(task, rows)
    _check_rows(task, rows, discriminate)
    for training_section in (task.source_training, task.discriminator_training, task.generator_training):
        models.require_bits(training_section.base_bits)
    if task.generator_privacy:
        planned(task.generator_privacy, task.generator_training, len(rows))
    info = models.describe(base)
    if obstacle := models.pair_obstacle(info, info, task.format):
        raise UsageError(obstacle)
    if adapter:
        _check_adapter(adapter, base, progress)

    if isinstance(task.answer_words, list):
        strange = sum(not copied(task, row.target, row.input) for row in rows)
        words = f"answers are words of their input and {len(task.answer_words)} others"
        progress.say(f"{words}; those of {strange} of {len(rows)} rows are not, and would be rejects" if strange else words)
    seeds = choose_seeds(rows, task.seeds, task.seed)
    facts: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory(prefix="translora-kit-") as scratch_name:
        scratch = Path(scratch_name)
        began = time.perf_counter()
        if adapter:
            training.copy_adapter(adapter, scratch / ADAPTER, base)
            given = AdapterRef(ADAPTER, str(scratch / ADAPTER))
            with closing(open_engine(base, [given])) as engine:
                engine.score([Score(Prompt("Is it live?"), (YES, NO), given)])
        else:
            pairs, wanted = training.task_pairs(task, rows), adapters.inherit(NO_SOURCE, task.source_adapter, models.linear_shapes(base))
            shown = progress.phase("source adapter").step
            facts["source_loss"] = training.train_adapter(base, pairs, wanted, task.source_training, task.seed, scratch / ADAPTER, shown)
        facts["seconds"]["source adapter"] = round(time.perf_counter() - began, 1)
        facts["discriminator"] = _discriminator(task, base, rows, seeds, scratch, open_engine, progress, facts) if discriminate else None
        facts["generator"] = _generator(task, base, rows, scratch, progress, facts) if task.generator_adapter else None
        names = [name for name in (ADAPTER, DISCRIMINATOR, GENERATOR) if (scratch / name).exists()]
        (scratch / SEEDS).write_text(
            "".join(json.dumps({"input": seed.input, "target": seed.target}, ensure_ascii=False) + "\n" for seed in seeds), encoding="utf-8"
        )
        facts |= {
            "version": __version__,
            "task": task.model_copy(update={"train": "not kept"}).model_dump(),
            "base": base,
            "base_fingerprint": models.fingerprint(base),
            "rows": len(rows),
            "several_lines": several_lines(rows),
            "rows_digest": "" if task.generator_privacy else rows_digest(rows),  # which would tell whether a guessed row is among the others
            "adapters": {name: adapters.digest(scratch / name) for name in names},
        }
        facts["digest"] = digest_of(facts, (scratch / SEEDS).read_text(encoding="utf-8"))
        (scratch / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        commit_folder(scratch, out, replace=False)
    return facts


def _check_rows(task: Task, rows: Sequence[TaskRow], discriminate: bool) -> None:
    """Raise `UsageError` where there are too few, or some that can never be answered right."""
    if len(rows) < task.seeds:
        raise UsageError(f"{task.train} has {len(rows)} rows, fewer than the {task.seeds} seeds asked for: lower seeds, or add rows.")
    if discriminate and len(rows) < 10:
        raise UsageError(f"{task.train} has {len(rows)} rows, too few to train and test a discriminator: add rows, or use --no-discriminator.")
    if task.metric != "code" and (odd := next((row for row in rows if not well_formed(task, row.target)), None)):
        raise UsageError(f"{task.train}: metric {task.metric} reads nothing in the target {odd.target!r}: choose another metric, or correct the rows.")


def _check_adapter(adapter: str, base: str, progress: Display) -> None:
    """Raise `UsageError` unless the adapter is one for `base`, as far as names, shapes and, where its own base is at hand, weights tell."""
    info = adapting.inspect_for(adapter, base)
    if info.base == base:
        return
    if info.base.startswith("packaged:") or Path(info.base, "config.json").is_file():
        if models.fingerprint(info.base) != models.fingerprint(base):
            raise UsageError(f"The adapter {adapter} was trained on {info.base}, which is not {base}: name that base.")
    elif info.base:
        progress.say(f"The adapter names {info.base} as its base; its shapes fit, and {base} is taken to be the same.")


def _discriminator(
    task: Task,
    base: str,
    rows: Sequence[TaskRow],
    seeds: list[TaskRow],
    scratch: Path,
    open_engine: OpenEngine,
    progress: Display,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Train the discriminator into `scratch` and measure it on what it did not see."""
    unseen, learnt = order_for_discriminator(task, rows)
    held = len(unseen)
    began = time.perf_counter()
    with closing(open_engine(base, [])) as engine:
        negatives = _negatives(task, engine, seeds, held + len(learnt), progress.phase("negatives"))
    random.Random(derive_seed(task.seed, "negatives held out")).shuffle(negatives)  # the first pack is not as warm as the next
    facts["seconds"]["negatives"] = round(time.perf_counter() - began, 1)
    pairs = [(discriminator_prompt(task.name, text), YES) for text in learnt]
    pairs += [(discriminator_prompt(task.name, text), NO) for text in negatives[held:]]
    _train(DISCRIMINATOR, task, base, pairs, task.discriminator_training, scratch, progress, facts)
    judge = AdapterRef(DISCRIMINATOR, str(scratch / DISCRIMINATOR))
    with closing(open_engine(base, [judge])) as engine:
        found = [verdicts(engine, task.name, texts, judge) for texts in (unseen, negatives[:held])]
    accepted = [sum(verdict > 0 for verdict in side) for side in found]
    return {
        "negatives": len(negatives),
        "distinct": True,
        "held_out_real": held,
        "held_out_negatives": held,
        "true_accept_rate": accepted[0] / held,
        "false_accept_rate": accepted[1] / held,
        "calibration": calibrate(*found),
        "real_verdicts": outline(found[0]),
    }


def _generator(task: Task, base: str, rows: Sequence[TaskRow], scratch: Path, progress: Display, facts: dict[str, Any]) -> dict[str, Any]:
    """Train the generator adapter into `scratch`, on all inputs: what a recipe's generator `adapter` writes with (`LearntSynthesizer`)."""
    pairs = [(learnt_prompt(task, row.target), row.input) for row in rows]
    stated = {"rows": len(rows), "after": "label" if task.classes else "name"}
    if task.generator_privacy:
        privately = partial(train_privately, privacy=task.generator_privacy)
        return stated | {"private": _train(GENERATOR, task, base, pairs, task.generator_training, scratch, progress, facts, privately)}
    return stated | {"loss": _train(GENERATOR, task, base, pairs, task.generator_training, scratch, progress, facts)}


def _train(
    name: str,
    task: Task,
    base: str,
    pairs: Sequence[tuple[Prompt, str]],
    settings: Training,
    scratch: Path,
    progress: Display,
    facts: dict[str, Any],
    by: Callable[..., Any] = training.train_adapter,
) -> Any:
    """Train a LoRA of the usual size as `scratch`/`name`; returns what `by` does, by default the last epoch's mean loss."""
    began = time.perf_counter()
    adapter, shown = adapters.inherit(NO_SOURCE, Adapter(), models.linear_shapes(base)), progress.phase(name).step
    told = by(base, pairs, adapter, settings, derive_seed(task.seed, name), scratch / name, shown)
    facts["seconds"][name] = round(time.perf_counter() - began, 1)
    return told


def _negatives(task: Task, engine: Engine, seeds: list[TaskRow], wanted: int, phase: Phase) -> list[str]:
    """`wanted` distinct prompts that the source base wrote from the seeds, as a transfer's lists are, but of `shots` each (Trans-LoRA, section 3.2).

    By label where the task has many labels: of prompts of another kind the discriminator would learn which labels they favour, and reject those labels.
    """
    settings = Synthesis(fewest_shots=Synthesis().shots).settled(task.classes)
    copies, seen = SeedFilter([seed.input for seed in seeds], near=1.0), Seen(near=1.0)
    writer = Synthesizer(engine, settings, seeds, task.classes)
    found: list[str] = []
    for number in range(NEGATIVE_TRIES * -(-wanted // settings.pack_size)):
        pack = copies.process(writer.process(request_pack(derive_seed(task.seed, "negatives"), number, settings.pack_size)))
        for candidate in pack.open():
            if not seen.repeats(candidate.input):
                seen.add(candidate.input)
                found.append(candidate.input)
        phase.update(min(wanted, len(found)), wanted)
        if len(found) >= wanted:
            return found[:wanted]
    raise RunFailed(f"The base wrote only {len(found)} of {wanted} distinct prompts from the seeds: use --no-discriminator, or other rows.")
