"""cluster/local.sh: several raylets, a token, a job, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.growing import processes_in

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "cluster" / "local.sh")
COUNT = "import ray; ray.init(log_to_driver=False); print('resources', ray.cluster_resources()['CPU'], sum(node['Alive'] for node in ray.nodes()))"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the script needs; its state lies in a folder with a short name, and is gone after the test."""
    state = Path(tempfile.mkdtemp(prefix="tl", dir="/tmp"))
    state.rmdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TRANSLORA_LOCAL": str(state), "HOME": str(tmp_path)}
    yield environment
    if state.exists():
        subprocess.run([SCRIPT, "stop"], env=environment, check=False)
    shutil.rmtree(state, ignore_errors=True)


def run(environment: dict[str, str], *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def test_nodes_start_a_job_runs_strangers_are_refused_and_nothing_stays(environment: dict[str, str], tmp_path: Path) -> None:
    state = Path(environment["TRANSLORA_LOCAL"])
    assert "no cluster runs" in run(environment, SCRIPT, "submit", "true").stderr
    started = run(environment, SCRIPT, "start", "2", "1")
    assert started.returncode == 0, started.stdout + started.stderr
    assert "Ray runs: 2 nodes with 1 CPUs each" in started.stdout
    assert (state / "token").stat().st_mode & 0o777 == 0o600
    assert len({command[0] for _, command in processes_in(state) if command[0].endswith("/raylet")}) == 1
    assert sum(command[0].endswith("/raylet") for _, command in processes_in(state)) == 3
    again = run(environment, SCRIPT, "start")
    assert again.returncode == 2 and "stop first" in again.stderr
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "count.py").write_text(COUNT)
    submitted = run(environment, SCRIPT, "submit", "python", "count.py", cwd=tmp_path / "work")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "resources 2.0 3" in submitted.stdout
    dashboard = f"http://127.0.0.1:{(state / 'dashboard').read_text().strip()}"
    (tmp_path / "stranger").mkdir()
    stranger = {**environment, "HOME": str(tmp_path / "stranger")}
    refused = run(stranger, "ray", "job", "submit", "--address", dashboard, "--", "python", "-c", "print('came in')")
    assert refused.returncode != 0 and "came in" not in refused.stdout
    assert "token" in (refused.stdout + refused.stderr).lower()
    stopped = run(environment, SCRIPT, "stop")
    assert stopped.returncode == 0, stopped.stderr
    assert processes_in(state) == []
    assert not state.exists()
