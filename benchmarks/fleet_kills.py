"""What SIGKILL does to a fleet: its driver is killed at ten moments, each fleet is resumed, and is compared with one that nobody disturbed.

    python benchmarks/fleet_kills.py

Tiny random models; two transfers that ship, and in every other fleet one whose kit is not whole. Drivers are commands of their own on one Ray, as on a cluster.
The moments are drawn from a seed, one in each tenth of the time from when an undisturbed driver has its lease, before it has looked at a kit, to its end. Where
a driver ends before its moment, which makes the time shorter, it is drawn again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import results
import yaml
from fleet import tiny

from translora_ray.fleet.lease import FILE as LEASE
from translora_ray.fleet.state import read
from translora_ray.records import Candidate
from translora_ray.registry import Registry
from translora_ray.storage import RunStore

RECIPE = {
    "selection": {"quota": 24, "method": "discriminator", "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200},
    "synthesis": {"pack_size": 8, "temperature": 1.0, "min_p": 0.0, "max_tokens": 60},
    "training": {"epochs": 3, "batch_size": 4},
    "gate": {"held_out": 0.1, "ship": 0, "refuse": 0, "acceptance": 0, "likeness": 0},
}
NAMES = ("one", "two")
COLUMNS = ("kill", "after, s", "what there was", "resumed, s", "states", "rows", "releases", "weights")


def write_fleet(folder: Path, kit: str, target: str, whole: bool) -> Path:
    kits: list[Any] = [{"kit": kit, "name": name, "recipe": {"seed": seed}} for seed, name in enumerate(NAMES)]
    if not whole:
        broken = Path(shutil.copytree(kit, folder / "broken"))
        (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
        kits.insert(1, "broken")
    fleet = {"out": "fleet", "kits": kits, "target": target, "recipe": RECIPE, "registry": "registry"}
    (folder / "fleet.yaml").write_text(yaml.safe_dump({**fleet, "cluster": {"commit_seconds": 0, "checkpoint_seconds": 0}}))
    return folder / "fleet.yaml"


@dataclass(frozen=True)
class Outcome:
    """What a fleet came to. `weights` are the adapters' files, by transfer."""

    states: dict[str, str]
    rows: dict[str, list[Candidate]]
    releases: list[tuple[str, str, str]]
    weights: dict[str, Path]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        runs = folder / "fleet" / "runs"
        rows = {name: RunStore(str(runs / name)).candidates() for name in NAMES}
        releases = [(release.id, release.verdict, release.recipe_hash) for release in Registry(str(folder / "registry")).releases()]
        weights = {release.name: Path(release.uri) / "adapter_model.safetensors" for release in Registry(str(folder / "registry")).releases()}
        return cls(states(folder), rows, releases, weights)


def states(folder: Path) -> dict[str, str]:
    """Those of the transfers that ship; nothing where a driver has said nothing yet."""
    return {record.name: record.state for record in read(RunStore(str(folder / "fleet"))) if record.name in NAMES}


def drive(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "translora_ray.cli", "fleet", str(path), "--engine", "transformers", "--resume"]
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=results.ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], path: Path, whole: bool) -> float:
    """Seconds until the driver ended, which it must do with 1 where one of the kits is not whole."""
    began = time.monotonic()
    if process.wait(600) != int(not whole):
        raise SystemExit(path.with_suffix(".log").read_text())
    return time.monotonic() - began


def has_lease(process: subprocess.Popen[bytes], folder: Path) -> None:
    while not (folder / "fleet" / LEASE).exists():
        if process.poll() is not None:
            raise SystemExit((folder / "fleet.log").read_text())
        time.sleep(0.01)


def there(folder: Path) -> str:
    """What a killed driver left, in words."""
    runs = folder / "fleet" / "runs"
    found = states(folder) or dict.fromkeys(NAMES, "not begun")
    counts = {
        "shards": len(list(runs.glob("*/shards/*.parquet"))),
        "checkpoints": len(list(runs.glob("*/train/*/*/metrics.json"))),
        "adapters": len(list(runs.glob("*/adapter/adapter_config.json"))),
        "releases": len(list((folder / "registry").glob("releases/*/release.json"))),
    }
    held = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{', '.join(found[name] for name in NAMES)}; {held or 'nothing'}"


def furthest(one: dict[str, Path], other: dict[str, Path]) -> float:
    """The largest difference between two weights that should be the same."""
    from safetensors.torch import load_file

    largest = 0.0
    for name in NAMES:
        ours, theirs = load_file(one[name]), load_file(other[name])
        largest = max(largest, *(float((ours[key] - theirs[key]).abs().max()) for key in ours))
    return largest


def kill(number: int, moment: float, folder: Path, parts: tuple[str, str], calm: Outcome) -> tuple[list[str], bool] | None:
    """A row of the table, and whether all is the same; None where the driver had ended."""
    whole = number % 2 == 1
    path = write_fleet(folder, *parts, whole)
    process = drive(path)
    has_lease(process, folder)
    time.sleep(moment)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return None
    left = there(folder)
    resumed = finish(drive(path), path, whole)
    outcome = Outcome.of(folder)
    same = [getattr(outcome, part) == getattr(calm, part) for part in ("states", "rows", "releases")]
    apart = furthest(outcome.weights, calm.weights) if same[2] else float("nan")
    words = ["same" if each else "DIFFERENT" for each in same]
    row = [str(number), f"{moment:.1f}", left, f"{resumed:.0f}", *words, "same" if apart == 0 else f"within {apart:.0e}"]
    print(" | ".join(row), flush=True)
    return row, all(same) and apart < 1e-2


def measure(folder: Path, kills: int, seed: int) -> tuple[list[str], bool]:
    parts = tiny(folder)
    (folder / "calm").mkdir()
    path = write_fleet(folder / "calm", *parts, whole=True)
    process = drive(path)
    has_lease(process, folder / "calm")
    undisturbed = seconds = finish(process, path, whole=True)
    calm = Outcome.of(folder / "calm")
    draw = random.Random(seed)
    rows: list[list[str]] = []
    same = True
    while len(rows) < kills:
        moment = (len(rows) + draw.random()) / kills * seconds
        if killed := kill(len(rows) + 1, moment, Path(tempfile.mkdtemp(dir=folder)), parts, calm):
            rows, same = [*rows, killed[0]], same and killed[1]
        else:
            seconds = moment
    candidates = sum(map(len, calm.rows.values()))
    head = f"Commit {results.commit()}, seed {seed}. Undisturbed: {undisturbed:.0f} s from the driver's lease on, {candidates} candidates, two releases."
    return [head, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *("| " + " | ".join(row) + " |" for row in rows)], same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    session: dict[str, Any] = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", **session)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lines, same = measure(Path(scratch), options.kills, options.seed)
    finally:
        ray.shutdown()
    print("\n".join(lines))
    results.replace("fleet-kills", "\n".join(lines))
    if not same:
        raise SystemExit("a resumed fleet is not what an undisturbed one is")


if __name__ == "__main__":
    main()
