"""The transfer kit: what the source side prepares while data is at hand. The only place where task rows are read.

A kit is a directory: `kit.json` (facts, written last), `seeds.jsonl`, `adapter/`, and `discriminator/` unless it was left out.
No task row but the seeds is in it.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from translora_ray import __version__, adapters, models
from translora_ray.config import Adapter, Synthesis, Task
from translora_ray.engines.base import AdapterRef, Engine, OpenEngine, Score
from translora_ray.errors import RunFailed, UsageError, first_line
from translora_ray.progress import Display, Phase
from translora_ray.prompts import NO, YES, Prompt, discriminator_prompt
from translora_ray.records import TaskRow, derive_seed, read_rows, request_pack
from translora_ray.storage import MANIFEST, RunStore, commit_folder
from translora_ray.stream.dedup import SeedFilter, Seen
from translora_ray.stream.discriminate import calibrate, verdicts
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.training import task as training

FACTS = "kit.json"
SEEDS = "seeds.jsonl"
ADAPTER = "adapter"
DISCRIMINATOR = "discriminator"
HELD_OUT = 0.1
NEGATIVE_TRIES = 4
ROWS_PER_LABEL = 4
NO_SOURCE = adapters.AdapterInfo(path="", base="", type="lora", parameters=0, digest="", shapes={})
"""What source adapter and discriminator take over from: nothing."""


@dataclass(frozen=True)
class Kit:
    """A loaded kit. `rows` is how many rows the task had; `digest` covers everything that decides a transfer.

    The teacher is the source adapter, or, where a finished run stands for the kit, that run's adapter on its target base; the
    discriminator and the seeds stay those of the kit that the first run was made from. `lineage`: digests of the adapters before the teacher.
    """

    path: str
    task: Task
    base: str
    base_fingerprint: str
    rows: int
    seeds: list[TaskRow]
    discriminator: dict[str, Any] | None
    digest: str
    adapter: AdapterRef
    teacher_base: str
    teacher_fingerprint: str
    discriminator_adapter: AdapterRef
    lineage: tuple[str, ...] = ()

    @property
    def bases(self) -> dict[str, str]:
        """Each base that the kit needs, and its fingerprint."""
        return {self.base: self.base_fingerprint, self.teacher_base: self.teacher_fingerprint}

    @property
    def seed_inputs(self) -> list[str]:
        return [seed.input for seed in self.seeds]


def load(path: str | Path) -> Kit:
    """Read a kit, or a finished run in its place, and check the adapters against the digests that are written there."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return _hop(folder)
    if not (folder / FACTS).exists():
        raise UsageError(f"{folder} is not a transfer kit: it has no {FACTS}; make one with `translora prepare`.")
    try:
        facts = json.loads((folder / FACTS).read_text())
        kit = Kit(
            path=str(folder.resolve()),
            task=Task.model_validate(facts["task"]),
            base=facts["base"],
            base_fingerprint=facts["base_fingerprint"],
            rows=facts["rows"],
            seeds=read_rows(folder / SEEDS),
            discriminator=facts["discriminator"],
            digest=facts["digest"],
            adapter=AdapterRef("teacher", str(folder.resolve() / ADAPTER)),
            teacher_base=facts["base"],
            teacher_fingerprint=facts["base_fingerprint"],
            discriminator_adapter=AdapterRef("discriminator", str(folder.resolve() / DISCRIMINATOR)),
        )
        digests = facts["adapters"]
        whole = _digest(facts, (folder / SEEDS).read_text(encoding="utf-8")) == facts["digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / FACTS} is damaged ({type(error).__name__}: {first_line(error)}): prepare the kit again.") from None
    if not whole:
        raise UsageError(f"{folder} was changed after it was made: copy the kit again.")
    for name, wanted in digests.items():
        if adapters.inspect(folder / name).digest != wanted:
            raise UsageError(f"{folder / name} is not the adapter that {FACTS} describes: copy the kit again.")
    return kit


def behind(manifest: dict[str, Any], run: str | Path) -> Kit:
    """The kit that a finished run was made from. Raises `UsageError` where another one lies there now."""
    found = load(manifest["kit_path"])
    if found.digest != manifest["kit"]:
        raise UsageError(f"The kit at {found.path} is not the one {run} was made from: bring back the original.")
    return found


def _hop(folder: Path) -> Kit:
    """The kit of a finished run, with the run's adapter as the teacher (Trans-LoRA, section 4.4: the discriminator serves every later transfer)."""
    manifest = RunStore(str(folder)).read_json(MANIFEST)
    before = behind(manifest, folder)
    adapter = AdapterRef("teacher", str(folder.resolve() / ADAPTER))
    if adapters.inspect(adapter.path).digest != manifest["adapter_digest"]:
        raise UsageError(f"The adapter in {folder} is not the one its manifest describes: remove the run, and transfer again.")
    lineage = (*before.lineage, adapters.digest(before.adapter.path))
    digest = hashlib.sha256(json.dumps([before.digest, manifest["adapter_digest"], manifest["target"]]).encode()).hexdigest()[:16]
    return replace(
        before,
        path=str(folder.resolve()),
        digest=digest,
        adapter=adapter,
        teacher_base=manifest["target_base"],
        teacher_fingerprint=manifest["target"],
        lineage=lineage,
    )


def choose_seeds(rows: Sequence[TaskRow], count: int, seed: int) -> list[TaskRow]:
    """`count` rows drawn by `seed`, taking turns between targets, so that seeds cover as many classes as they can."""
    draw = random.Random(derive_seed(seed, "seeds"))
    by_target: dict[str, list[TaskRow]] = defaultdict(list)
    for row in draw.sample(list(rows), len(rows)):
        by_target[row.target].append(row)
    queues = list(by_target.values())
    chosen: list[TaskRow] = []
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return chosen


def find_labels(task: Task, rows: Sequence[TaskRow]) -> Task:
    """`task` with the labels that its rows have, or `open`. Raises `UsageError` where rows have others than the task names."""
    found = sorted({row.target.strip() for row in rows})
    if task.classes:
        check_labels(task, rows, task.train)
        return task
    classes = task.labels == "from_rows" and task.metric in ("exact_match", "choice") and len(rows) >= ROWS_PER_LABEL * len(found) > ROWS_PER_LABEL
    return task.model_copy(update={"labels": found if classes else "open"})


def check_labels(task: Task, rows: Sequence[TaskRow], where: str) -> None:
    """Raise `UsageError` where targets are none of the task's labels."""
    strange = [row.target.strip() for row in rows if task.classes and row.target.strip() not in task.classes]
    if strange:
        raise UsageError(f"{where}: {len(strange)} rows have a target that is none of the task's labels, {strange[0]!r} first: correct them, or the labels.")


def prepare(task: Task, base: str, out: str | Path, adapter: str | None, discriminate: bool, open_engine: OpenEngine, progress: Display) -> dict[str, Any]:
    """Make the kit for `task` at `out`, which must not exist. Returns the facts.

    Order (Trans-LoRA, section 3.1): source adapter on the rows; negatives from the source base; discriminator on inputs against
    negatives, with `HELD_OUT` of both kept apart to measure its accept rates.
    """
    if "://" in str(out):
        raise UsageError(f"--out {out} must be a directory: make the kit on local disk, then copy it.")
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it.")
    RunStore(str(out)).check_writable()
    rows = read_rows(task.train)
    task = find_labels(task, rows)
    if len(rows) < task.seeds:
        raise UsageError(f"{task.train} has {len(rows)} rows, fewer than the {task.seeds} seeds asked for: lower seeds, or add rows.")
    if discriminate and len(rows) < 10:
        raise UsageError(f"{task.train} has {len(rows)} rows, too few to train and test a discriminator: add rows, or use --no-discriminator.")
    for training_section in (task.source_training, task.discriminator_training):
        models.require_bits(training_section.base_bits)
    info = models.describe(base)
    if obstacle := models.pair_obstacle(info, info, task.format):
        raise UsageError(obstacle)
    if adapter:
        _check_adapter(adapter, base, progress)

    seeds = choose_seeds(rows, task.seeds, task.seed)
    facts: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory(prefix="translora-kit-") as scratch_name:
        scratch = Path(scratch_name)
        began = time.perf_counter()
        if adapter:
            training.copy_adapter(adapter, scratch / ADAPTER, base)
            copied = AdapterRef(ADAPTER, str(scratch / ADAPTER))
            engine = open_engine(base, [copied])
            engine.score([Score(Prompt("Is it live?"), (YES, NO), copied)])
            engine.close()
        else:
            pairs, wanted = training.task_pairs(task, rows), adapters.inherit(NO_SOURCE, task.source_adapter, models.linear_shapes(base))
            shown = progress.phase("source adapter").step
            facts["source_loss"] = training.train_adapter(base, pairs, wanted, task.source_training, task.seed, scratch / ADAPTER, shown)
        facts["seconds"]["source adapter"] = round(time.perf_counter() - began, 1)
        facts["discriminator"] = _discriminator(task, base, rows, seeds, scratch, open_engine, progress, facts) if discriminate else None
        names = [name for name in (ADAPTER, DISCRIMINATOR) if (scratch / name).exists()]
        (scratch / SEEDS).write_text(
            "".join(json.dumps({"input": seed.input, "target": seed.target}, ensure_ascii=False) + "\n" for seed in seeds), encoding="utf-8"
        )
        facts |= {
            "version": __version__,
            "task": task.model_copy(update={"train": "not kept"}).model_dump(),
            "base": base,
            "base_fingerprint": models.fingerprint(base),
            "rows": len(rows),
            "adapters": {name: adapters.digest(scratch / name) for name in names},
        }
        facts["digest"] = _digest(facts, (scratch / SEEDS).read_text(encoding="utf-8"))
        (scratch / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        commit_folder(scratch, out, replace=False)
    return facts


def _check_adapter(adapter: str, base: str, progress: Display) -> None:
    """Raise `UsageError` unless the adapter is one for `base`, as far as names, shapes and, where its own base is at hand, weights tell."""
    info = adapters.inspect(adapter)
    adapters.check_fits(info, base, models.linear_shapes(base), models.width(base))
    if info.base == base:
        return
    if info.base.startswith("packaged:") or Path(info.base, "config.json").is_file():
        if models.fingerprint(info.base) != models.fingerprint(base):
            raise UsageError(f"The adapter {adapter} was trained on {info.base}, which is not {base}: name that base.")
    elif info.base:
        progress.say(f"The adapter names {info.base} as its base; its shapes fit, and {base} is taken to be the same.")


def order_for_discriminator(task: Task, rows: Sequence[TaskRow]) -> tuple[list[str], list[str]]:
    """Inputs that the discriminator of `task` is measured on, and those that it learns from: the same ones for the same rows in the same order."""
    held = max(1, round(len(rows) * HELD_OUT))
    inputs = [row.input for row in random.Random(derive_seed(task.seed, "held out")).sample(list(rows), len(rows))]
    return inputs[:held], inputs[held:]


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
    engine = open_engine(base, [])
    negatives = _negatives(task, engine, seeds, len(rows), progress.phase("negatives"))
    engine.close()
    facts["seconds"]["negatives"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    pairs = [(discriminator_prompt(task.name, text), YES) for text in learnt]
    pairs += [(discriminator_prompt(task.name, text), NO) for text in negatives[held:]]
    training.train_adapter(
        base,
        pairs,
        adapters.inherit(NO_SOURCE, Adapter(), models.linear_shapes(base)),
        task.discriminator_training,
        derive_seed(task.seed, DISCRIMINATOR),
        scratch / DISCRIMINATOR,
        progress.phase(DISCRIMINATOR).step,
    )
    facts["seconds"][DISCRIMINATOR] = round(time.perf_counter() - began, 1)
    judge = AdapterRef(DISCRIMINATOR, str(scratch / DISCRIMINATOR))
    engine = open_engine(base, [judge])
    found = [verdicts(engine, task.name, texts, judge) for texts in (unseen, negatives[:held])]
    accepted = [sum(verdict > 0 for verdict in side) for side in found]
    engine.close()
    return {
        "negatives": len(negatives),
        "held_out_real": held,
        "held_out_negatives": held,
        "true_accept_rate": accepted[0] / held,
        "false_accept_rate": accepted[1] / held,
        "calibration": calibrate(*found),
    }


def _negatives(task: Task, engine: Engine, seeds: list[TaskRow], wanted: int, phase: Phase) -> list[str]:
    """`wanted` distinct prompts that the source base wrote from the seeds, as a list that goes on (Trans-LoRA, section 3.2)."""
    settings = Synthesis().settled(())
    copies, seen = SeedFilter([seed.input for seed in seeds], near=1.0), Seen(near=1.0)
    writer = Synthesizer(engine, settings, seeds)
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


def _digest(facts: dict[str, Any], seeds: str) -> str:
    decisive = {key: facts[key] for key in ("task", "base_fingerprint", "rows", "adapters", "discriminator")}
    return hashlib.sha256((json.dumps(decisive, sort_keys=True) + seeds).encode()).hexdigest()[:16]
