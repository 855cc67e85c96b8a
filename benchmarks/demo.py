"""`make demo` as a newcomer meets it: fresh clone, fresh environment, empty model cache. Minutes, and memory of all processes together.

    make bench-demo            (or: python3.11 benchmarks/demo.py)

Needs Python alone. Memory is the proportional set size (shared pages counted once), summed over the process tree every two seconds.
The clone stays in a temporary folder whose name is printed; the table goes to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import results


def tree(root: int) -> set[int]:
    """Process ids of `root` and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def memory(processes: set[int]) -> int:
    """Bytes that the processes hold together."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def watched(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, int]:
    """(seconds, peak bytes) of a command that must succeed."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=folder, env=environment)
    while process.poll() is None:
        peak = max(peak, memory(tree(process.pid)))
        time.sleep(2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode} in {folder}")
    return time.monotonic() - began, peak


def main() -> None:
    clone = Path(tempfile.mkdtemp(prefix="translora-demo-")) / "translora_ray"
    subprocess.run(["git", "clone", "--quiet", str(results.ROOT), str(clone)], check=True)
    print(f"demo in {clone}", flush=True)
    environment = {**os.environ, "TRANSLORA_CACHE": str(clone.parent / "cache")}
    installing, _ = watched(["make", "install"], clone, environment)
    running, peak = watched(["make", "demo"], clone, environment)
    manifest = json.loads((clone / "runs" / "demo" / "manifest.json").read_text())
    kit = json.loads((clone / "runs" / "demo-kit" / "kit.json").read_text())
    arms = json.loads((clone / "runs" / "demo" / "evaluation.json").read_text())["arms"]
    loads = [len(loads) for loads in manifest["counts"]["engine_loads"].values()]
    rows = [
        ("install and demo, minutes", f"{(installing + running) / 60:.1f}", "20 at most"),
        ("install, minutes", f"{installing / 60:.1f}", ""),
        ("prepare, minutes", f"{sum(kit['seconds'].values()) / 60:.1f}", ""),
        ("the transfer itself, minutes", f"{manifest['last_attempt_seconds']['transfer'] / 60:.1f}", "8 at most"),
        ("peak memory of all processes, GiB", f"{peak / 2**30:.1f}", "under 12"),
        ("engine loads in the stream", str(loads[0]), "one per actor: 2"),
        *((f"accuracy, {arm.replace('_', ' ')}", f"{value['accuracy']:.3f} ({value['low']:.3f} to {value['high']:.3f})", "") for arm, value in arms.items()),
    ]
    lines = [f"Commit {results.commit()}; one run.", "", "| | measured | wanted |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    results.replace("demo", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
