"""The whole way on the two packaged real models, short: a handful of rows and steps, so accuracy says nothing here."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import free_port
from tests.serving import running
from translora_ray import models
from translora_ray.cli import main
from translora_ray.gating import likeness
from translora_ray.storage import RunStore

pytestmark = pytest.mark.real
SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
EXAMPLE = Path(__file__).parents[2] / "examples" / "support_routing"


def test_packaged_models_are_what_they_should_be() -> None:
    source, target = models.describe(SOURCE), models.describe(TARGET)
    assert (source.family, source.parameters, source.vocabulary, source.chat_template) == ("llama", 134_515_008, 49_152, True)
    assert (target.family, target.parameters, target.vocabulary, target.chat_template) == ("gemma3_text", 268_098_176, 262_144, False)
    assert models.pair_obstacle(source, target, "text") is None
    assert "has no chat template" in (models.pair_obstacle(source, target, "chat") or "")


def moved(folder: Path, engine: str, *more: str) -> dict[str, Any]:
    """The manifest of a transfer from `folder`/kit to `folder`/run, whose evaluation has the arms that it should have."""
    lines = (EXAMPLE / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:32]))
    (folder / "test.jsonl").write_text("\n".join(lines[40:56]))
    task = yaml.safe_load((EXAMPLE / "task.yaml").read_text()) | {"source_training": {"epochs": 2}, "discriminator_training": {"epochs": 1}, "labels": "open"}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    kit, run, result = folder / "kit", folder / "run", folder / "result.json"
    assert main(["prepare", str(folder / "task.yaml"), "--base", SOURCE, "--out", str(kit), "--engine", engine]) == 0
    settings = ["selection.quota=12", "training.epochs=1", "synthesis.pack_size=16", *more]
    words = [part for setting in settings for part in ("--set", setting)]
    code = main(["transfer", str(kit), "--target", TARGET, "--out", str(run), *words, "--engine", engine])
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    assert code == int(manifest["gate"]["verdict"] == "refuse")
    assert main(["evaluate", str(run), "--data", str(folder / "test.jsonl"), "--json", str(result), "--engine", engine]) == 0
    evaluation = json.loads(result.read_text())
    assert list(evaluation["arms"]) == ["source_base", "source_adapter", "target_base", "target_few_shot", "transferred"]
    assert (evaluation["n"], evaluation["arms"]["target_base"]["accuracy"]) == (16, 0)
    return manifest


def test_from_rows_to_a_comparison(tmp_path: Path) -> None:
    manifest = moved(tmp_path, "transformers", "selection.method=discriminator", "selection.threshold=-100")
    assert (manifest["counts"]["trained"], manifest["counts"]["held_out"], manifest["training"]["rows"]) == (12, 2, 12)
    judged = [row for row in RunStore(str(tmp_path / "run")).candidates() if row.accepted][:12]
    (found,) = (check["value"] for check in manifest["gate"]["checks"] if "real prompts" in check["name"])
    assert found == likeness(json.loads((tmp_path / "kit" / "kit.json").read_text())["discriminator"], judged)["likeness"]
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert main(["publish", str(tmp_path / "kit"), str(tmp_path / "registry"), "--reviewed", "--channel", "stable"]) == 0
    with running(str(tmp_path / "registry"), "--port", str(free_port())) as service:
        assert service.url(), "it is ready"
        (line,) = [line for line in service.lines if line.startswith("  curl ")]
        answer = json.loads(subprocess.run(line, shell=True, capture_output=True, check=True).stdout)
    assert (answer["model"], answer["usage"]["completion_tokens"] > 0) == ("support_routing@1", True)
