"""What a fleet costs its driver as it grows, with engines and trainings that cost nothing: time per transfer, memory, files.

    python benchmarks/fleet_simulation.py 100 300 1000

The driver is the real one: it checks kits and bases, streams over Ray Data, commits, judges, publishes, writes its page. Engines answer by a script, and
a training is the way to its worker and back; kits and targets are the tiny random models of the tests. The Ray has one node of two CPUs beside the driver and
four of one, each a raylet of its own on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import scripted
import yaml
from fleet import tiny

RECIPE = {
    "selection": {"quota": 8, "method": "discriminator", "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200},
    "synthesis": {"pack_size": 10},
    "training": {"epochs": 1},
    "gate": {"held_out": 0.25, "acceptance": 0, "likeness": 0},
}
NODES = 4
STORE = 200 * 2**20
"""Bytes of each node's object store: by default each takes its share of the whole machine's memory."""
HEADS = "transfers | seconds | ms a transfer | checks | first end, s | first tenth | last tenth | writes of the state | ms each | driver, MiB | files"


def adapter_for(kit: str, target: str, folder: Path) -> str:
    """The adapter that every training comes to."""
    from translora_ray import adapters, adapting, models
    from translora_ray.config import Adapter
    from translora_ray.kit import load

    wanted = adapters.inherit(adapters.inspect(load(kit).adapter.path), Adapter(), models.linear_shapes(target))
    adapting.save(adapting.create(models.load_base(target), wanted, 0), folder, target)
    return str(folder)


def drive(path: Path, adapter: str) -> None:
    """One fleet, in a process of its own; prints what was measured as JSON."""
    import ray

    from translora_ray import workflow
    from translora_ray.fleet import driver, state
    from translora_ray.fleet.manifest import load_fleet
    from translora_ray.progress import Display
    from translora_ray.storage import RunStore
    from translora_ray.training.checkpoints import METRICS, Checkpoints
    from translora_ray.training.trainer import FACTS, Result

    ray.init(address=os.environ["RAY_ADDRESS"], runtime_env={"worker_process_setup_hook": "scripted.install"}, log_to_driver=False, logging_level="error")
    facts = {**dict.fromkeys(FACTS, 0), "rows": 8, "loss": 0.1, "epoch_losses": [0.1], "held_out_losses": [], "loss_curve": [], "started_at_steps": [0]}

    (Path(adapter) / METRICS).write_text(json.dumps(facts))
    trained = Checkpoints(RunStore(str(Path(adapter).parent)), "scripted")
    trained.add(Path(adapter))

    def fit(_job: Any, _name: str, _store: Any, run: Any) -> Result:
        run(scripted.train)
        return Result(None, trained)

    workflow.fit_alone = fit  # type: ignore[attr-defined,assignment]
    began = time.monotonic()
    writing: list[float] = []
    seen: list[tuple[float, int]] = []
    write = state.State._write

    def written(self: state.State) -> None:
        start = time.monotonic()
        write(self)
        if not self._late:
            writing.append(time.monotonic() - start)
        seen.append((time.monotonic() - began, sum(self.counts.get(end, 0) for end in state.ENDS)))

    state.State._write = written  # type: ignore[method-assign]
    fleet, wanted = load_fleet(str(path))
    started = _resident()
    with Display() as display:
        ended = driver.run_fleet(fleet, wanted, False, "transformers", display)
    seconds = time.monotonic() - began
    if ended.counts != {state.SHIPPED: len(wanted)}:
        raise SystemExit(f"{ended.counts}: {next(record for record in ended.records.values() if record.state != state.SHIPPED)}")
    tenth = max(1, len(wanted) // 10)
    at = {count: min(moment for moment, done in seen if done >= count) for count in (1, tenth, len(wanted) - tenth, len(wanted))}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    tenths = [(at[tenth] - at[1]) / max(1, tenth - 1), (at[len(wanted)] - at[len(wanted) - tenth]) / tenth]
    measured = {"seconds": seconds, "checks": seen[0][0], "first": at[1] - seen[0][0], "tenths": tenths, "started": started, "peak": peak}
    measured |= {"writing": sum(writing), "writes": len(writing), "slowest": max(writing)}
    print("MEASURED " + json.dumps(measured))


def _resident() -> int:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def measure(folder: Path, count: int, kit: str, target: str, adapter: str) -> dict[str, Any]:
    kits = [{"kit": kit, "name": f"transfer{seed}", "recipe": {"seed": seed}} for seed in range(count)]
    path = folder / f"fleet{count}.yaml"
    fleet = {"out": f"fleet{count}", "kits": kits, "target": target, "recipe": RECIPE, "registry": f"registry{count}"}
    path.write_text(yaml.safe_dump({**fleet, "cluster": {"engines": [NODES, NODES], "engine_cpus": 1, "worker_cpus": 1}}))
    command = [sys.executable, __file__, "--drive", str(path), "--adapter", adapter]
    with (folder / f"fleet{count}.log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + (folder / f"fleet{count}.log").read_text()[-4000:])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    out = folder / f"fleet{count}"
    sizes = {name: (out / name).stat().st_size for name in ("fleet.json", "index.html")}
    files = sum(path.is_file() for place in (out, folder / f"registry{count}") for path in place.rglob("*"))
    return {**json.loads(line.removeprefix("MEASURED ")), **sizes, "files": files, "count": count}


def row(found: dict[str, Any]) -> str:
    count = found["count"]
    cells = [
        f"{count:,}",
        f"{found['seconds']:.0f}",
        f"{1000 * found['seconds'] / count:.0f}",
        f"{1000 * found['checks'] / count:.0f}",
        f"{found['first']:.1f}",
        *(f"{1000 * each:.0f}" for each in found["tenths"]),
        f"{found['writes']:,}",
        f"{1000 * found['writing'] / found['writes']:.0f}",
        f"{found['started']} to {found['peak']}",
        f"{found['files']:,}",
    ]
    return " | ".join(cells)


def at_large(found: list[dict[str, Any]], count: int = 100_000) -> list[str]:
    """What the slopes between the smallest and the largest fleet come to at `count` transfers."""
    small, large = found[0], found[-1]

    def line(value: Callable[[dict[str, Any]], float]) -> float:
        slope = (value(large) - value(small)) / (large["count"] - small["count"])
        return float(value(large) + slope * (count - large["count"]))

    each = (large["seconds"] - large["checks"] - large["first"]) / large["count"]
    late = line(lambda fleet: fleet["tenths"][1] - fleet["tenths"][0])
    return [
        f"By the slopes between {small['count']:,} and {large['count']:,}, {count:,} transfers in one fleet come to",
        f"* {line(lambda fleet: fleet['checks']) / 3600:.1f} h of checks before the stream begins;",
        f"* {line(lambda fleet: fleet['first']) / 3600:.1f} h from there to the first transfer's end, as all are begun at once;",
        f"* {each * count / 3600:.0f} h of the driver for the rest at today's time per transfer, and {late:+.1f} s for the last ones against the first;",
        f"* {line(lambda fleet: fleet['peak']) / 1024:.1f} GiB of memory in the driver;",
        f"* {line(lambda fleet: fleet['fleet.json'] + fleet['index.html']) / 2**20:.0f} MiB of `fleet.json` and `index.html`, "
        f"{line(lambda fleet: fleet['writing'] / fleet['writes']):.1f} s to write them;",
        f"* {line(lambda fleet: fleet['files']) / 1e6:.1f} million files.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[100, 300, 1000])
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(Path(options.drive), options.adapter)
        return
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(results.ROOT / "benchmarks"), str(results.ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        os.environ["RAY_ADDRESS"] = cluster.address
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            kit, target = tiny(folder)
            adapter = adapter_for(kit, target, folder / "adapter")
            found = []
            for count in options.counts:
                found.append(measure(folder, count, kit, target, adapter))
                print(row(found[-1]), flush=True)
    finally:
        cluster.shutdown()
    lines = [f"Commit {results.commit()}; {NODES} nodes beside the head's, on one machine.", "", f"| {HEADS} |", "|---" * (HEADS.count("|") + 1) + "|"]
    lines += [f"| {row(each)} |" for each in found]
    lines += ["", *at_large(found)] if len(found) > 1 else []
    print("\n".join(lines))
    results.replace("fleet-simulation", "\n".join(lines))


if __name__ == "__main__":
    main()
