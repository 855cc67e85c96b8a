"""A real Ray autoscaler (v2) on one machine: its nodes are raylets that Ray's own fake provider starts and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray._private.services import get_node_ip_address

from tests.conftest import command_lines, free_port, parent
from tests.ray.conftest import token_in

RAY = str(Path(sys.executable).parent / "ray")
HEAD = "f" * 51 + "00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
EMPTY: dict[str, Any] = {
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands", "head_setup_commands")},
    **{key: [] for key in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
    "file_mounts_sync_continuously": False,
}


def scaling_config(address: str, nodes: int, cpus: int) -> dict[str, Any]:
    """A head without CPUs, and up to `nodes` workers, which end after a few seconds of idleness."""
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": HEAD, "use_node_id_as_ip": True, "launch_multiple": True}
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": cpus, "object_store_memory": 200_000_000}, "node_config": {}, "min_workers": 0, "max_workers": nodes},
    }
    limits = {"cluster_name": "growing", "max_workers": nodes, "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0, "head_node_type": "ray.head.default"}
    return {**EMPTY, **limits, "provider": {**provider, "disable_node_updaters": True, "disable_launch_config_check": True}, "available_node_types": types}


class Growing:
    """The running cluster, seen from outside."""

    def __init__(self, address: str, folder: Path, environment: dict[str, str]) -> None:
        self.address, self.folder, self.environment = address, folder, environment

    def raylets(self) -> list[int]:
        """Process ids of the workers' raylets."""
        return [pid for pid, command in processes_in(self.folder) if Path(command[0]).name == "raylet" and "--head" not in command]

    def lose(self, worker: bytes) -> list[bytes]:
        """SIGKILL to a node on which there is such a worker, and to all that runs there; the names of its processes."""
        nodes = {raylet: children(raylet) for raylet in self.raylets()}
        raylet, there = next((raylet, there) for raylet, there in nodes.items() if any(name.startswith(worker) for name in there.values()))
        for pid in (raylet, *there):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(there.values())


def children(of: int) -> dict[int, bytes]:
    """Ids and names of the processes that a process has started."""
    return {pid: line for pid, line in command_lines().items() if parent(pid) == of}


def processes_in(folder: Path) -> list[tuple[int, list[str]]]:
    """Processes whose command line names the folder: all that Ray starts there but its workers, which end with their raylet."""
    commands = [(pid, line.decode(errors="replace").rstrip("\0").split("\0")) for pid, line in command_lines().items()]
    return [(pid, command) for pid, command in commands if any(str(folder) in part for part in command)]


def end(head: subprocess.Popen[bytes], folder: Path) -> None:
    """SIGKILL to a head and to all that was started there, workers' raylets, too: Ray takes half a minute where it is asked to end."""
    head.kill()
    for pid, _ in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait(60)


def wait(ready: Callable[[], bool], seconds: float, what: str, pause: float = 0.5) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(pause)


@contextlib.contextmanager
def growing_cluster(folder: Path, nodes: int, cpus: int) -> Iterator[Growing]:
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    (folder / "scaling.json").write_text(json.dumps(scaling_config(address, nodes, cpus)))
    environment = {**os.environ, **token_in(folder)}
    of_the_head = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    of_the_head |= {"RAY_raylet_start_wait_time_s": "300", "RAY_health_check_timeout_ms": "60000"}  # on a busy machine a node may be slow, not lost
    of_the_head |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    command = [RAY, "start", "--head", "--block", f"--autoscaling-config={folder}/scaling.json", "--num-cpus=0", f"--port={port}"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}", "--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={free_port()}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment | of_the_head, stdout=log, stderr=log)
    try:
        wait(lambda: "Ray runtime started" in (folder / "head.log").read_text(), 600, "the head")
        yield Growing(address, folder, environment)
    finally:
        end(head, folder)
