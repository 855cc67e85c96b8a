"""Results as people read them on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from translora_ray.evaluation.arms import EXTRA

ARMS = {
    "source_base": "source base",
    "source_adapter": "source base + adapter",
    "target_base": "bare target",
    "target_few_shot": "target, seeds as examples",
    "transferred": "target + transferred adapter",
    "oracle": "target + adapter on the real rows",
    **EXTRA,
}


def show_evaluation(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['metric']} on {result['n']} rows")
    for column in ("arm", "accuracy", "95 % interval"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, value in result["arms"].items():
        table.add_row(ARMS[arm], f"{value['accuracy']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}")
    Console().print(table)
    table = Table(title="the transferred adapter against each")
    for column in ("arm", "transferred minus it", "McNemar's p", "its recovery"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, value in result["arms"].items():
        if paired := value.get("paired"):
            difference = f"{paired['difference']:+.3f} ({paired['low']:+.3f} to {paired['high']:+.3f})"
            share = "" if value["recovery"] is None else f"{value['recovery']:.3f}"
            table.add_row(arm.replace("_", " "), difference, f"{paired['p']:.2g}", share)
    Console().print(table)
    against = result["against"]
    interval = f"{against['low']:+.3f} to {against['high']:+.3f}, McNemar p {against['p']:.2g}"
    lines = [f"transferred minus {ARMS[against['arm']]}: {against['difference']:+.3f} ({interval})"]
    lines.append(f"negative flips: {result['negative_flips']} of {result['n']} rows were right on the bare target and are wrong now")
    if "distance" in result:
        lines.append(f"distance to real prompts (squared MMD): trained on {result['distance']['filtered']:.3f}, all {result['distance']['unfiltered']:.3f}")
    if result["recovery"] is not None:
        lines.append(f"recovery: {result['recovery']:.3f} of what training on the real rows gains")
    lines += [*trainings(result), *looked_at(result)]
    Console().print("\n".join(lines), markup=False, highlight=False)


def trainings(result: dict[str, Any]) -> list[str]:
    """What several trainings of an arm came to, a line each; the arm's own is the first of them."""
    found = result.get("trainings", {})
    return [f"{ARMS[arm]}, {len(each)} trainings: {sum(each) / len(each):.3f} in the mean, {min(each):.3f} to {max(each):.3f}" for arm, each in found.items()]


def looked_at(result: dict[str, Any]) -> list[str]:
    """What the test rows have in common with what was learnt from, a line each."""
    found = result.get("looked_at", {"train": True, "among_examples": 0})
    lines = [] if found["train"] else ["whether test rows are among those that the source adapter learnt from was not looked at (--train)"]
    if among := found["among_examples"]:
        lines.append(f"{among} of the {result['n']} test inputs happen to be among the written prompts that were trained on")
    return lines


def show_facts(title: str, facts: dict[str, Any]) -> None:
    table = Table(title=Text(title), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(Text(name.replace("_", " ")), Text(shown))
    Console().print(table)


AUDITED = {
    "discriminator": "discriminator's verdicts on them",
    "likelihood": "generator adapter's log-likelihood of them",
    "gain": "what it adds to its base's",
    "edit_similarity": "edit similarity to the nearest prompt",
    "word_overlap": "words shared with one prompt",
}


def show_audit(result: dict[str, Any]) -> None:
    title = f"{result['members']} rows that were learnt from against {result['others']} others, without {result['seeds_left_out']} seeds, which the kit shows"
    table = Table(title=title)
    for column in ("rows told apart by", "AUC", "95 % interval", "judgement"):
        table.add_column(column, justify="right" if column in {"AUC", "95 % interval"} else "left", overflow="fold")
    synthetic = result["synthetic"] or {}
    found = {"discriminator": result["discriminator"], **(result["generator"] or {}), **synthetic}
    for name, score in AUDITED.items():
        if value := found.get(name):
            table.add_row(score, f"{value['auc']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}", value["judgement"])
    Console().print(table)
    lines = [synthetic["copies"]["judgement"]] if synthetic else []
    for pair in synthetic.get("nearest", []):
        lines.append(f"{pair['similarity']:.2f}\n  prompt: {pair['prompt']}\n  row:    {pair['row']}")
    Console().print("\n".join(lines), markup=False, highlight=False)
