"""An adapter as it is exported, evaluated by lm-eval's own command: the same accuracy as plain transformers and peft."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import task_rows
from tests.ray.conftest import answers

LM_EVAL = Path(sys.executable).with_name("lm_eval")
EXAMPLE = Path(__file__).parents[2] / "examples" / "support_routing"


def test_the_example_asks_what_the_task_asks() -> None:
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (EXAMPLE / "task.yaml", EXAMPLE / "lm_eval" / "support_routing.yaml"))
    assert theirs["doc_to_text"] == ours["prompt"].replace("{input}", "{{input}}")
    assert theirs["generation_kwargs"]["max_gen_toks"] == ours["max_new_tokens"]
    assert (EXAMPLE.parents[1] / theirs["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_lm_eval_takes_an_exported_adapter_unchanged(tiny_llama: str, tiny_kit: Path, tmp_path: Path) -> None:
    rows = task_rows(90)[60:]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((EXAMPLE / "lm_eval" / "support_routing.yaml").read_text())
    task |= {"task": "colours", "doc_to_text": "Q: {{input}}\nA:", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    task["generation_kwargs"]["max_gen_toks"] = 4
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    accuracies = {}
    for name, adapter in (("bare", None), ("adapted", tiny_kit / "adapter")):
        arguments = f"pretrained={tiny_llama},dtype=float32" + (f",peft={adapter}" if adapter else "")
        command = [str(LM_EVAL), "--model", "hf", "--model_args", arguments, "--tasks", "colours", "--include_path", str(tmp_path)]
        places = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, "--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / name)],
            env=os.environ | places,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (result,) = (tmp_path / name).rglob("results_*.json")
        accuracies[name] = json.loads(result.read_text())["results"]["colours"]["exact_match,stripped"]
        plain = answers(tiny_llama, adapter, [row["input"] for row in rows])
        assert accuracies[name] == pytest.approx(sum(answer == row["target"] for answer, row in zip(plain, rows, strict=True)) / len(rows), abs=0.04), name
    assert accuracies["adapted"] > accuracies["bare"] + 0.3
