"""The whole way on the two packaged real models, short: a handful of rows and steps, so accuracy says nothing here."""

import json
from pathlib import Path

import pytest
import yaml

from translora_ray import models
from translora_ray.cli import main
from translora_ray.gating import likeness
from translora_ray.storage import RunStore

pytestmark = pytest.mark.real
SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
ENGINE = ("--engine", "transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "support_routing"


def test_packaged_models_are_what_they_should_be() -> None:
    source, target = models.describe(SOURCE), models.describe(TARGET)
    assert (source.family, source.parameters, source.vocabulary, source.chat_template) == ("llama", 134_515_008, 49_152, True)
    assert (target.family, target.parameters, target.vocabulary, target.chat_template) == ("gemma3_text", 268_098_176, 262_144, False)
    assert models.pair_obstacle(source, target, "text") is None
    assert "has no chat template" in (models.pair_obstacle(source, target, "chat") or "")


def test_prepare_transfer_and_evaluate(tmp_path: Path) -> None:
    lines = (EXAMPLE / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:32]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[40:56]))
    task = yaml.safe_load((EXAMPLE / "task.yaml").read_text()) | {"source_training": {"epochs": 2}, "discriminator_training": {"epochs": 1}, "labels": "open"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    kit, run = tmp_path / "kit", tmp_path / "run"
    assert main(["prepare", str(tmp_path / "task.yaml"), "--base", SOURCE, "--out", str(kit), *ENGINE]) == 0
    settings = ["--set", "selection.quota=12", "--set", "selection.threshold=-100", "--set", "training.epochs=1", "--set", "synthesis.pack_size=16"]
    code = main(["transfer", str(kit), "--target", TARGET, "--out", str(run), *settings, *ENGINE])
    manifest = json.loads((run / "manifest.json").read_text())
    assert code == int(manifest["gate"]["verdict"] == "refuse")
    assert (manifest["counts"]["trained"], manifest["counts"]["held_out"], manifest["training"]["rows"]) == (12, 2, 12)
    judged = [row for row in RunStore(str(run)).candidates() if row.accepted][:12]
    (found,) = (check["value"] for check in manifest["gate"]["checks"] if "real prompts" in check["name"])
    assert found == likeness(json.loads((kit / "kit.json").read_text())["discriminator"], judged)["likeness"]
    assert main(["inspect", str(run)]) == 0
    assert main(["evaluate", str(run), "--data", str(tmp_path / "test.jsonl"), "--json", str(tmp_path / "result.json"), *ENGINE]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["arms"]) == ["source_base", "source_adapter", "target_base", "target_few_shot", "transferred"]
    assert result["n"] == 16
    assert result["arms"]["target_base"]["accuracy"] == 0
