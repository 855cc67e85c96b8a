"""Test rows and arms that tell little or nothing: what `evaluate` says of them, without a run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import lora, task_rows
from translora_ray import adapters, adapting, kit, models
from translora_ray.cluster import Vllm
from translora_ray.config import Adapter, Training
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.select import opener
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.evaluation import page
from translora_ray.evaluation.arms import Arms
from translora_ray.evaluation.compare import _check_room, _few_shots, _say_how_little, check_rows, evaluate
from translora_ray.evaluation.statistics import wilson
from translora_ray.progress import Display
from translora_ray.prompts import Prompt
from translora_ray.recipe import Gate, Recipe, Selection, Synthesis
from translora_ray.records import Candidate, TaskRow
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import SEED_COPY, SEED_PASSAGE
from translora_ray.stream.discriminate import OFF_TASK


@pytest.fixture
def loaded(tiny_kit: Path) -> kit.Kit:
    return kit.load(tiny_kit)


def rows(start: int, end: int) -> list[TaskRow]:
    return [TaskRow(**row) for row in task_rows(end)[start:]]


@pytest.mark.parametrize(("count", "said"), [(10, True), (29, True), (30, False)])
def test_few_rows_are_taken_and_the_width_of_the_interval_is_said(capsys: pytest.CaptureFixture[str], count: int, said: bool) -> None:
    with Display() as display:
        _say_how_little(rows(60, 60 + count), "test.jsonl", display)
    low, high = wilson(count / 2, count)
    told = f"test.jsonl has {count} rows: an accuracy of 0.5 would have an interval of {low:.2f} to {high:.2f}. Take 30 or more."
    assert (told in " ".join(capsys.readouterr().err.split())) == said


def test_rows_that_were_learnt_from_or_have_another_label_are_refused(loaded: kit.Kit) -> None:
    with pytest.raises(UsageError, match="t: 5 of its inputs are among the kit's seeds"):
        check_rows(loaded, rows(0, 60), "t", {})
    with pytest.raises(UsageError, match="t: 2 of its inputs are among --train"):
        check_rows(loaded, rows(60, 100), "t", {"--oracle": [], "--train": rows(98, 110)})
    with pytest.raises(UsageError, match="t: 1 rows have a target that is none of the task's labels, 'z' first"):
        check_rows(loaded, [*rows(60, 100), TaskRow("red 900", "z")], "t", {})


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama)
    yield engine
    engine.close()


@pytest.mark.parametrize("arm", ["unfiltered", "discriminator", "excess"])
def test_an_arm_without_rows_is_refused_before_it_is_trained(loaded: kit.Kit, engine: TransformersEngine, tiny_gemma: str, tmp_path: Path, arm: str) -> None:
    store = RunStore(str(tmp_path / "run"))
    reasons = [SEED_COPY, SEED_PASSAGE, "duplicate", "answer too long"]
    candidates = [Candidate(i, i, row.input, reason=reason) for i, (row, reason) in enumerate(zip(rows(60, 64), reasons, strict=True))]
    store.write_shard(0, 0, candidates, {"attempt": "a", "loads": [], "tokens": {}, "seconds": {}})
    recipe = Recipe(selection=Selection(quota=4), gate=Gate(held_out=0))
    with Display() as display:
        manifest = {"target_base": tiny_gemma, "source_base": loaded.base, "counts": {"quota": 4}, "selection": "discriminator"}
        arms = Arms(loaded, manifest, recipe, store, tmp_path, display)
        arms.check([arm])
        with pytest.raises(UsageError, match=f"--arms {arm}: no candidate of the run is left to train on; leave this arm out"):
            arms.sets([arm], engine)
    assert not (tmp_path / arm).exists()


def test_a_method_without_a_cut_chooses_from_what_comes_not_from_what_the_discriminator_picked(
    loaded: kit.Kit, engine: TransformersEngine, tiny_gemma: str, tmp_path: Path
) -> None:
    store = RunStore(str(tmp_path / "run"))
    candidates = [Candidate(i, i, row.input, verdict=-1.0 if i < 8 else 1.0, reason=OFF_TASK if i < 8 else None) for i, row in enumerate(rows(60, 90))]
    store.write_shard(0, 0, candidates, {"attempt": "a", "loads": [], "tokens": {}, "seconds": {}})
    recipe = Recipe(selection=Selection(quota=4, near_duplicate=1.0, as_asked=False), gate=Gate(held_out=0))
    manifest = {"target_base": tiny_gemma, "source_base": loaded.base, "counts": {"quota": 4}}
    with Display() as display:
        sets = Arms(loaded, manifest, recipe, store, tmp_path, display).sets(["unfiltered", "importance", "excess", "discriminator"], engine)
        recipe = Recipe(synthesis=Synthesis(by_label=True), selection=Selection(quota=4), gate=Gate(held_out=0))
        as_asked = Arms(loaded, manifest, recipe, store, tmp_path, display).sets(["discriminator"], engine)
    place = {candidate.input: candidate.index for candidate in candidates}
    found = {name: [place[row.input] for row in chosen] for name, chosen in sets.items()}
    assert found["discriminator"] == [8, 9, 10, 11]
    assert as_asked["discriminator"] and all(row.target == candidates[place[row.input]].label_of(loaded.task.classes) for row in as_asked["discriminator"])
    assert found["unfiltered"] == [0, 1, 2, 3]
    assert all(len(found[name]) == 4 and max(found[name]) < 8 for name in ("importance", "excess")), found  # of 2 x 4


def test_real_rows_are_passed_over_as_often_as_makes_as_many_steps(loaded: kit.Kit, tiny_gemma: str, tmp_path: Path) -> None:
    manifest = {"target_base": tiny_gemma, "counts": {"quota": 40}}
    with Display() as display:
        arms = Arms(loaded, manifest, Recipe(training=Training(epochs=2)), RunStore(str(tmp_path / "run")), tmp_path, display)
    assert [arms._epochs("oracle", count)["epochs"] for count in (80, 40, 20, 4)] == [2, 2, 4, 6]
    assert arms._epochs("unfiltered", 20) == {"epochs": 2}


def test_another_training_is_of_the_same_rows_with_other_random_numbers(loaded: kit.Kit, tiny_gemma: str, tmp_path: Path) -> None:
    recipe = Recipe(selection=Selection(quota=8), gate=Gate(held_out=0), training=Training(epochs=1))
    candidates = [Candidate(i, i, row.input, 1.0, row.target) for i, row in enumerate(rows(60, 90))]
    store = RunStore(str(tmp_path / "run"))
    store.write_shard(0, 0, candidates, {"attempt": "a", "loads": [], "tokens": {}, "seconds": {}})
    training = {"learning_rate": 1e-3, "adapter": lora().model_dump()}
    manifest = {"target_base": tiny_gemma, "counts": {"quota": 8}, "training": training, "selection": "discriminator"}  # by the default of an older version

    def trained(place: Path, again: int) -> str:
        with Display() as display:
            arms = Arms(loaded, manifest, recipe, store, place, display)
            assert [row.input for row in arms.trained_on] == [row.input for row in rows(60, 68)]
            (adapter,) = arms.trained((), {"transferred": arms.trained_on}, again).values()
        return adapters.digest(adapter.path)

    found = [trained(tmp_path / str(number), again) for number, again in enumerate((0, 1, 2, 1))]
    assert len(set(found)) == 3 and found[1] == found[3]


def test_an_ia3_teacher_takes_turns_with_the_discriminators_lora(
    loaded: kit.Kit, tiny_llama: str, tiny_gemma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ia3 = adapting.create(models.load_base(tiny_llama), Adapter(type="ia3", rank=1, alpha=1.0, dropout=0.0, modules="all-linear"), 0)
    with torch.no_grad():
        for weight in ia3.parameters():
            weight.add_(float(weight.requires_grad))
    adapting.save(ia3, tmp_path / "ia3", tiny_llama)
    transferred = adapting.create(models.load_base(tiny_gemma), lora(), 0)
    with torch.no_grad():
        for weight in transferred.parameters():
            weight.add_(0.1 * weight.requires_grad)
    adapting.save(transferred, tmp_path / "run" / "adapter", tiny_gemma)
    store = RunStore(str(tmp_path / "run"))
    written = [Candidate(i, i, row.input, target="a") for i, row in enumerate(rows(0, 20))]
    store.write_shard(0, 0, written, {"attempt": "a", "loads": [], "tokens": {}, "seconds": {}})
    recipe = Recipe(selection=Selection(quota=20), gate=Gate(held_out=0)).model_dump()
    facts = {"target_base": tiny_gemma, "source_base": tiny_llama, "recipe": recipe, "adapter_digest": adapters.digest(tmp_path / "run" / "adapter")}
    store.write_json("manifest.json", {**facts, "selection": "importance", "training": {"learning_rate": 1e-3, "adapter": lora().model_dump()}})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(90)[60:]))
    monkeypatch.setattr(kit, "behind", lambda manifest, run: replace(loaded, adapter=AdapterRef("teacher", str(tmp_path / "ia3"))))
    monkeypatch.setattr(page, "write", lambda *_: None)
    with Display() as display:
        result = evaluate(str(tmp_path / "run"), str(tmp_path / "test.jsonl"), None, [], opener("transformers", Vllm(), None, display.say), display)
    assert len(result["verdicts"]["real"]) == 30
    assert set(result["arms"]) == {"source_base", "source_adapter", "target_base", "target_few_shot", "transferred"}


def test_rows_that_are_too_long_are_found_before_anything_is_trained(loaded: kit.Kit, tiny_llama: str, tiny_gemma: str) -> None:
    manifest, taught = {"source_base": tiny_llama, "target_base": tiny_gemma}, [loaded.adapter, loaded.adapter]
    _check_room([Prompt("Q: red\nA:")], manifest, taught, 4, "test.jsonl")
    with pytest.raises(UsageError, match=r"test\.jsonl: row 2 has 2045 tokens with its prompt, .*llama takes 2044 beside an answer"):
        _check_room([Prompt("Q"), Prompt("x" * 2045)], manifest, taught, 4, "test.jsonl")


def test_few_shots_are_none_where_not_even_one_fits(loaded: kit.Kit, engine: TransformersEngine) -> None:
    long = [TaskRow("x" * 2030, "a")]
    with Display() as display:
        assert _few_shots(engine, loaded, long, display) == [Prompt("Q: " + "x" * 2030 + "\nA:")]
