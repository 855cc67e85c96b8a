"""The audit finds what leaks, finds nothing where nothing does, and refuses files that can not be compared."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from rapidfuzz.distance import Indel

from tests.conftest import lora, task_rows, write_task
from translora_ray import kit
from translora_ray.cli import main
from translora_ray.config import Training
from translora_ray.engines.base import AdapterRef
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import RunFailed, UsageError
from translora_ray.evaluation.audit import Sides, copies, edit_similarity, judgement, on_discriminator, on_prompts, split, word_overlap
from translora_ray.evaluation.statistics import auc, binomial_tail, chance_interval
from translora_ray.progress import Display
from translora_ray.prompts import NO, YES, discriminator_prompt
from translora_ray.records import TaskRow
from translora_ray.stream.dedup import grams
from translora_ray.stream.discriminate import verdicts
from translora_ray.training.task import train_adapter

WORDS = "please set an alarm call my mother play some jazz what is the weather in oslo turn off every lamp and lock that door now"


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(7, 12))) for _ in range(count)]


class Broken:
    """An engine that answers nothing."""

    closed = False

    def score(self, _: object) -> None:
        raise RunFailed("It does not answer.")

    def close(self) -> None:
        self.closed = True


def test_an_engine_that_fails_is_closed(tiny_kit: Path) -> None:
    engine = Broken()
    with Display() as display, pytest.raises(RunFailed):
        on_discriminator(kit.load(tiny_kit), Sides(["one"], ["two"], ["one"], 0, True), lambda *_: engine, display)  # type: ignore[arg-type,return-value]
    assert engine.closed


def test_auc_is_the_share_of_pairs_and_its_interval_shrinks_with_rows() -> None:
    assert auc([3, 2], [1, 2])[0] == 3.5 / 4
    area, low, high = auc([1.0] * 20, [0.0] * 10)
    assert area == 1 == pytest.approx(high) and 0.6 < low < 0.8  # ten rows never say 1 for certain
    draw = numpy.random.default_rng(1)
    for n, m in ((30, 40), (200, 300)):
        ours, theirs = draw.normal(1, 1, n), draw.normal(0, 1, m)
        area, low, high = auc(ours, theirs)
        assert area == pytest.approx(numpy.mean([a > b for a in ours for b in theirs]))
        assert low < 0.76 < high  # P(N(1, 1) > N(0, 1))
    assert high - low < 0.1


def test_the_interval_of_chance_holds_nineteen_areas_of_twenty() -> None:
    draw, (low, high) = numpy.random.default_rng(0), chance_interval(20, 30)
    areas = [numpy.mean(draw.normal(size=(20, 1)) > draw.normal(size=(1, 30))) for _ in range(2000)]
    assert numpy.mean([low <= area <= high for area in areas]) == pytest.approx(0.95, abs=0.015)


def test_binomial_tail() -> None:
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(0, 5, 0.3) == pytest.approx(1.0)
    assert 0 < binomial_tail(2900, 3000, 0.9) < 1


def test_measures_equal_the_plain_ones() -> None:
    rows, prompts = sentences(12, 0), sentences(40, 1)
    rows.append("too short")
    assert edit_similarity(rows, prompts) == pytest.approx([max(Indel.normalized_similarity(row, prompt) for prompt in prompts) for row in rows])
    plain = [max(len(grams(row, 3) & grams(prompt, 3)) for prompt in prompts) / max(1, len(grams(row, 3))) for row in rows]
    assert word_overlap(rows, prompts) == pytest.approx(plain) and max(plain) > 0 == plain[-1]


def sides(count: int = 60) -> Sides:
    texts = list(dict.fromkeys(sentences(3 * count, 7)))
    return Sides(texts[:count], texts[count : 2 * count], texts[:count], 0, True)


def test_prompts_that_were_made_from_rows_give_them_away() -> None:
    rows = sides()
    near = [f"{text} now please" for text in rows.members[:40]]
    found = on_prompts([*near, *rows.members[:3], *sentences(50, 3)], rows, 0.95, 0.8, pairs=True)
    for name in ("edit_similarity", "word_overlap"):
        assert found[name]["low"] > 0.6 and "evidence of a membership leak" in found[name]["judgement"]
        assert "No evidence" not in found[name]["judgement"]
    assert found["copies"]["members"]["exact"] == 3 and found["copies"]["members"]["near"] == 40
    assert sum(found["copies"]["others"].values()) <= 2 and "more than chance" in found["copies"]["judgement"]
    assert found["nearest"][0]["similarity"] == 1 and found["nearest"][0]["row"] in rows.members[:3]


def test_prompts_that_were_not_tell_nothing() -> None:
    rows = sides()
    found = on_prompts(sentences(200, 5), rows, 0.95, 0.8)
    for name in ("edit_similarity", "word_overlap"):
        assert found[name]["low"] < 0.5 < found[name]["high"] and found[name]["judgement"].startswith("No evidence")
    assert found["copies"]["judgement"] == "No prompt copies a row that was learnt from." and "nearest" not in found
    assert "differ" in judgement(0.3, 0.2, 0.4)


def test_copies_of_either_side_are_chance() -> None:
    rows = sides()
    found = on_prompts([*rows.members[:4], *rows.others[:4], *sentences(50, 3)], rows, 0.95, 0.8)
    assert found["copies"]["p"] > 0.3 and "no more than chance" in found["copies"]["judgement"]
    assert copies([rows.others[0].upper()], rows.others, 0.95, 0.8) == {"exact": 1, "near": 0}


@pytest.fixture(scope="module")
def loaded(tiny_kit: Path) -> kit.Kit:
    return kit.load(tiny_kit)


def rows(start: int, end: int) -> list[TaskRow]:
    return [TaskRow(**row) for row in task_rows(end)[start:]]


def test_seeds_and_rows_kept_from_the_discriminator_are_no_members(loaded: kit.Kit) -> None:
    found = split(loaded, rows(0, 60), rows(60, 100), "train", "test")
    assert (len(found.members), len(found.others), found.seeds, found.known) == (55, 40, 5, True)
    assert not set(found.members) & set(loaded.seed_inputs)
    unseen, learnt = kit.order_for_discriminator(loaded.task, rows(0, 60))
    assert (len(unseen), len(learnt)) == (6, 54)
    assert set(found.judged) == set(learnt) - set(loaded.seed_inputs)
    other_order = split(loaded, rows(0, 60)[::-1], rows(60, 100), "train", "test")
    assert not other_order.known and set(other_order.judged) == set(found.members)


def test_files_that_can_not_be_compared_are_refused(loaded: kit.Kit) -> None:
    with pytest.raises(UsageError, match="train and test have 5 inputs in common"):
        split(
            loaded,
            [row for row in rows(0, 60) if row not in loaded.seeds],
            rows(60, 100) + [row for row in rows(0, 60) if row not in loaded.seeds][:5],
            "train",
            "test",
        )
    with pytest.raises(UsageError, match="test: 5 of its inputs are among the kit's seeds"):
        split(loaded, rows(60, 100), rows(0, 60), "train", "test")
    with pytest.raises(UsageError, match="train has no row but the kit's seeds"):
        split(loaded, loaded.seeds, rows(60, 100), "train", "test")


def write(path: Path, part: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(path)


def audited(folder: Path, path: Path, train: list[dict[str, str]], other: list[dict[str, str]], *more: str) -> int:
    files = ("--data", write(folder / "train.jsonl", train), "--holdout", write(folder / "test.jsonl", other))
    return main(["inspect", str(path), "--audit", *files, "--json", str(folder / "out.json"), "--engine", "transformers", *more])


def result(folder: Path) -> Any:
    return json.loads((folder / "out.json").read_text())


def test_the_command_says_what_the_verdicts_give_away(loaded: kit.Kit, tiny_kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audited(tmp_path, tiny_kit, task_rows(60), task_rows(80)[60:]) == 0
    found, told = result(tmp_path), capsys.readouterr()
    assert (found["members"], found["others"], found["seeds_left_out"], found["synthetic"]) == (55, 20, 5, None)
    engine = TransformersEngine(loaded.base)
    judged = split(loaded, rows(0, 60), rows(60, 80), "a", "b").judged
    plain = [verdicts(engine, "colours", texts, loaded.discriminator_adapter) for texts in (judged, [row.input for row in rows(60, 80)])]
    engine.close()
    assert found["discriminator"]["members"] == len(judged)
    assert found["discriminator"]["auc"] == pytest.approx(auc(*plain)[0], abs=0.02)
    assert "test.jsonl has 20 rows to test with: an AUC of 0.5 would have an interval of 0.35 to 0.65" in told.err
    assert "wants a run" in told.err and "without 5 seeds" in told.out
    texts = (tmp_path / "out.json").read_text() + told.out
    assert not [row["input"] for row in task_rows(80) if row["input"] in texts]


def test_a_discriminator_that_knows_its_rows_by_heart_is_found(loaded: kit.Kit, tmp_path: Path) -> None:
    """Rows, negatives and others are all of one kind: only who was there tells them apart."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(72)]
    members, negatives, others = texts[:24], texts[24:48], texts[48:]
    pairs = [(discriminator_prompt("colours", text), answer) for side, answer in ((members, YES), (negatives, NO)) for text in side]
    train_adapter(loaded.base, pairs, lora(16, 32.0), Training(epochs=25, learning_rate=0.01), 0, tmp_path / "judge", lambda step: None)
    leaking = replace(loaded, discriminator_adapter=AdapterRef("judge", str(tmp_path / "judge")))
    with Display() as display:
        found = on_discriminator(leaking, Sides(members, others, members, 0, True), lambda base, used: TransformersEngine(base), display)
    assert found["low"] > 0.5 and "evidence of a membership leak" in found["judgement"]


def test_without_a_discriminator_that_half_is_left_out(tiny_kit: Path, tmp_path: Path, loaded: kit.Kit, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "kit"
    made = ["prepare", str(write_task(tmp_path / "task")), "--base", loaded.base, "--adapter", str(tiny_kit / "adapter"), "--no-discriminator"]
    assert main([*made, "--out", str(bare), "--engine", "transformers"]) == 0
    assert audited(tmp_path, bare, task_rows(60), task_rows(100)[60:]) == 0
    assert result(tmp_path)["discriminator"] is None
    assert "has no discriminator: that half of the audit is left out" in capsys.readouterr().err


def test_bad_commands_end_in_one_line(tiny_kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert main(["inspect", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    there, absent = write(tmp_path / "rows.jsonl", task_rows(60)), str(tmp_path / "absent.jsonl")
    assert "--holdout with others" in fails(str(tiny_kit), "--audit", "--data", there)
    assert "belong to inspect --audit" in fails(str(tiny_kit), "--data", there)
    assert "absent.jsonl can not be read" in fails(str(tiny_kit), "--audit", "--data", there, "--holdout", absent)
    assert "is not a transfer kit" in fails(str(tmp_path), "--audit", "--data", there, "--holdout", there)
    assert "lies in none" in fails(str(tiny_kit), "--audit", "--data", there, "--holdout", there, "--json", str(tmp_path / "no" / "out.json"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "is not a finished run" in fails(str(tmp_path / "run"), "--audit", "--data", there, "--holdout", there)
