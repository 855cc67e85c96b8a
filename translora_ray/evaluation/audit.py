"""Does a kit, or a run's synthetic set, tell which rows it was made from? Membership tests on real rows that were learnt from against rows that were not.

An attacker who ranks rows by a score would find the rows learnt from (members) with the AUC that is measured here: 0.5 is guessing. The seeds are members
that anyone can read in the kit, so they are left out. Texts alone are compared; nothing of a row goes into a result unless pairs are asked for.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from rapidfuzz import process
from rapidfuzz.distance import Indel

from translora_ray import kit
from translora_ray.engines.base import Complete, OpenEngine
from translora_ray.errors import UsageError
from translora_ray.evaluation.statistics import FEW, auc, binomial_tail, chance_interval
from translora_ray.progress import Display
from translora_ray.prompts import learnt_prompt
from translora_ray.recipe import Recipe
from translora_ray.records import TaskRow, read_rows
from translora_ray.storage import IDENTITY, MANIFEST, RunStore
from translora_ray.stream.dedup import Passages, grams, normal
from translora_ray.stream.discriminate import verdicts

MOST = 2000
"""Rows of each side, drawn where there are more."""
WORDS = 3
"""Of the runs of words whose overlap ranks rows: shorter than those that make a copy, because most rows share no long ones with any prompt."""
PAIRS = 5
ALPHA = 0.025
"""One-sided, as the upper half of a 95 % interval."""
CHUNK = 256


@dataclass(frozen=True)
class Sides:
    """Inputs of real rows, each once: `members` were learnt from, `others` were not. `judged` are the members that the discriminator was trained on."""

    members: list[str]
    others: list[str]
    judged: list[str]
    seeds: int
    known: bool
    """Whether the data is the file that the kit was made from, so that the rows kept from the discriminator are known."""


def audit(path: str, data: str, holdout: str, pairs: bool, open_engine: OpenEngine, display: Display) -> dict[str, Any]:
    """The tests on the kit, or the finished run, at `path`; `data` are the rows that the kit was made from, `holdout` rows of the same task that were not
    learnt from. `pairs` puts the nearest copies into the result. Raises `UsageError` where the files can not be compared."""
    loaded, store = _open(path)
    rows, other_rows = read_rows(data), read_rows(holdout)
    sides = split(loaded, rows, other_rows, data, holdout)
    for name, side in ((data, sides.members), (holdout, sides.others)):
        if len(side) < FEW:
            low, high = chance_interval(len(sides.members), len(sides.others))
            display.say(f"{name} has {len(side)} rows to test with: an AUC of 0.5 would have an interval of {low:.2f} to {high:.2f}. Take {FEW} or more.")
    result: dict[str, Any] = {"members": len(sides.members), "others": len(sides.others), "seeds_left_out": sides.seeds}
    result |= {"rows_known": sides.known, "discriminator": None, "generator": None, "synthetic": None}
    if loaded.discriminator is None:
        display.say("The kit has no discriminator: that half of the audit is left out.")
    else:
        if not sides.known:
            why = f"{data} is not the kit's training file as it was" if loaded.rows_digest else "The kit does not say of which file it was made"
            display.say(f"{why}: a tenth of its rows were kept from the discriminator, which pulls its AUC to 0.5.")
        result["discriminator"] = on_discriminator(loaded, sides, open_engine, display)
    if loaded.generator is not None:
        result["generator"] = on_generator(loaded, sides, {row.input: row.target for row in [*rows, *other_rows]}, open_engine, display)
    if store is None:
        display.say("A kit has no synthetic prompts: that half of the audit wants a run.")
    else:
        prompts = [candidate.input for candidate in store.candidates() if candidate.accepted]
        selection = Recipe.model_validate(store.read_json(MANIFEST)["recipe"]).selection
        result["synthetic"] = on_prompts(prompts, sides, selection.near_duplicate, selection.seed_overlap, pairs)
    return result


def _open(path: str) -> tuple[kit.Kit, RunStore | None]:
    """The kit, and the run that was made from it where `path` is one."""
    store = RunStore(path)
    if not store.exists(MANIFEST):
        if store.exists(IDENTITY):
            raise UsageError(f"{path} is not a finished run: it has no {MANIFEST}; run `translora transfer` to its end, or audit the kit.")
        return kit.load(path), None
    return kit.behind(store.read_json(MANIFEST), path), store


def split(loaded: kit.Kit, rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], data: str, holdout: str) -> Sides:
    """Members and others, each input once, without the seeds. Raises `UsageError` where the sides have rows in common or one is empty."""
    seeds = {normal(text) for text in loaded.seed_inputs}
    mine, theirs = ({normal(row.input): row.input for row in side} for side in (rows, other_rows))
    if learnt := theirs.keys() & seeds:
        raise UsageError(f"{holdout}: {len(learnt)} of its inputs are among the kit's seeds, which were learnt from: take them out, or swap the files.")
    if common := mine.keys() & theirs.keys():
        raise UsageError(f"{data} and {holdout} have {len(common)} inputs in common, so that they are on both sides: take them out of one.")
    members = {key: text for key, text in mine.items() if key not in seeds}
    if not members:
        raise UsageError(f"{data} has no row but the kit's seeds, which are members that anyone can read: give the rows that the kit was made from.")
    known = kit.rows_digest(rows) == loaded.rows_digest
    unseen = {normal(text) for text in kit.order_for_discriminator(loaded.task, rows, "distinct" in (loaded.discriminator or {}))[0]} if known else set()
    judged = [text for key, text in members.items() if key not in unseen]
    return Sides(_drawn(list(members.values())), _drawn(list(theirs.values())), _drawn(judged), len(mine) - len(members), known)


def _drawn(texts: list[str]) -> list[str]:
    return texts if len(texts) <= MOST else random.Random(0).sample(texts, MOST)


def on_discriminator(loaded: kit.Kit, sides: Sides, open_engine: OpenEngine, display: Display) -> dict[str, Any]:
    """Does it find rows that it was trained on likelier to be the task's than others?"""
    phase, texts = display.phase("verdicts"), [*sides.judged, *sides.others]
    found: list[float] = []
    with closing(open_engine(loaded.base, [loaded.discriminator_adapter])) as engine:
        for start in range(0, len(texts), CHUNK):
            found += verdicts(engine, loaded.task.name, texts[start : start + CHUNK], loaded.discriminator_adapter)
            phase.update(len(found), len(texts))
    count = len(sides.judged)
    return {"members": count, **_judged(found[:count], found[count:])}


def on_generator(loaded: kit.Kit, sides: Sides, targets: Mapping[str, str], open_engine: OpenEngine, display: Display) -> dict[str, Any]:
    """Does the generator adapter find rows that it was trained on likelier than others? `targets` holds each row's.

    `likelihood` ranks rows by the mean log-probability of their tokens (Yeom et al., arXiv 1709.01604), `gain` by what of it the adapter adds to its base,
    which takes out how common a text is (Carlini et al., arXiv 2112.03570).
    """
    adapter = loaded.generator_adapter
    phase, texts = display.phase("likelihoods"), [*sides.members, *sides.others]
    likelihood: list[float] = []
    gain: list[float] = []
    with closing(open_engine(loaded.base, [adapter])) as engine:
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            prompts = [learnt_prompt(loaded.task, targets[text]) for text in part]
            asked = [Complete(prompt, text, each) for prompt, text in zip(prompts, part, strict=True) for each in (adapter, None)]
            means = [sum(found) / len(found) for found in engine.token_logprobs(asked)]
            likelihood += means[::2]
            gain += [ours - bare for ours, bare in zip(means[::2], means[1::2], strict=True)]
            phase.update(len(gain), len(texts))
    count = len(sides.members)
    return {"members": count, **{name: _judged(found[:count], found[count:]) for name, found in (("likelihood", likelihood), ("gain", gain))}}


def on_prompts(prompts: Sequence[str], sides: Sides, near: float, overlap: float, pairs: bool = False) -> dict[str, Any]:
    """Are members nearer to the synthetic prompts than other rows are, and which share of the prompts copies a row?

    `edit_similarity` ranks rows by their normalised Indel similarity to the nearest prompt (rapidfuzz), `word_overlap` by the largest share of their runs of
    `WORDS` words that one prompt has. A copy is near from the similarity and the overlap at which `transfer` takes a prompt for a copy of a seed.
    """
    found: dict[str, Any] = {"prompts": len(prompts)}
    for name, measure in (("edit_similarity", edit_similarity), ("word_overlap", word_overlap)):
        found[name] = _judged(measure(sides.members, prompts), measure(sides.others, prompts))
    found["copies"] = _copied(prompts, sides, near, overlap)
    if pairs:
        found["nearest"] = _nearest(prompts, sides.members)
    return found


def edit_similarity(rows: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Of each row to its nearest prompt: 0 to 1, 1 for a copy."""
    texts = [normal(prompt) for prompt in prompts]
    best = [process.extractOne(normal(row), texts, scorer=Indel.normalized_similarity) for row in rows]
    return [float(match[1]) for match in best]


def word_overlap(rows: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """The largest share of each row's runs of `WORDS` words that one prompt has: 0 to 1, 0 for a shorter row."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        for run in grams(prompt, WORDS):
            holders[run].append(number)
    found = []
    for row in rows:
        runs = grams(row, WORDS)
        held: dict[int, int] = defaultdict(int)
        for run in runs:
            for number in holders.get(run, ()):
                held[number] += 1
        found.append(max(held.values(), default=0) / max(1, len(runs)))
    return found


def copies(prompts: Sequence[str], rows: Sequence[str], near: float, overlap: float) -> dict[str, int]:
    """How many prompts are the text of a row (`exact`), and how many others are so nearly or hold most of its words in their order (`near`)."""
    texts, passages = [normal(row) for row in rows], Passages(rows, overlap)
    exact = {normal(prompt) for prompt in prompts} & set(texts)
    rest = [prompt for prompt in prompts if normal(prompt) not in exact]
    close = [
        prompt
        for prompt in rest
        if passages.repeats(prompt) or process.extractOne(normal(prompt), texts, scorer=Indel.normalized_similarity, score_cutoff=near)
    ]
    return {"exact": len(prompts) - len(rest), "near": len(close)}


def _copied(prompts: Sequence[str], sides: Sides, near: float, overlap: float) -> dict[str, Any]:
    """Copies of either side's rows. Some come about by chance where texts are short: as many of each side's, by its number of rows."""
    members, others = (copies(prompts, side, near, overlap) for side in (sides.members, sides.others))
    ours, all_of_them = sum(members.values()), sum(members.values()) + sum(others.values())
    chance = binomial_tail(ours, all_of_them, len(sides.members) / (len(sides.members) + len(sides.others)))
    if not ours:
        said = "No prompt copies a row that was learnt from."
    elif chance < ALPHA:
        said = f"{ours} of {len(prompts)} prompts copy rows that were learnt from, more than chance makes (p {chance:.2g}): see --pairs, and take them out."
    else:
        said = f"{ours} of {len(prompts)} prompts copy rows that were learnt from, no more than chance makes (p {chance:.2g})."
    return {"members": members, "others": others, "share": ours / len(prompts), "p": chance, "judgement": said}


def _nearest(prompts: Sequence[str], rows: Sequence[str]) -> list[dict[str, Any]]:
    """The `PAIRS` prompts that are nearest to a row, and that row."""
    texts = [normal(row) for row in rows]
    best = [(process.extractOne(normal(prompt), texts, scorer=Indel.normalized_similarity), prompt) for prompt in prompts]
    best = sorted(best, key=lambda pair: pair[0][1], reverse=True)[:PAIRS]
    return [{"similarity": float(match[1]), "prompt": prompt, "row": rows[match[2]]} for match, prompt in best]


def _judged(members: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    area, low, high = auc(members, others)
    return {"auc": area, "low": low, "high": high, "judgement": judgement(area, low, high)}


def judgement(area: float, low: float, high: float) -> str:
    """What an AUC and its interval say, in a sentence."""
    if low > 0.5:
        return f"Rows that were learnt from can be told from others: evidence of a membership leak (an attacker ranks {area:.0%} of the pairs rightly)."
    if high < 0.5:
        return "Rows that were learnt from score lower than others: no leak by this test, but the two files differ; draw both from one source."
    return f"No evidence of a membership leak (one up to an AUC of {high:.2f} is not ruled out)."
