"""Whole transfers on a real local Ray with tiny models: undisturbed, killed, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import own, processes, task_rows, write_task
from tests.ray.conftest import answers, arguments, checkpoints, has_checkpoint, rows, same_weights
from translora_ray.adapters import digest, inspect
from translora_ray.cli import main
from translora_ray.storage import RunStore
from translora_ray.training import trainer

pytestmark = pytest.mark.ray


def kill_when(command: list[str], ready: Callable[[], bool], log: Path) -> None:
    """Start the command in a process group of its own and SIGKILL its driver once `ready`."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "translora_ray.cli", *command], stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 180
        while not ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_the_adapter_is_an_ordinary_peft_directory(calm: Path, tiny_gemma: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert sorted(path.name for path in (calm / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((calm / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, tiny_gemma)
    base = AutoModelForCausalLM.from_pretrained(tiny_gemma)
    ids = torch.tensor([[5, 6, 7]])
    bare = base(ids).logits
    assert not torch.equal(bare, PeftModel.from_pretrained(base, calm / "adapter")(ids).logits)


def test_the_manifest_accounts_for_every_candidate(calm: Path) -> None:
    manifest = json.loads((calm / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["accepted"] == counts["quota"] == 40
    assert counts["candidates"] == counts["accepted"] + sum(counts["rejects"].values()) == len(rows(calm))
    assert [len(loads) for loads in counts["engine_loads"].values()] == [1]
    assert manifest["training"]["rows"] == 40
    assert len(manifest["training"]["epoch_losses"]) == 8
    assert set(manifest["seconds"]) == {"generator", "discriminator", "teacher", "training"}
    assert not (calm / "train").exists()
    assert [step for step, _ in manifest["training"]["loss_curve"]] == list(range(1, 81))  # every step of so few
    assert f"of {counts['candidates']} candidates accepted" in (calm / "report.html").read_text()


def test_accepted_rows_are_new_and_answered(calm: Path, tiny_kit: Path) -> None:
    seeds = {json.loads(line)["input"] for line in (tiny_kit / "seeds.jsonl").read_text().splitlines()}
    accepted = [row for row in rows(calm) if row.accepted]
    assert len({row.input for row in accepted}) == 40
    assert not seeds & {row.input for row in accepted}
    assert all(row.target and row.verdict is not None for row in accepted)


def test_a_finished_run_is_left_alone(calm: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in calm.rglob("*")}
    assert main(arguments(tiny_kit, tiny_gemma, calm)) == 0
    assert {path: path.stat().st_mtime_ns for path in calm.rglob("*")} == before


def test_killed_in_the_stream_and_in_training_the_rows_and_the_adapter_are_the_same(calm: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(tiny_kit, tiny_gemma, run)
    kill_when(command, lambda: len(list(run.glob("shards/*.parquet"))) >= 2, tmp_path / "stream.log")
    committed = rows(run)
    assert 0 < sum(row.accepted for row in committed) < 40
    kill_when(command, lambda: has_checkpoint(run), tmp_path / "training.log")
    assert not (run / "adapter").exists()
    assert not list((run / "train").rglob("*snapshot*")), "Ray Train keeps no list of checkpoints, which a kill could cut off"
    assert main(command) == 0
    assert rows(run)[: len(committed)] == committed
    assert rows(run) == rows(calm)
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (run, calm)]
    assert len(manifests[0]["counts"]["engine_loads"]) == 2
    assert manifests[0]["training"]["started_at_steps"][0] == 0 < manifests[0]["training"]["started_at_steps"][-1]
    assert manifests[0]["training"]["epoch_losses"] == pytest.approx(manifests[1]["training"]["epoch_losses"], rel=1e-3)
    same_weights(run, calm)


def test_workers_killed_more_often_than_ray_replaces_them_go_on_inside_the_epoch_with_the_base_spread_over_two(
    calm: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "MAX_FAILURES", 1)
    undisturbed, run, short = tmp_path / "undisturbed", tmp_path / "run", "training.epochs=2"
    identity = json.loads((calm / "run.json").read_text())
    identity["recipe"]["training"]["epochs"] = 2  # a checkpoint after each step takes time
    for place in (undisturbed, run):
        place.mkdir()
        shutil.copytree(calm / "shards", place / "shards")  # the same rows, trained again
        (place / "run.json").write_text(json.dumps(identity))
    assert main(arguments(tiny_kit, tiny_gemma, undisturbed, short)) == 0
    killed: list[int] = []

    def kill_a_worker_twice() -> None:
        before: set[int] = set()
        for _ in range(2):
            while len(workers := set(own(processes(b"ray::RayTrainWorker"))) - before) < 2:
                time.sleep(0.02)
            known = checkpoints(run)
            while not has_checkpoint(run) or checkpoints(run) == known:
                time.sleep(0.02)
            before |= workers
            killed.append(min(workers))
            os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker_twice, daemon=True)
    thread.start()
    two = ("cluster.workers=2", "cluster.spread_base=true", "cluster.checkpoint_seconds=0", "cluster.worker_cpus=0.5")
    assert main(arguments(tiny_kit, tiny_gemma, run, short, *two)) == 0
    thread.join(5)
    assert len(killed) == 2
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (run, undisturbed)]
    first, again, last = manifests[0]["training"]["started_at_steps"]
    assert first == 0 < again < last and again % 10  # 10 steps an epoch
    assert manifests[0]["training"]["tokens"] == manifests[1]["training"]["tokens"]  # no row twice, none left out
    assert manifests[0]["training"]["epoch_losses"] == pytest.approx(manifests[1]["training"]["epoch_losses"], rel=1e-3)
    same_weights(run, undisturbed)


def test_a_loss_that_is_not_a_number_stops_the_run_names_the_step_and_leaves_the_checkpoint_before_it(
    tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments(tiny_kit, tiny_gemma, run, "training.learning_rate=1e30", "selection.quota=8", "cluster.checkpoint_seconds=0")) == 1
    assert "is not a number in step 2 (epoch 1, rows" in capsys.readouterr().err
    assert has_checkpoint(run)
    assert not (run / "adapter").exists()
    assert main(arguments(tiny_kit, tiny_gemma, run, "training.learning_rate=0.01", "selection.quota=8")) == 0  # as it was told
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["recipe"]["training"]["learning_rate"], manifest["training"]["started_at_steps"]) == (0.01, [0])
    assert len(manifest["counts"]["engine_loads"]) == 1, "what was streamed stays"
    assert main(arguments(tiny_kit, tiny_gemma, run, "training.learning_rate=0.02", "selection.quota=8")) == 2
    assert "training.learning_rate is 0.01 there and 0.02 here" in capsys.readouterr().err


def test_another_type_of_adapter_by_the_better_of_two_learning_rates(
    tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    wanted = ("adapter.type=prompt_tuning", "adapter.virtual_tokens=4", "training.held_out=0.2", "training.learning_rates=[1e-6, 0.02]")
    assert main(arguments(tiny_kit, tiny_gemma, run, *wanted, "selection.quota=15", "training.epochs=2")) == 0
    told = capsys.readouterr().err
    assert "target adapter: prompt tuning, 4 virtual tokens" in told and "vLLM can not serve" in told
    assert inspect(run / "adapter").virtual_tokens == 4
    training = json.loads((run / "manifest.json").read_text())["training"]
    assert training["rows"] == 12
    assert training["learning_rate"] == 0.02
    slow, fast = (trial["held_out_losses"] for trial in training["trials"])
    assert len(slow) == len(fast) == 2 and min(fast) < min(slow)
    assert training["held_out_losses"] == fast
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(64)[60:]))
    assert main(["evaluate", str(run), "--data", str(tmp_path / "test.jsonl"), "--engine", "transformers"]) == 0


def test_an_engine_that_dies_is_replaced_and_no_row_changes(calm: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed: list[int] = []

    def kill_the_engine_once() -> None:
        while not any(run.glob("shards/*.parquet")):
            time.sleep(0.05)
        killed.extend(own(processes(b"ray::MapWorker")))
        for actor in killed:
            os.kill(actor, signal.SIGKILL)

    thread = threading.Thread(target=kill_the_engine_once, daemon=True)
    thread.start()
    assert main(arguments(tiny_kit, tiny_gemma, run, "training.epochs=1")) == 0
    thread.join(5)
    assert len(killed) == 1
    assert rows(run) == rows(calm)
    (loads,) = json.loads((run / "manifest.json").read_text())["counts"]["engine_loads"].values()
    assert len(loads) == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    from translora_ray.errors import UsageError

    store = RunStore(str(tmp_path / "run"))
    with store.lock(), pytest.raises(UsageError, match="being written by another process"), RunStore(store.uri).lock():
        pass


def test_two_pools_two_workers_and_two_generators_that_take_turns(tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a random base hardly ever ends a line unless its choice is nearly uniform
    more = (
        "synthesis.generator=[source, target]",
        "synthesis.by_label=true",
        "synthesis.temperature=20.0",
        "selection.quota=21",
        "cluster.workers=2",
        "cluster.engine_cpus=0.5",
        "training.epochs=1",
    )
    assert main(arguments(tiny_kit, tiny_gemma, run, *more)) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    (loads,) = manifest["counts"]["engine_loads"].values()
    assert sorted(loads) == sorted([manifest["source_base"], manifest["target_base"]])
    assert manifest["training"]["rows"] == 21
    counts = manifest["counts"]
    for kind in ("candidates", "accepted"):
        assert sum(each[kind] for each in counts["generators"].values()) == counts[kind]
    assert all(each["accepted"] for each in counts["generators"].values())
    assert "Generators, which took turns" in (run / "report.html").read_text()
    alone = tmp_path / "alone"  # the same shards, trained by one worker: the same adapter
    shutil.copytree(run / "shards", alone / "shards")
    shutil.copy(run / "run.json", alone)
    assert main(arguments(tiny_kit, tiny_gemma, alone, *more, "cluster.workers=1")) == 0
    assert json.loads((alone / "manifest.json").read_text())["training"]["loss"] == pytest.approx(manifest["training"]["loss"], rel=1e-3)
    same_weights(run, alone)


def test_a_generator_adapter_writes_on_the_engine_of_the_others(tiny_kit: Path, tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    task = write_task(tmp_path, generator_adapter=True, generator_training={"epochs": 25, "learning_rate": 0.01})
    made = ["prepare", str(task), "--base", tiny_llama, "--adapter", str(tiny_kit / "adapter"), "--out", str(tmp_path / "kit")]
    assert main([*made, "--engine", "transformers"]) == 0
    assert main(arguments(tmp_path / "kit", tiny_gemma, tmp_path / "run", "synthesis.generator=adapter", "selection.quota=12", "training.epochs=1")) == 0
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert [len(loads) for loads in counts["engine_loads"].values()] == [1]
    assert counts["generators"] == {"adapter": {"candidates": counts["candidates"], "accepted": 12}}
    colours = {word for row in task_rows(8) for word in row["input"].split()}
    assert sum(bool(colours & set(row.input.split())) for row in rows(tmp_path / "run") if row.accepted) >= 8  # of 12; the base alone writes none


def test_a_finished_run_stands_for_a_kit_and_the_teacher_is_its_adapter(tiny_kit: Path, tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(arguments(tiny_kit, tiny_gemma, out, "training.learning_rate=0.01")) == 0  # learns to end its answers, as a teacher must
    first = json.loads((out / "manifest.json").read_text())
    command = arguments(out, tiny_llama, back, "selection.quota=8", "training.epochs=1", "cluster.engine_cpus=0.5")
    assert main(command) == 0
    manifest = json.loads((back / "manifest.json").read_text())
    assert (manifest["source_base"], manifest["target_base"]) == (tiny_gemma, tiny_llama)
    assert manifest["lineage"] == [digest(tiny_kit / "adapter"), first["adapter_digest"]]
    assert first["lineage"] == manifest["lineage"][:1]
    (loads,) = manifest["counts"]["engine_loads"].values()
    assert sorted(loads) == sorted([tiny_llama, tiny_gemma])
    written = {row.index: row.input for row in rows(out)}
    assert all(row.input == written[row.index] for row in rows(back) if row.index in written)  # the kit's own base and seeds wrote them
    accepted = [row for row in rows(back) if row.accepted]
    right = [row.target == answer for row, answer in zip(accepted, answers(tiny_gemma, out / "adapter", [row.input for row in accepted]), strict=True)]
    assert sum(right) >= 7  # of 8; in bf16 a batch may break a tie
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(64)[60:]))
    assert main(["evaluate", str(back), "--data", str(tmp_path / "test.jsonl"), "--engine", "transformers"]) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [("cluster.worker_gpus=1", "The training workers ask for 1 GPU, the cluster has 0"), ("cluster.engine_cpus=999", "The engines ask for 999 CPU")],
)
def test_more_than_the_cluster_has_is_said_before_anything_is_made(
    tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert main(arguments(tiny_kit, tiny_gemma, tmp_path / "run", setting)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


OVERLAP = ("overlap=true", "cluster.engine_cpus=0.5", "cluster.worker_cpus=0.5", "selection.quota=160", "synthesis.pack_size=4", "training.epochs=2")


def test_overlapped_training_begins_before_the_stream_ends_and_a_kill_changes_nothing(tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    assert main(arguments(tiny_kit, tiny_gemma, calm, *OVERLAP)) == 0
    often = arguments(tiny_kit, tiny_gemma, run, *OVERLAP, "cluster.checkpoint_seconds=0")
    kill_when(often, lambda: has_checkpoint(run), tmp_path / "first.log")
    assert 0 < sum(row.accepted for row in rows(run)) < 160
    assert main(arguments(tiny_kit, tiny_gemma, run, *OVERLAP)) == 0
    assert rows(run) == rows(calm)
    trained = [json.loads((place / "manifest.json").read_text())["training"] for place in (run, calm)]
    assert trained[0]["started_at_steps"][-1] > 0
    learnt = [f"Q: {row.input}\nA: {row.target}" for row in rows(calm) if row.accepted]  # what training after the stream takes; a token for each character
    assert trained[0]["rows"] == 160 and trained[0]["tokens"] == trained[1]["tokens"] == 2 * sum(len(text) + 1 for text in learnt)
    assert trained[0]["epoch_losses"] == pytest.approx(trained[1]["epoch_losses"], rel=1e-3)
    same_weights(run, calm)


def test_overlapped_training_ends_with_a_stream_that_fails(tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(arguments(tiny_kit, tiny_gemma, run, *OVERLAP, "selection.max_candidates=1")) == 1
    assert "of 160 examples after 160 candidates" in capsys.readouterr().err
    assert not (run / "adapter").exists()
