"""What answers copy from their inputs, and seeds with other values in its place."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import task_rows, write_task
from translora_ray import identity, kit
from translora_ray.answers import values
from translora_ray.cli import main
from translora_ray.cluster import Cluster
from translora_ray.config import Task
from translora_ray.engines.base import Generate, Generation
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.recipe import Recipe, Selection, Synthesis
from translora_ray.records import TOO_LONG, Candidate, TaskRow, request_pack
from translora_ray.storage import IDENTITY, RunStore
from translora_ray.stream.actor import STAGES
from translora_ray.stream.choose import choose
from translora_ray.stream.fill import FillingSynthesizer, fillable
from translora_ray.stream.plan import Plan
from translora_ray.stream.synthesize import EMPTY

SEEDS = [
    TaskRow("Is it cold in New York City on Jul. 3?", "temperature=cold; city=New York City; time=Jul. 3"),
    TaskRow("weather for Rome", "city=Rome"),
    TaskRow("Hello there", "none"),
]


FRAME = ["city", "temperature", "time", "to", "from", "a", "b", "x"]


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (SEEDS[0].input, SEEDS[0].target, [("temperature", "cold"), ("city", "New York City"), ("time", "Jul. 3")]),
        ("fly from Bonn to Rome", '{"to": "Rome", "from": "Bonn"}', [("from", "Bonn"), ("to", "Rome")]),
        ("Who wrote Emma? Jane Austen wrote Emma.", "Jane Austen", [("", "Jane Austen")]),
        ("York or New York", "a=New York; b=York", [("b", "York"), ("a", "New York")]),
        ("New York or York", "a=York; b=New York", [("b", "New York"), ("a", "York")]),
        ("Rome and Bonn", "city=Rome, Bonn", [("city", "Rome"), ("city", "Bonn")]),
        ("rome is not Romeo", "city=Rome", []),
        ("two of 2", "a=2; b=2", [("a", "2")]),
        ("a (c) d", "x=(c)", [("x", "c")]),
        ("fly from Bonn to Rome", "from Bonn to Rome", [("from", "Bonn to Rome")]),
    ],
)
def test_values_are_the_longest_runs_that_an_answer_copies(text: str, answer: str, found: list[tuple[str, str]]) -> None:
    assert [(value.kind, text[value.start : value.end]) for value in values(TaskRow(text, answer), FRAME)] == found


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama)
    yield engine
    engine.close()


def filler(engine: TransformersEngine, **keys: Any) -> FillingSynthesizer:
    settings = Synthesis(**keys).settled((), copies=True)
    task = Task(name="weather", prompt="{input}", train="", answer_words=FRAME)
    return FillingSynthesizer(engine, settings, SEEDS, task)


@pytest.fixture
def asked(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[Generate]:
    """What is asked of the engine, whose answers are what a prompt ends with, in capitals."""
    requests: list[Generate] = []

    def generate(wanted: list[Generate]) -> list[Generation]:
        requests.extend(wanted)
        return [Generation(f" {request.prompt.text.splitlines()[-1].strip(':').upper()}\n", 1, 1, True) for request in wanted]

    monkeypatch.setattr(engine, "generate", generate)
    return requests


def test_a_seed_has_other_values_in_its_place(engine: TransformersEngine, asked: list[Generate]) -> None:
    found = filler(engine).process(request_pack(1, 1, 20))
    assert {candidate.input for candidate in found.candidates} == {"Is it TEMPERATURE in CITY on TIME?", "weather for CITY"}
    assert all(candidate.accepted for candidate in found.candidates) and found.tokens["generator"] == len(asked)
    cities = {request.prompt.text for request in asked if request.prompt.text.endswith("city:")}
    assert len(cities) == 1, "an engine reads the seeds' values of a pack once"
    assert set(cities.pop().split("\n")[-3:]) == {"city: New York City", "city: Rome", "city:"}
    assert len({request.seed for request in asked}) == len(asked)
    assert {request.sampling.temperature for request in asked} == {1.0}


def test_lists_show_the_seeds_as_they_are(engine: TransformersEngine, asked: list[Generate]) -> None:
    filler(engine).process(request_pack(1, 0, 20))
    shown = {line.partition(". ")[2] for request in asked for line in request.prompt.text.splitlines()[1:-1]}
    assert len(asked) == 20 and shown == {seed.input for seed in SEEDS} and {request.sampling.temperature for request in asked} == {0.7}


def test_values_that_are_cut_off_or_lacking_are_rejects(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, finished, reason in (("x", False, TOO_LONG), (" \n", True, EMPTY), ("x", True, None)):
        monkeypatch.setattr(engine, "generate", lambda requests, text=text, finished=finished: [Generation(text, 1, 1, finished) for _ in requests])
        assert {candidate.reason for candidate in filler(engine).process(request_pack(1, 1, 8)).candidates} == {reason}


def test_a_real_engine_writes_the_same_values_again(engine: TransformersEngine) -> None:
    found, again = (filler(engine).process(request_pack(1, 1, 16)).candidates for _ in range(2))
    assert found == again and len({candidate.input for candidate in found}) > 8


def test_packs_take_turns(engine: TransformersEngine) -> None:
    here = filler(engine, generator=("source", "target"))
    assert [here.settings.fills(number) for number in range(6)] == [False, False, True, True, False, False]


@pytest.fixture
def copying(tiny_kit: Path) -> kit.Kit:
    """The tiny kit as one of a task whose answers are copies."""
    loaded = kit.load(tiny_kit)
    return replace(loaded, seeds=SEEDS, task=loaded.task.model_copy(update={"labels": "open", "answer_words": FRAME}))


def decided(recipe: Recipe, loaded: kit.Kit) -> Recipe:
    return recipe.decided(loaded.task.classes, loaded.rows, loaded.discriminator, loaded.copies)


def test_copies_are_filled_where_the_recipe_leaves_it_open(tiny_kit: Path, tiny_gemma: str, copying: kit.Kit) -> None:
    loaded, without = kit.load(tiny_kit), replace(copying, seeds=SEEDS[2:])
    assert (loaded.copies, copying.copies, without.copies) == (False, True, False)
    assert [Synthesis(**keys).settled((), copies=True).fill for keys in ({}, {"fill": False}, {"by_label": True})] == [True, False, False]
    assert Synthesis().settled((), "adapter", copies=True).fill is False
    assert (decided(Recipe(), copying).synthesis.fill, decided(Recipe(), copying).synthesis.high_temperature) == (True, 1.0)
    assert Synthesis(temperature=0.5).settled((), copies=True).high_temperature == 0.5
    assert decided(Recipe(), loaded).synthesis.fill is decided(Recipe(), without).synthesis.fill is False

    def writer(one: kit.Kit, **keys: Any) -> object:
        plan = Plan(one, tiny_gemma, Recipe(synthesis=Synthesis(**keys)), Cluster(), "transformers", 1, 0)
        plan.check()
        turns: Any = STAGES["generator"](plan, plan.pools()[0], TransformersEngine(one.base))[0]
        return turns.stages["source"][0]

    assert [isinstance(one, FillingSynthesizer) for one in (writer(copying), writer(loaded), writer(copying, fill=False))] == [True, False, False]
    for one in (loaded, without):
        with pytest.raises(UsageError, match=r"synthesis\.fill exchanges what answers copy"):
            writer(one, fill=True)


def test_long_seeds_and_labels_are_not_filled(copying: kit.Kit) -> None:
    long = TaskRow(f"Here is {' '.join(f'word{i}' for i in range(40))} about Rome", "city=Rome")
    assert [text for text, _ in fillable(copying.task, [*SEEDS, long])] == [SEEDS[0].input, SEEDS[1].input]
    assert not fillable(copying.task.model_copy(update={"labels": ["city=Rome"]}), SEEDS)


def test_there_is_no_fill_by_default_under_a_cut_nor_where_an_adapter_writes(copying: kit.Kit) -> None:
    def fills(**keys: Any) -> bool | None:
        return decided(Recipe.model_validate(keys), copying).synthesis.fill

    assert fills() and fills(synthesis={"generator": ["source", "adapter"]}) and fills(selection={"method": "none"})
    assert not fills(overlap=True) and not fills(selection={"method": "discriminator"}) and not fills(synthesis={"generator": "adapter"})
    assert fills(overlap=True, synthesis={"fill": True})


@pytest.mark.parametrize(("filled", "others", "chosen"), [(40, 40, (11, 11)), (40, 6, (19, 3)), (6, 40, (3, 19)), (20, 4, (18, 4))])
def test_both_kinds_are_chosen_and_held_out_by_their_shares(tiny_gemma: str, copying: kit.Kit, filled: int, others: int, chosen: tuple[int, int]) -> None:
    recipe = decided(Recipe(selection=Selection(quota=20), synthesis=Synthesis(pack_size=1)), copying)
    plan = Plan(copying, tiny_gemma, recipe, Cluster(), "transformers", 1, 0)
    found = [Candidate(2 * i + 1, i, f"filled {i}", float(i), "a") for i in range(filled)]
    found += [Candidate(2 * i, i, f"listed {i}", -9.0, "a") for i in range(others)]
    trained, held_out = choose(plan, found)
    assert (len(trained), len(held_out)) == (20, 2) and plan.method == "importance"
    both = sorted((*trained, *held_out), key=lambda candidate: candidate.index)
    verdicts = [candidate.verdict for candidate in both if plan.fills(candidate.index)]
    assert (len(verdicts), 22 - len(verdicts)) == chosen
    assert filled < 40 or min(verdicts) < 10, "by chance, not the most likely ones"
    assert sum(plan.fills(candidate.index) for candidate in held_out) == round(2 * len(verdicts) / 22)


def test_what_training_has_begun_with_is_not_held_out(tiny_gemma: str, copying: kit.Kit) -> None:
    recipe = decided(Recipe(overlap=True, selection=Selection(quota=20, method="none"), synthesis=Synthesis(pack_size=2, fill=True)), copying)
    plan = Plan(copying, tiny_gemma, recipe, Cluster(), "transformers", 1, 0)
    trained, held_out = choose(plan, [Candidate(i, i, f"prompt {i}", target="a") for i in range(22)])
    assert [candidate.index for candidate in trained] == list(range(20)) and [candidate.index for candidate in held_out] == [20, 21]


def test_a_run_that_was_begun_before_goes_on_with_its_seeds_as_they_are(tmp_path: Path, tiny_gemma: str, copying: kit.Kit) -> None:
    older = identity.of(copying, tiny_gemma, decided(Recipe(synthesis=Synthesis(fill=False)), copying))
    del older["recipe"]["synthesis"]["fill"]
    assert identity.of_manifest(older, copying).synthesis.fill is False
    store = RunStore(str(tmp_path))
    store.write_json(IDENTITY, older)
    found = decided(identity.as_begun(Recipe(), store, copying), copying)
    assert (found.synthesis.fill, found.synthesis.high_temperature) == (False, 0.7)
    assert identity.check(store, copying, identity.of(copying, tiny_gemma, found)) == older
    with pytest.raises(UsageError, match=r"recipe\.synthesis\.fill is False there and True here"):
        identity.check(store, copying, identity.of(copying, tiny_gemma, decided(Recipe(synthesis=Synthesis(fill=True)), copying)))


@pytest.mark.parametrize("given", [False, True])
def test_a_kit_of_copies_is_made(tmp_path: Path, tiny_kit: Path, tiny_llama: str, given: bool) -> None:
    task = write_task(tmp_path, source_training={"epochs": 1})
    rows = [{"input": row["input"], "target": f"first {row['input'].rpartition(' ')[0]}"} for row in task_rows(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = ["--adapter", str(tiny_kit / "adapter")] if given else []
    assert main(["prepare", str(task), "--base", tiny_llama, "--out", str(tmp_path / "kit"), "--engine", "transformers", *adapter]) == 0
    made = kit.load(tmp_path / "kit")
    assert made.copies and made.task.answer_words == ["first"]
