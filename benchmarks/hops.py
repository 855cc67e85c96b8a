"""There and back: does an adapter survive two transfers? SmolLM2 to Gemma to SmolLM2, with the first kit's discriminator and seeds.

    make bench-hops            (or: python benchmarks/hops.py --data DIR --seeds 3)

Goes on from the chains of benchmarks/transfer.py on boolean_expressions, which it makes first where they are not there.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import results
import transfer

TASK = "bbh/boolean_expressions"


def main() -> None:
    chosen, threads = transfer.options(__doc__)
    lines = [f"Commit {results.commit()}; n = 100 test rows. Wanted: the second adapter within the source adapter's interval.", ""]
    lines += ["| seed | source adapter (95 % interval) | on Gemma | back on SmolLM2 | within |", "|---|---|---|---|---|"]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        chains = pool.map(lambda seed: hop(seed, chosen, threads), range(chosen.seeds))
        for seed, (first, second) in enumerate(chains):
            source, there, back = first["source_adapter"], first["transferred"]["accuracy"], second["transferred"]["accuracy"]
            interval = results.interval(source["accuracy"], source["low"], source["high"])
            within = "yes" if source["low"] <= back <= source["high"] else "no"
            lines.append(f"| {seed} | {interval} | {there:.3f} | {back:.3f} | {within} |")
    results.replace("hops", "\n".join(lines))
    print("\n".join(lines))


def hop(seed: int, chosen: argparse.Namespace, threads: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """The arms of the first evaluation, and of that after the way back."""
    data, work = chosen.data.resolve(), chosen.work.resolve()
    arms = transfer.run(TASK, seed, data, work, threads)["evaluation"]["arms"]
    here = work / f"{TASK.split('/')[1]}-{seed}"
    back, result = here / "back", here / "back.json"
    transfer.transferred(here, threads, back, str(here / "run"), "--target", transfer.SOURCE, "--recipe", str(here / "recipe.yaml"))
    if not result.exists():
        transfer.translora(here, threads, "evaluate", str(back), "--data", str(data / TASK / "test.jsonl"), "--json", str(result))
    return arms, json.loads(result.read_text())["arms"]


if __name__ == "__main__":
    main()
