"""Finished runs are compared, gated and refused, on a real local Ray with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import task_rows, write_task
from tests.ray.conftest import accuracy, answers, arguments, rows
from translora_ray.cli import main
from translora_ray.stream.collect import NOT_NEEDED
from translora_ray.stream.dedup import COPIES, normal

pytestmark = pytest.mark.ray


def test_evaluate_measures_every_arm(calm: Path, tiny_kit: Path, tiny_llama: str, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, part in (("test", task_rows(90)[60:]), ("train", task_rows(60))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    rows_of = ["--data", str(tmp_path / "test.jsonl"), "--oracle", str(tmp_path / "train.jsonl")]
    command = ["evaluate", str(calm), *rows_of, "--trainings", "3", "--engine", "transformers", "--json", str(tmp_path / "out.json")]
    assert main(command) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["n"], result["metric"]) == (30, "exact_match")
    assert list(result["arms"]) == ["source_base", "source_adapter", "target_base", "target_few_shot", "transferred", "oracle"]
    sides = {"source": (tiny_llama, tiny_kit / "adapter"), "target": (tiny_gemma, calm / "adapter")}
    names = {("source", False): "source_base", ("source", True): "source_adapter", ("target", False): "target_base", ("target", True): "transferred"}
    for (side, adapted), arm in names.items():
        base, adapter = sides[side]
        assert result["arms"][arm]["accuracy"] == pytest.approx(accuracy(base, adapter if adapted else None, task_rows(90)[60:]), abs=0.04), arm
    assert result["arms"]["source_adapter"]["accuracy"] > result["arms"]["source_base"]["accuracy"] + 0.3
    told = capsys.readouterr()
    assert "target + transferred adapter" in told.out
    for arm in ("transferred", "oracle"):
        first, *others = result["trainings"][arm]
        assert first == result["arms"][arm]["accuracy"] and len(others) == 2
        assert f"{arm} training, once more (2)" in told.err
    assert ", 3 trainings: " in (calm / "report.html").read_text()
    assert set(result["distance"]) == {"filtered", "unfiltered"}
    assert len(result["verdicts"]["real"]) == 30
    assert f"<h2>Verdict: {result['gate']['verdict']}</h2><p>On 30 real rows" in (calm / "report.html").read_text()
    shown = json.loads((calm / "evaluation" / "map.json").read_text())["points"]
    texts = {row.reason in (None, NOT_NEEDED): set[str]() for row in rows(calm)}
    for row in rows(calm):
        if row.input and row.reason not in COPIES:  # of seeds, which are shown themselves
            texts[row.reason in (None, NOT_NEEDED)].add(normal(row.input))
    rejected = texts[False] - texts[True]
    assert {name: len(points) for name, points in shown.items()} == {"seeds": 5, "real": 30, "accepted": 40, "rejected": len(rejected)}
    answered = [json.loads(line) for line in (calm / "evaluation" / "answers.jsonl").read_text().splitlines()]
    for arm, found in result["arms"].items():
        assert found["accuracy"] == pytest.approx(sum(row["scores"][arm] for row in answered) / 30)
        assert all(row["scores"][arm] == float(row["answers"][arm] == row["target"]) for row in answered)


def test_arms_that_are_asked_for_are_trained_and_a_bad_result_exits_with_1(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(90)[60:]))
    command = ["evaluate", str(calm), "--data", str(tmp_path / "test.jsonl"), "--engine", "transformers", "--json", str(tmp_path / "out.json"), "--gate"]
    wanted = ["seeds_only", "unfiltered", "importance", "excess", "both"]
    code = main([*command, "--arms", *wanted])
    result = json.loads((tmp_path / "out.json").read_text())
    assert code == int(result["gate"]["verdict"] == "refuse")
    assert set(result["arms"]) == {"source_base", "source_adapter", "target_base", "target_few_shot", "transferred", *wanted}
    told = capsys.readouterr()
    assert f"verdict on real rows: {result['gate']['verdict']}" in told.out
    assert "importance training" in told.err
    assert main([*command, "--arms", "best"]) == 2
    assert "--arms best: there is no such arm; there are copy, seeds_only" in capsys.readouterr().err
    assert main([*command, "--arms", "copy"]) == 2
    assert "--arms copy:" in capsys.readouterr().err


def test_without_a_discriminator_all_are_trained_on_and_the_gate_decides(
    tiny_llama: str, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["prepare", str(write_task(tmp_path)), "--base", tiny_llama, "--out", str(tmp_path / "kit"), "--no-discriminator", "--engine", "transformers"]
    assert main(made) == 0
    run = tmp_path / "run"
    command = arguments(tmp_path / "kit", tiny_gemma, run, "selection.method=auto", "selection.quota=20", "gate.held_out=0.1", "training.epochs=1")
    code = main(command)
    manifest = json.loads((run / "manifest.json").read_text())
    verdict = manifest["gate"]
    assert (manifest["selection"], manifest["training"]["rows"]) == ("none", 20)
    assert [manifest["counts"][name] for name in ("quota", "trained", "held_out", "left", "accepted")] == [20, 20, 2, 0, 22]
    assert code == int(verdict["verdict"] == "refuse")
    assert f"verdict without real rows: {verdict['verdict']}" in capsys.readouterr().out
    assert f"<h2>Verdict: {verdict['verdict']}</h2><p>Without real rows" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    by_name = {check["name"]: check["value"] for check in verdict["checks"]}
    held_out = [row for row in rows(run) if row.accepted][-2:]
    given = answers(tiny_gemma, run / "adapter", [row.input for row in held_out])
    assert by_name["agreement with the teacher"] == pytest.approx(sum(a == row.target for a, row in zip(given, held_out, strict=True)) / 2, abs=0.5)
    assert main(command) == code  # a finished run says it again
    assert (run / "report.html").exists()


def test_test_rows_that_were_learnt_from_are_refused(calm: Path, tiny_kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [json.loads(line) for line in (tiny_kit / "seeds.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*task_rows(70)[60:], seeds[0]]))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(70)[60:]))
    (tmp_path / "strange.jsonl").write_text(json.dumps({"input": "red 900 blue", "target": "z"}) + "\n")
    command = ["evaluate", str(calm), "--engine", "transformers", "--data"]
    assert main([*command, str(tmp_path / "test.jsonl")]) == 2
    assert "1 of its inputs are among the kit's seeds" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "new.jsonl"), "--oracle", str(tmp_path / "new.jsonl")]) == 2
    assert "10 of its inputs are among --oracle" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "new.jsonl"), "--train", str(tmp_path / "new.jsonl")]) == 2
    assert "10 of its inputs are among --train" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "strange.jsonl")]) == 2
    assert "1 rows have a target that is none of the task's labels, 'z' first" in capsys.readouterr().err
