"""The audit of a real run of tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import task_rows
from tests.ray.conftest import rows
from translora_ray.cli import main
from translora_ray.stream.dedup import normal

pytestmark = pytest.mark.ray


def test_the_audit_of_a_run_compares_its_prompts_with_rows(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, part in (("train", task_rows(60)), ("test", task_rows(100)[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    command = ["inspect", str(calm), "--audit", "--data", str(tmp_path / "train.jsonl"), "--holdout", str(tmp_path / "test.jsonl")]
    assert main([*command, "--engine", "transformers", "--json", str(tmp_path / "out.json")]) == 0
    found, told = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    accepted = {normal(row.input) for row in rows(calm) if row.accepted}
    assert (found["rows_known"], found["synthetic"]["prompts"]) == (True, len(accepted)) and found["discriminator"]["auc"] >= 0
    assert found["synthetic"]["copies"]["members"]["exact"] == len(accepted & {normal(row["input"]) for row in task_rows(60)})
    assert "edit similarity" in told and "copies a row that was learnt from" in told
    assert "nearest" not in found["synthetic"]
    assert main([*command, "--engine", "transformers", "--pairs", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["synthetic"]["nearest"]) == 5
