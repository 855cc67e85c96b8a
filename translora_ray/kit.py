"""The transfer kit: what the source side prepares while data is at hand (`preparing.py`), and which rows it takes for what.

A kit is a directory: `kit.json` (facts, written last), `seeds.jsonl`, `adapter/`, `discriminator/` unless it was left out, and `generator/` where the task
asks for one. No task row but the seeds is in it.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy
from rapidfuzz import process
from rapidfuzz.distance import Indel

from translora_ray import adapters
from translora_ray.config import Task
from translora_ray.engines.base import AdapterRef
from translora_ray.errors import NoRoom, UsageError, reason
from translora_ray.prompts import answer_stops, several_lines
from translora_ray.records import TaskRow, derive_seed, read_rows
from translora_ray.references import once
from translora_ray.storage import MANIFEST, RELEASE, RunStore, reaching
from translora_ray.stream.dedup import normal
from translora_ray.stream.fill import fillable

FACTS = "kit.json"
SEEDS = "seeds.jsonl"
ADAPTER = "adapter"
DISCRIMINATOR = "discriminator"
GENERATOR = "generator"
HELD_OUT = 0.1
LOOKED_AT = 1000
"""Most rows of a target among which seeds are chosen: the work grows with the square."""
COMPARED = 500
"""Characters of a text by which it is compared with others, for the same reason."""


@dataclass(frozen=True)
class Kit:
    """A loaded kit. `rows` is how many rows the task had; `digest` covers everything that decides a transfer.

    The teacher is the source adapter, or, where a finished run stands for the kit, that run's adapter on its target base; discriminator, generator
    adapter and seeds stay those of the kit that the first run was made from. `lineage`: digests of the adapters before the teacher.
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
    generator: dict[str, Any] | None
    generator_adapter: AdapterRef
    lineage: tuple[str, ...] = ()
    rows_digest: str = ""
    several_lines: bool = False
    """Whether some row's answer has several lines; of a kit that does not say so, some seed's."""

    @property
    def bases(self) -> dict[str, str]:
        """Each base that the kit needs, and its fingerprint."""
        return {self.base: self.base_fingerprint, self.teacher_base: self.teacher_fingerprint}

    @property
    def seed_inputs(self) -> list[str]:
        return [seed.input for seed in self.seeds]

    @property
    def answer_stops(self) -> tuple[str, ...]:
        """Where an answer ends that an adapter does not end itself."""
        return answer_stops(self.several_lines, self.task.format)

    @property
    def copies(self) -> bool:
        """Whether answers are copies, and seeds such that other values make other prompts of them."""
        return bool(fillable(self.task, self.seeds))

    def here(self) -> Kit:
        """This kit on another machine, which may have no copy yet of what lies on an object store: the kit itself, or the one that a run goes back to."""
        needed = (self.adapter, *([self.discriminator_adapter] if self.discriminator else []), *([self.generator_adapter] if self.generator else []))
        if "://" not in self.path and all(Path(adapter.path).is_dir() for adapter in needed):
            return self
        found = load(self.path)
        if found.digest != self.digest:
            raise UsageError(f"The kit at {self.path} is not the one that this transfer began with: bring back the original.")
        return found


def load(path: str | Path) -> Kit:
    """Read a kit, or a finished run or a release in its place, and check the adapters against the digests that are written there.

    Of a URI (s3://, gs://) a copy is made in the cache of this machine.
    """
    if "://" not in str(path):
        folder = Path(path).resolve()
        return _read(folder, str(folder))
    folder = _fetched(str(path))
    try:
        return _read(folder, str(path).rstrip("/"))
    except UsageError:
        shutil.rmtree(folder, ignore_errors=True)  # the next try copies it anew
        raise


def _read(folder: Path, place: str) -> Kit:
    """What lies in `folder`, which users call `place`."""
    if (folder / MANIFEST).exists():
        return _hop(folder, place)
    if (folder / RELEASE).exists():
        return _behind_release(RunStore(str(folder)).read_json(RELEASE), place)
    if not (folder / FACTS).exists():
        raise UsageError(f"{place} is not a transfer kit: it has no {FACTS}; make one with `translora prepare`.")
    try:
        facts = json.loads((folder / FACTS).read_text())
        seeds = read_rows(folder / SEEDS)
        kit = Kit(
            path=place,
            task=Task.model_validate(facts["task"]),
            base=facts["base"],
            base_fingerprint=facts["base_fingerprint"],
            rows=facts["rows"],
            seeds=seeds,
            discriminator=facts["discriminator"],
            digest=facts["digest"],
            adapter=AdapterRef("teacher", str(folder / ADAPTER)),
            teacher_base=facts["base"],
            teacher_fingerprint=facts["base_fingerprint"],
            discriminator_adapter=AdapterRef("discriminator", str(folder / DISCRIMINATOR)),
            generator=facts.get("generator"),
            generator_adapter=AdapterRef("generator", str(folder / GENERATOR)),
            rows_digest=facts.get("rows_digest", ""),
            several_lines=facts.get("several_lines", several_lines(seeds)),
        )
        digests = facts["adapters"]
        whole = digest_of(facts, (folder / SEEDS).read_text(encoding="utf-8")) == facts["digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{place}/{FACTS} is damaged ({reason(error)}): prepare the kit again.") from None
    if not whole:
        raise UsageError(f"{place} was changed after it was made: copy the kit again.")
    for name, wanted in digests.items():
        if adapters.inspect(folder / name).digest != wanted:
            raise UsageError(f"{place}/{name} is not the adapter that {FACTS} describes: copy the kit again.")
    return kit


def _fetched(uri: str) -> Path:
    """The copy of a kit, or of what stands for one in a finished run. It is made once for each content of the file that was written last."""
    store = RunStore(uri)
    with reaching(store.uri):
        last = next((name for name in (MANIFEST, RELEASE, FACTS) if store.exists(name)), None)
        if last is None:
            raise UsageError(f"{uri} is not a transfer kit: it has no {FACTS}; make one with `translora prepare`, and copy it there.")
        key = hashlib.sha256(f"{store.uri}\n".encode() + store.read(last)).hexdigest()[:16]

    def fetch(copy: Path) -> None:
        copy.mkdir()
        for file in (SEEDS, last):
            if store.exists(file):
                (copy / file).write_bytes(store.read(file))
        for folder in (ADAPTER, DISCRIMINATOR, GENERATOR):
            if store.exists(folder):
                store.fetch_folder(folder, copy / folder)
        _read(copy, uri)  # what is not whole does not become a copy

    return once(f"kits/{key}", fetch)


def behind(manifest: dict[str, Any], run: str | Path) -> Kit:
    """The kit that a finished run was made from. Raises `UsageError` where another one lies there now."""
    found = load(manifest["kit_path"])
    if found.digest != manifest["kit"]:
        raise UsageError(f"The kit at {found.path} is not the one {run} was made from: bring back the original.")
    return found


def is_gone(place: str) -> bool:
    """Whether nothing is at a kit's place any more, or at the one that a run or a release there goes back to."""
    store = RunStore(place)
    if store.exists(MANIFEST):
        return is_gone(store.read_json(MANIFEST)["kit_path"])
    if store.exists(RELEASE) and (run := store.read_json(RELEASE).get("run")):
        return is_gone(run)
    return not store.exists()


def _hop(folder: Path, place: str) -> Kit:
    """The kit of a finished run, with the run's adapter as the teacher (Trans-LoRA, section 4.4: the discriminator serves every later transfer)."""
    manifest = RunStore(str(folder)).read_json(MANIFEST)
    before = behind(manifest, place)
    adapter = AdapterRef("teacher", str(folder / ADAPTER))
    adapters.require(adapter.path, manifest["adapter_digest"], place)
    lineage = (*before.lineage, adapters.digest(before.adapter.path))
    digest = hashlib.sha256(json.dumps([before.digest, manifest["adapter_digest"], manifest["target"]]).encode()).hexdigest()[:16]
    return replace(
        before,
        path=place,
        digest=digest,
        adapter=adapter,
        teacher_base=manifest["target_base"],
        teacher_fingerprint=manifest["target"],
        lineage=lineage,
    )


def _behind_release(facts: dict[str, Any], place: str) -> Kit:
    """The run, or the kit, that a release was published from: there are the seeds and the discriminator."""
    if not (run := facts.get("run")):
        raise UsageError(f"{place} does not say which run it was published from, as an older version wrote it: name the run.")
    try:
        found = load(run)
    except NoRoom:
        raise
    except UsageError as error:
        raise UsageError(f"{place} was published from {run}, whose kit is needed: {error}") from None
    if adapters.digest(found.adapter.path) != facts["digest"]:
        raise UsageError(f"{run} holds another adapter than {place}, which was published from it: name a run that holds the release's.")
    return replace(found, path=place)


def choose_seeds(rows: Sequence[TaskRow], count: int, seed: int) -> list[TaskRow]:
    """`count` rows, taking turns between targets, so that seeds cover as many classes as they can, and of each target the rows that stand best for the others:
    what no seed resembles, no generator writes. Of more targets than seeds each has one at most. `seed` draws the order of the targets."""
    draw = random.Random(derive_seed(seed, "seeds"))
    by_target: dict[str, list[TaskRow]] = defaultdict(list)
    for row in draw.sample(list(rows), len(rows)):
        by_target[row.target].append(row)
    if len(by_target) > count:
        return by_coverage([row for turn in zip_longest(*by_target.values()) for row in turn if row][:LOOKED_AT], count, apart=True)
    queues = [by_coverage(group[:LOOKED_AT], count) for group in by_target.values()]
    return [row for turn in zip_longest(*queues) for row in turn if row][:count]


def by_coverage(rows: Sequence[TaskRow], count: int, apart: bool = False) -> list[TaskRow]:
    """At most `count` of the rows, each the one that brings all of them nearest to one of those before it or to itself (greedy facility location,
    Nemhauser, Wolsey and Fisher, 1978), by the normalised Indel similarity of their inputs; where targets are to differ (`apart`), of inputs and targets
    in even parts, as short inputs resemble most others and leave kinds of answers without a seed (`benchmarks/seeds.py`)."""
    targets = numpy.asarray([row.target for row in rows])
    alike = _alike([row.input for row in rows])
    if apart:
        alike = (alike + _alike([row.target for row in rows])) / 2
    covered, free, chosen = numpy.zeros(len(rows)), numpy.ones(len(rows), dtype=bool), list[int]()
    while len(chosen) < count and free.any():
        best = int(numpy.where(free, numpy.maximum(alike, covered).sum(axis=1), -1.0).argmax())
        covered = numpy.maximum(covered, alike[best])
        free &= targets != targets[best] if apart else numpy.arange(len(rows)) != best
        chosen.append(best)
    return [rows[i] for i in chosen]


def _alike(texts: Sequence[str]) -> Any:
    """(texts, texts) similarities, by their first `COMPARED` characters."""
    begun = [text[:COMPARED] for text in texts]
    return process.cdist(begun, begun, scorer=Indel.normalized_similarity, workers=-1)


def order_for_discriminator(task: Task, rows: Sequence[TaskRow], distinct: bool = True) -> tuple[list[str], list[str]]:
    """Inputs that the discriminator of `task` is measured on, and those that it learns from: the same ones for the same rows in the same order. An input that
    repeats another one is left out; without `distinct`, as older kits were made, it may be on both sides."""
    inputs = [row.input for row in rows]
    if distinct:
        first = dict[str, str]()
        for text in inputs:
            first.setdefault(normal(text), text)
        inputs = list(first.values())
    drawn = random.Random(derive_seed(task.seed, "held out")).sample(inputs, len(inputs))
    held = max(1, round(len(drawn) * HELD_OUT))
    return drawn[:held], drawn[held:]


def rows_digest(rows: Sequence[TaskRow]) -> str:
    """Of the rows in their order: by it an audit knows the file that a kit was made from."""
    return hashlib.sha256(json.dumps([[row.input, row.target] for row in rows]).encode()).hexdigest()[:16]


def digest_of(facts: dict[str, Any], seeds: str) -> str:
    decisive = {key: facts[key] for key in ("task", "base_fingerprint", "rows", "adapters", "discriminator")}
    if "several_lines" in facts:  # older kits lack it
        decisive["several_lines"] = facts["several_lines"]
    return hashlib.sha256((json.dumps(decisive, sort_keys=True) + seeds).encode()).hexdigest()[:16]
