"""`ray job submit` and `serve deploy` against a real local cluster with token authentication."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.conftest import free_port
from tests.ray.conftest import arguments, token_in
from tests.ray.growing import end
from tests.serving import chat_base, eventually, expected, fetch, finished_run, post
from translora_ray.fleet.lease import holder
from translora_ray.registry import Registry
from translora_ray.serving.auth import add_key
from translora_ray.storage import RunStore

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(dashboard address, environment with the token) of a head node that ends with the tests."""
    environment = {**os.environ, **token_in(tmp_path_factory.mktemp("secret")), "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    temp = tmp_path_factory.mktemp("r", numbered=True)
    dashboard = free_port()
    command = [RAY, "start", "--head", "--num-cpus=4", f"--port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    folder = short(temp)
    head = subprocess.Popen([*command, f"--temp-dir={folder}", "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(dashboard, head)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        end(head, folder)


def short(folder: Path) -> Path:
    """A short name for a folder: Ray's socket paths must stay below 108 characters."""
    link = Path(f"/tmp/translora-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return link


def wait_for(port: int, head: subprocess.Popen[bytes]) -> None:
    import time

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail("the dashboard did not come up")


def test_a_submitted_transfer_ends_succeeded_with_the_same_layout(cluster: tuple[str, dict[str, str]], tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    address, environment = cluster
    run = tmp_path / "run"
    command = arguments(tiny_kit, tiny_gemma, run, "selection.quota=16", "training.epochs=1")[1:]
    entry = [sys.executable, "jobs/transfer.py", *command]
    submit = [RAY, "job", "submit", "--address", address, "--submission-id", "transfer-test", "--working-dir", str(ROOT)]
    done = subprocess.run([*submit, "--", *entry], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    status = subprocess.run([RAY, "job", "status", "--address", address, "transfer-test"], env=environment, capture_output=True, text=True, check=True)
    assert "SUCCEEDED" in (status.stdout + status.stderr).upper()
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == [
        "adapter",
        "manifest.json",
        "report.html",
        "run.json",
        "shards",
        "train.json",
    ]
    assert sorted(path.name for path in (run / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stranger = {**environment, **token_in(tmp_path), "HOME": str(tmp_path)}
    refused = subprocess.run([RAY, "job", "list", "--address", address], env=stranger, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_a_submitted_fleet_is_stopped_and_tells_its_counts_where_it_failed(
    cluster: tuple[str, dict[str, str]], tiny_kit: Path, tiny_gemma: str, tmp_path: Path
) -> None:
    address, environment = cluster
    selection = {"quota": 160, "method": "discriminator", "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200}
    synthesis = {"pack_size": 16, "temperature": 1.0, "min_p": 0.0, "max_tokens": 60}
    recipe = {"selection": selection, "synthesis": synthesis, "training": {"epochs": 1}, "gate": {"held_out": 0}}
    fleet = {"out": str(tmp_path / "fleet"), "kits": [str(tmp_path / "absent"), str(tiny_kit)], "target": tiny_gemma, "recipe": recipe}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({**fleet, "cluster": {"commit_seconds": 0}}))
    entry = [sys.executable, "jobs/fleet.py", str(tmp_path / "fleet.yaml"), "--resume", "--engine", "transformers"]

    def job(*words: str) -> tuple[int, str]:
        command = [RAY, "job", words[0], "--address", address, *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr

    def submit(name: str, *options: str) -> tuple[int, str]:
        return job("submit", "--submission-id", name, "--working-dir", str(ROOT), *options, "--", *entry)

    code, told = submit("fleet-ended", "--no-wait")
    assert code == 0, told
    assert eventually(lambda: any(tmp_path.glob("fleet/runs/*/shards/*.parquet"))), job("logs", "fleet-ended")
    code, told = job("stop", "fleet-ended")
    assert code == 0 and "was stopped" in told, told
    kept = {shard: shard.read_bytes() for shard in tmp_path.glob("fleet/runs/*/shards/*.parquet")}
    assert "what was under way is committed" in job("logs", "fleet-ended")[1]
    assert holder(RunStore(str(tmp_path / "fleet"))) is None and not any(tmp_path.glob("fleet/runs/*/manifest.json"))
    code, told = submit("fleet-again")
    assert code == 1 and all(shard.read_bytes() == content for shard, content in kept.items()), told
    told = job("status", "fleet-again")[1]
    assert "FAILED" in told.upper() and "0 shipped, 1 review, 0 refused, 1 failed" in told, told


def test_a_deployed_service_answers_and_grows_with_its_load(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """examples/serve.yaml, with a registry, a base and machines that there are."""
    address, environment = cluster
    base, registry, keys = chat_base(tmp_path / "base"), Registry(str(tmp_path / "registry")), tmp_path / "keys.yaml"
    run = finished_run(tmp_path / "run", base, "colours", 1)
    registry.publish(run)
    key, port = add_key(keys, "team", ("*",), max_tokens=900, requests_per_minute=100_000), free_port()
    config = yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    here = {"registry": registry.uri, "bases": [base], "keys": str(keys), "replicas": [1, 2], "ingresses": 1, "batch_size": 1, "cpus": 0.5, "gpus": 0}
    config["applications"][0]["args"] |= here
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    serve, url, stop = str(Path(RAY).parent / "serve"), f"http://127.0.0.1:{port}", threading.Event()
    done = subprocess.run([serve, "deploy", "-a", address, str(tmp_path / "serve.yaml")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = {"model": "colours@1", "prompt": "question 1", "max_tokens": 8, "temperature": 0}

    def ready() -> bool:
        try:
            return fetch(f"{url}/ready")[0] == 200
        except OSError:
            return False

    def engines() -> int:
        told = subprocess.run([serve, "status", "-a", address], env=environment, capture_output=True, text=True, check=True).stdout
        states = yaml.safe_load(told)["applications"]["translora"]["deployments"]["engine-0"]["replica_states"]
        return int(states.get("RUNNING", 0))

    def load(_client: int) -> set[int]:
        found = set()
        while not stop.is_set():
            found.add(post(f"{url}/v1/completions", asked | {"max_tokens": 400}, key)[0])
        return found

    try:
        assert eventually(ready), "it is not ready"
        assert post(f"{url}/v1/completions", asked)[0] == 401
        status, _, body = post(f"{url}/v1/completions", asked, key)
        assert status == 200 and json.loads(body)["choices"][0]["text"] == expected(base, run, "question 1", 8)
        assert engines() == 1
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(load, client) for client in range(8)]
            try:
                assert eventually(lambda: engines() == 2), "no second engine"
            finally:
                stop.set()
            assert set.union(*(answer.result() for answer in answers)) == {200}
    finally:
        subprocess.run([serve, "shutdown", "-a", address, "-y"], env=environment, capture_output=True, check=False)
