"""The command line as people meet it: quick help, one clear line for what is wrong, exit 2, nothing written."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import save_model, task_rows, write_task
from translora_ray import models
from translora_ray.cli import main
from translora_ray.engines.select import choose_engine
from translora_ray.errors import UsageError
from translora_ray.reading import load_config
from translora_ray.recipe import Recipe

ROOT = Path(__file__).parents[2]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with exit code 2 and one line; returns the line."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("translora: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", [[], ["prepare"], ["transfer"], ["evaluate"], ["fleet"], ["status"], ["inspect"]])
def test_help_is_quick_and_imports_nothing_heavy(command: list[str]) -> None:
    code = "import sys; from translora_ray.cli import main\ntry: main(sys.argv[1:])\nfinally: assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: translora" in done.stdout
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("command", "engine"), [("prepare", "vllm where it is installed"), ("serve", "transformers")])
def test_help_says_which_engine_is_taken(capsys: pytest.CaptureFixture[str], command: str, engine: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"auto: {engine}" in " ".join(capsys.readouterr().out.split())


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in fails(capsys)
    assert "invalid choice: 'tpu'" in fails(capsys, "prepare", "t.yaml", "--base", "b", "--out", "o", "--engine", "tpu")
    assert "unrecognized arguments: --fast" in fails(capsys, "inspect", "x", "--fast")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"promt": "x"}, "unknown key promt"),
        ({"seeds": "five"}, "seeds: Input should be a valid integer, not 'five'"),
        ({"source_training": {"epoch": 3}}, "unknown key source_training.epoch"),
        ({"metric": "bleu"}, "metric: Input should be 'exact_match'"),
        ({"prompt": "no place for the row"}, "prompt has no {input}"),
        ({"seeds": 99}, "60 rows, fewer than the 99 seeds"),
        ({"metric": "choice"}, "metric choice reads nothing in the target 'a': choose another metric"),
        ({"train": "absent.jsonl"}, "absent.jsonl can not be read: No such file"),
    ],
)
def test_bad_tasks_name_the_key(tmp_path: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], keys: dict[str, object], message: str) -> None:
    task = write_task(tmp_path / "task", **keys)
    assert message in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_bad_files(tmp_path: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path / "task")
    (tmp_path / "task" / "train.jsonl").write_text('{"input": "a", "target": "b"}\nnot json\n')
    assert "train.jsonl, line 2: not valid JSON" in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "kit")
    (tmp_path / "task" / "train.jsonl").write_text('{"input": "a \\ud83d", "target": "b"}\n')
    assert "train.jsonl, line 1: half a surrogate" in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "kit")
    assert "train.jsonl is a file" in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "task" / "train.jsonl" / "kit")
    task.write_text("name: 2024-99-99")
    assert "is not valid YAML" in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "kit")
    task.write_text("name: [")
    assert "not valid YAML at line 1" in fails(capsys, "prepare", task, "--base", tiny_llama, "--out", tmp_path / "kit")
    assert "absent.yaml can not be read" in fails(capsys, "prepare", tmp_path / "absent.yaml", "--base", tiny_llama, "--out", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("packaged:gpt-5", "no packaged model gpt-5: choose one of smollm2-135m-instruct, gemma-3-270m"),
        ("/no/such/model", "/no/such/model can not be found"),
        ("absent.gguf", "absent.gguf does not exist"),
    ],
)
def test_models_that_are_not_there(tmp_path: Path, tiny_kit: Path, capsys: pytest.CaptureFixture[str], reference: str, message: str) -> None:
    assert message in fails(capsys, "prepare", write_task(tmp_path / "task"), "--base", reference, "--out", tmp_path / "kit")
    assert message in fails(capsys, "transfer", tiny_kit, "--target", reference, "--out", tmp_path / "run")
    assert message in fails(capsys, "inspect", reference)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_adapters_that_do_not_fit(tmp_path: Path, tiny_kit: Path, tiny_llama: str, tiny_gemma: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path / "task")
    message = fails(capsys, "prepare", task, "--base", tiny_gemma, "--adapter", tiny_kit / "adapter", "--out", tmp_path / "kit")
    assert "name the base it was trained on" in message
    assert "is not an adapter" in fails(capsys, "prepare", task, "--base", tiny_gemma, "--adapter", tmp_path / "task", "--out", tmp_path / "kit")
    broken = Path(shutil.copytree(tiny_kit / "adapter", tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    assert "is corrupt" in fails(capsys, "prepare", task, "--base", tiny_llama, "--adapter", broken, "--out", tmp_path / "kit")
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    assert "holds pickled weights" in fails(capsys, "prepare", task, "--base", tiny_llama, "--adapter", broken, "--out", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "unknown key training.epoch"),
        ("adapter.type=lokr", "adapter.type: Input should be 'lora', 'rslora', 'dora', 'prompt_tuning' or 'ia3', not 'lokr'"),
        ("adapter.rank=0", "adapter.rank: Input should be greater than or equal to 1"),
        ("training.epochs=many", "training.epochs: Input should be a valid integer, not 'many'"),
        ("training", "write key=value"),
        ("seed.x.y=1", "seed: Input should be a valid integer"),
        ("cluster.gpus=1", "unknown key cluster.gpus"),
        ("cluster.engines=[2, 1]", "cluster.engines: the least must be 1 or more"),
        ("cluster.engines=[0, 1]", "cluster.engines: the least must be 1 or more"),
        ("cluster.expect={cpu: 4}", "unknown key cluster.expect.0.cpu"),
        ("cluster.expect=[]", "cluster.expect: List should have at least 1 item"),
        ("selection.threshold=.nan", "selection.threshold: Input should be a finite number"),
        ("synthesis.generator=both", "synthesis.generator.0: Input should be 'source', 'target' or 'adapter', not 'both'"),
        ("synthesis.generator=[]", "synthesis.generator: Tuple should have at least 1 item"),
        ("synthesis.generator=[target, target]", "synthesis.generator: name each generator once"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path: Path, tiny_kit: Path, tiny_gemma: str, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    arguments = ("transfer", tiny_kit, "--target", tiny_gemma, "--out", tmp_path / "run", "--set", override)
    assert message in fails(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_directories_that_are_something_else(tmp_path: Path, tiny_kit: Path, tiny_gemma: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a transfer kit" in fails(capsys, "transfer", tmp_path, "--target", tiny_gemma, "--out", tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    assert "is not empty and not a run" in fails(capsys, "transfer", tiny_kit, "--target", tiny_gemma, "--out", tmp_path)
    assert "is not a finished run" in fails(capsys, "evaluate", tmp_path, "--data", tmp_path / "file")
    assert "exists already" in fails(capsys, "prepare", write_task(tmp_path / "task"), "--base", tiny_gemma, "--out", tmp_path)


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(tmp_path: Path, tiny_kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = save_model(tmp_path / "twin", "llama", seed=7)
    arguments = ("prepare", write_task(tmp_path / "task"), "--base", twin, "--adapter", tiny_kit / "adapter", "--out", tmp_path / "kit")
    assert "which is not " + twin in fails(capsys, *arguments)


def test_a_base_that_is_not_whole_is_found_before_anything_starts(tmp_path: Path, tiny_kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(save_model(tmp_path / "base", "llama"))
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    arguments = ("transfer", tiny_kit, "--target", base, "--out", tmp_path / "run")
    assert "model.safetensors can not be read" in fails(capsys, *arguments)
    weights.write_bytes(whole)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors can not be read" in fails(capsys, *arguments)
    (base / "config.json").write_text("{")
    assert "has no config.json that can be read" in fails(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_in_a_job_nothing_is_written_to_its_temporary_directory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    task = write_task(tmp_path / "task")
    assert "--out kit would lie in the job's temporary" in fails(capsys, "prepare", task, "--base", "x", "--out", "kit")
    assert "KIT kit would lie in the job's temporary" in fails(capsys, "transfer", "kit", "--target", "x", "--out", "/run")
    assert "--out run would lie in the job's temporary" in fails(capsys, "transfer", "/kit", "--target", "x", "--out", "run")
    assert "--json x.json would lie in the job's temporary" in fails(capsys, "evaluate", "/run", "--data", "d", "--json", "x.json")


def test_kits_that_were_changed_are_refused(tmp_path: Path, tiny_kit: Path, tiny_gemma: str, capsys: pytest.CaptureFixture[str]) -> None:
    kit = Path(shutil.copytree(tiny_kit, tmp_path / "kit"))
    shutil.copy(kit / "discriminator" / "adapter_model.safetensors", kit / "adapter")
    assert "is not the adapter that kit.json describes" in fails(capsys, "inspect", kit)
    facts = json.loads((kit / "kit.json").read_text())
    (kit / "kit.json").write_text(json.dumps(facts | {"discriminator": None}))
    assert "was changed after it was made" in fails(capsys, "inspect", kit)
    (kit / "kit.json").write_text(json.dumps(facts | {"task": facts["task"] | {"newer": 1}}))
    assert "is damaged" in fails(capsys, "inspect", kit)
    (kit / "kit.json").write_text("{}")
    assert "is damaged" in fails(capsys, "transfer", kit, "--target", tiny_gemma, "--out", tmp_path / "run")


def test_vllm_is_refused_in_one_line_where_it_is_not_installed(
    tmp_path: Path, tiny_kit: Path, tiny_gemma: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("translora_ray.engines.select.find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    with pytest.raises(UsageError, match="vLLM is not installed"):
        choose_engine("vllm")
    arguments = ("transfer", tiny_kit, "--target", tiny_gemma, "--out", tmp_path / "run", "--engine", "vllm")
    assert "use --engine transformers" in fails(capsys, *arguments)


def test_the_cluster_is_not_part_of_the_identity() -> None:
    one = load_config(None, [])
    many = load_config(None, ["cluster.workers=8", "cluster.engines=[2, 16]"])
    assert one.recipe.digest() == many.recipe.digest()
    assert many.cluster.engines == (2, 16)
    assert one.recipe.digest() != Recipe(seed=1).digest()


def test_a_kit_holds_no_row_but_the_seeds(tiny_kit: Path) -> None:
    seeds = {json.loads(line)["input"] for line in (tiny_kit / "seeds.jsonl").read_text().splitlines()}
    content = b"".join(path.read_bytes() for path in tiny_kit.rglob("*") if path.is_file())
    assert len(seeds) == 5
    assert [row["input"] for row in task_rows(60) if row["input"].encode() in content and row["input"] not in seeds] == []
    assert all(seed.encode() in content for seed in seeds)


def test_prepare_reports_accept_rates_of_held_out_rows(tiny_kit: Path) -> None:
    facts = json.loads((tiny_kit / "kit.json").read_text())["discriminator"]
    assert facts["held_out_real"] == facts["held_out_negatives"] == 6
    assert 0 <= facts["true_accept_rate"] <= 1 and 0 <= facts["false_accept_rate"] <= 1
    assert len(facts["real_verdicts"]) == 19 and facts["real_verdicts"] == sorted(facts["real_verdicts"])


def test_prepare_takes_an_adapter_and_leaves_the_discriminator_out(tmp_path: Path, tiny_kit: Path, tiny_llama: str) -> None:
    out = tmp_path / "kit"
    task = str(write_task(tmp_path / "task"))
    assert (
        main(
            ["prepare", task, "--base", tiny_llama, "--adapter", str(tiny_kit / "adapter"), "--no-discriminator", "--out", str(out), "--engine", "transformers"]
        )
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "kit.json", "seeds.jsonl"]
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (tiny_kit / "adapter" / "adapter_model.safetensors").read_bytes()


def test_inspect_says_what_things_are(
    tiny_kit: Path, tiny_llama: str, tiny_gemma: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # tests that run beside each other have longer paths
    for path, words in ((tiny_kit, "transfer kit, sound"), (tiny_kit / "adapter", "14 modules"), (Path(tiny_llama), "llama")):
        assert main(["inspect", str(path)]) == 0
        assert words in capsys.readouterr().out
    assert main(["inspect", tiny_llama, tiny_gemma]) == 0
    pair = capsys.readouterr().out
    assert "can work" in pair and "has no chat" in pair


def test_fingerprints_tell_bases_apart(tiny_llama: str, tiny_gemma: str) -> None:
    assert models.fingerprint(tiny_llama) == models.fingerprint(tiny_llama) != models.fingerprint(tiny_gemma)


def test_shipped_yaml_parses_and_rows_come_from_their_script(tmp_path: Path) -> None:
    from translora_ray.reading import load_task

    example = ROOT / "examples" / "support_routing"
    assert load_task(example / "task.yaml").name == "support_routing"
    load_config(example / "recipe.yaml", [])
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (tmp_path / "make_rows.py").write_text((example / "make_rows.py").read_text())
    subprocess.run([sys.executable, tmp_path / "make_rows.py"], check=True)
    parts = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("train", "test")}
    assert parts == {name: (example / f"{name}.jsonl").read_text() for name in parts}
    train, test = (set(part.splitlines()) for part in parts.values())
    assert (len(train), len(test), len(train & test)) == (200, 300, 0)
