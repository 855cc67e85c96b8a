"""Does it matter to the adapter which engine wrote its examples? One kit, a transfer on each engine, one test set.

    make bench-engines         (or: python benchmarks/engines.py)

The kit and both evaluations are made on the transformers engine, so that the transfers alone differ. Runs lie in runs/engines/; what is
there is not computed again.
"""

from __future__ import annotations

import json

import results
from rounds import EXAMPLE, TARGET, judged_kit, translora

WORK = results.ROOT / "runs" / "engines" / results.commit().replace(" ", "-")
"""Of one commit: another's runs would say nothing of it."""
SIDES = {"transformers": "cluster.engines=[2,2]", "vllm": "cluster.engines=[1,1]"}
"""As many engines of each kind as do best on two cores: vLLM's one uses both."""


def main() -> None:
    kit = judged_kit().path
    lines = ["| | accuracy (95 % interval) | accepted | candidates | stream, seconds | stream, tokens/s |", "|---|---|---|---|---|---|"]
    intervals = []
    for engine, placement in SIDES.items():
        run = WORK / engine
        transfer = ("--target", TARGET, "--out", str(run), "--recipe", str(EXAMPLE / "recipe.yaml"), "--engine", engine, "--set", placement)
        translora("transfer", kit, *transfer)
        if not (WORK / f"{engine}.json").exists():
            found = ("--data", str(EXAMPLE / "test.jsonl"), "--json", str(WORK / f"{engine}.json"), "--engine", "transformers")
            translora("evaluate", str(run), *found)
        arm = json.loads((WORK / f"{engine}.json").read_text())["arms"]["transferred"]
        manifest = json.loads((run / "manifest.json").read_text())
        intervals.append((arm["accuracy"], arm["low"], arm["high"]))
        counts, tokens, seconds = manifest["counts"], manifest["tokens"], manifest["last_attempt_seconds"]["stream"]
        if len(counts["engine_loads"]) > 1:
            raise SystemExit(f"{run} was interrupted, so that its seconds are not those of its tokens: remove it and start again.")
        made = sum(amount for role, amount in tokens.items() if role != "training")
        figures = [
            f"{arm['accuracy']:.3f} ({arm['low']:.3f} to {arm['high']:.3f})",
            counts["accepted"],
            counts["candidates"],
            round(seconds),
            f"{made / seconds:.0f}",
        ]
        lines.append(f"| {engine} | {' | '.join(map(str, figures))} |")
    (first, low, high), (second, least, most) = intervals
    within = low <= second <= high and least <= first <= most
    head = f"Commit {results.commit()}; one transfer each. Wanted: each accuracy within the other's interval; it is{'' if within else ' not'} so."
    results.replace("engines", "\n".join([head, "", *lines]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
