"""Is more kept where all adapters learn for as long as the product has them learn? The chains of quality.py pass over rows and examples fewer times.

    make bench-passes          (or: python benchmarks/passes.py --data DIR --seeds 3 [--task intents/snips_intents])

Each (task, seed) is a kit and the default transfer, with nothing said of epochs. Beside them stand the kept chains of quality.py with the same seeds, and their
oracles, which would be trained the same way here: six passes are the most that an oracle has. Files lie in runs/passes/; what is there is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import quality
import results
import transfer
import yaml
from chains import finished, recovery

from translora_ray.reading import load_config, load_task

TASKS = [name for name in quality.TASKS if name != "bbh/boolean_expressions"]
"""That one's epochs were chosen on its training rows."""
DEFAULT = "slots/snips_GetWeather"


def run(name: str, seed: int, data: Path, work: Path, threads: int) -> dict[str, float]:
    """Accuracy on the test rows of the source adapter and of what is transferred."""
    here = work / f"{name.split('/')[1]}-{seed}"
    keys = {key: value for key, value in quality.TASKS[name]["task"].items() if key != "source_training"}
    task = quality.write_task(name, here, data, seed=seed, **keys)
    recipe = {"seed": seed, "cluster": {"engine_cpus": threads, "worker_cpus": threads}}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {"task": load_task(task).model_dump(), "recipe": load_config(here / "recipe.yaml", []).recipe.model_dump()}
    transfer.keep_to(here, settings)
    kit, out = here / "kit", here / "run"
    if not kit.exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--out", str(kit))
    transfer.transferred(here, threads, out, str(kit), "--target", transfer.TARGET, "--recipe", str(here / "recipe.yaml"))
    arms = quality.evaluated(here, threads, out, ())["arms"]
    return {arm: arms[arm]["accuracy"] for arm in ("source_adapter", "transferred")}


def table(chains: Mapping[str, Mapping[int, dict[str, float]]]) -> str:
    lines = [f"Commit {results.commit()}; in brackets what quality.py's chain of that seed has, by fewer passes.", ""]
    lines += ["| task | seed | source adapter | transferred | oracle | recovery |", "|---|---|---|---|---|---|"]
    for name, by_seed in chains.items():
        for seed, chain in sorted(by_seed.items()):
            before = finished()[name][str(seed)]["accuracy"]
            both = {"accuracy": before | {"transferred": chain["transferred"]}}
            cells = [name.split("/")[1], str(seed)]
            cells += [f"{chain[arm]:.3f} ({before[kept]:.3f})" for arm, kept in (("source_adapter", "source_adapter"), ("transferred", "default"))]
            cells += [f"{before['oracle']:.3f}", f"{recovery(both, 'transferred'):.3f} ({recovery(both, 'default'):.3f})"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    chosen, threads = transfer.options(__doc__, TASKS, "passes")

    def work(name: str, seed: int) -> dict[str, float]:
        return run(name, seed, chosen.data.resolve(), chosen.work.resolve(), threads)

    transfer.run_all(chosen, chosen.task or [DEFAULT], work, lambda chains: results.replace("passes", table(chains)))


if __name__ == "__main__":
    main()
