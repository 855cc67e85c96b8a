"""`ray job submit` against a real local cluster with token authentication."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import free_port
from tests.ray.conftest import arguments, token_in

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(dashboard address, environment with the token) of a head node that ends with the tests."""
    environment = {**os.environ, **token_in(tmp_path_factory.mktemp("secret"))}
    temp = tmp_path_factory.mktemp("r", numbered=True)
    dashboard = free_port()
    command = [RAY, "start", "--head", "--num-cpus=4", f"--port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    head = subprocess.Popen([*command, f"--temp-dir={short(temp)}", "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(dashboard, head)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        head.terminate()
        head.wait(60)


def short(folder: Path) -> str:
    """A short name for a folder: Ray's socket paths must stay below 108 characters."""
    link = Path(f"/tmp/translora-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return str(link)


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


def test_a_submitted_fleet_tells_its_counts_where_it_failed(cluster: tuple[str, dict[str, str]], tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    address, environment = cluster
    selection = {"quota": 16, "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200}
    synthesis = {"pack_size": 16, "temperature": 1.0, "min_p": 0.0, "max_tokens": 60}
    recipe = {"selection": selection, "synthesis": synthesis, "training": {"epochs": 1}, "gate": {"held_out": 0}}
    fleet = {"out": str(tmp_path / "fleet"), "kits": [str(tmp_path / "absent"), str(tiny_kit)], "target": tiny_gemma, "recipe": recipe}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    submit = [RAY, "job", "submit", "--address", address, "--submission-id", "fleet-test", "--working-dir", str(ROOT)]
    entry = [sys.executable, "jobs/fleet.py", str(tmp_path / "fleet.yaml"), "--resume", "--engine", "transformers"]
    done = subprocess.run([*submit, "--", *entry], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    status = subprocess.run([RAY, "job", "status", "--address", address, "fleet-test"], env=environment, capture_output=True, text=True, check=True)
    told = status.stdout + status.stderr
    assert "FAILED" in told.upper() and "0 shipped, 1 review, 0 refused, 1 failed" in told, told
