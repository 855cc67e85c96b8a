"""What a fleet costs as it grows: engine loads, seconds per transfer, and the part of them that is neither stream, training nor gate.

    python benchmarks/fleet.py 1 2 4 8                                    (tiny random models)
    python benchmarks/fleet.py 1 4 --kit KIT --target packaged:gemma-3-270m

Each fleet has so many transfers of one kit, which differ in their seed, and is a command of its own with a Ray of its own, as users start it: what that takes
is in all of them, so the last column compares each fleet with the first. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import results
import yaml

sys.path.insert(0, str(results.ROOT))

TINY = {
    "selection": {"quota": 40, "method": "discriminator", "threshold": -100, "as_asked": False, "near_duplicate": 1.0, "max_candidates": 200},
    "synthesis": {"pack_size": 16, "temperature": 1.0, "min_p": 0.0, "max_tokens": 60},
    "training": {"epochs": 4, "batch_size": 4},
}
COLUMNS = ("transfers", "engine loads", "seconds", "seconds a transfer", "engines", "training", "gates", "the rest", "the rest, each more transfer")


@dataclass(frozen=True)
class Measured:
    """Of a fleet: seconds from its beginning to its end, and those that engines, trainings and gates were busy."""

    count: int
    loads: int
    wall: float
    engines: float
    training: float
    gates: float

    @property
    def rest(self) -> float:
        return self.wall - self.engines - self.training - self.gates

    def row(self, first: Measured) -> str:
        each = f"{(self.rest - first.rest) / (self.count - first.count):.1f}" if self.count > first.count else "-"
        seconds = (f"{value:.0f}" for value in (self.engines, self.training, self.gates, self.rest))
        return "| " + " | ".join([str(self.count), str(self.loads), f"{self.wall:.0f}", f"{self.wall / self.count:.1f}", *seconds, each]) + " |"


def tiny(folder: Path) -> tuple[str, str]:
    """(kit, target) of random models."""
    from tests.conftest import save_model, write_task
    from translora_ray.cli import main

    source, target = (save_model(folder / family, family) for family in ("llama", "gemma"))
    kit = str(folder / "kit")
    if main(["prepare", str(write_task(folder / "task")), "--base", source, "--out", kit, "--engine", "transformers"]):
        raise SystemExit("the kit could not be made")
    return kit, target


def measure(folder: Path, count: int, kit: str, target: str, recipe: dict[str, object], engine: str) -> Measured:
    kits = [{"kit": kit, "name": f"transfer{seed}", "recipe": {"seed": seed}} for seed in range(count)]
    (folder / "fleet.yaml").write_text(yaml.safe_dump({"out": f"fleet{count}", "kits": kits, "target": target, "recipe": recipe}))
    began = time.perf_counter()
    command = [sys.executable, "-m", "translora_ray.cli", "fleet", str(folder / "fleet.yaml"), "--engine", engine]
    if subprocess.run(command, cwd=results.ROOT, check=False).returncode not in (0, 1):
        raise SystemExit("the fleet could not begin")
    wall = time.perf_counter() - began
    fleet = json.loads((folder / f"fleet{count}" / "fleet.json").read_text())
    manifests = [json.loads(path.read_text()) for path in folder.glob(f"fleet{count}/runs/*/manifest.json")]
    if len(manifests) != count:
        raise SystemExit(f"{count - len(manifests)} transfers were not finished: {fleet['transfers']}")
    loads = sum(map(len, fleet["engine_loads"].values()))
    training = sum(manifest["seconds"]["training"] for manifest in manifests)
    engines = sum(sum(manifest["seconds"].values()) for manifest in manifests) - training
    gates = sum(manifest["last_attempt_seconds"]["gate"] for manifest in manifests)
    return Measured(count, loads, wall, engines, training, gates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--kit")
    parser.add_argument("--target")
    parser.add_argument("--recipe", help="with --kit: a recipe file without a cluster section")
    parser.add_argument("--engine", default="transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kit, target = (str(Path(options.kit).resolve()), options.target) if options.kit else tiny(folder)
        recipe = (yaml.safe_load(Path(options.recipe).read_text()) if options.recipe else {}) if options.kit else TINY
        found = [measure(folder, count, kit, target, recipe, options.engine) for count in options.counts]
    models = "packaged" if options.kit else "tiny"
    lines = [f"Commit {results.commit()}, {models} models, engine {options.engine}.", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += [fleet.row(found[0]) for fleet in found]
    print("\n".join(lines))
    results.replace(f"fleet-{models}", "\n".join(lines))


if __name__ == "__main__":
    main()
