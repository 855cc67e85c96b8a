"""How much of what real rows teach does a transfer keep? The default, the paper's way, one without a discriminator, on public tasks, SmolLM2 to Gemma.

    make bench-quality         (or: python benchmarks/quality.py --data DIR --seeds 3 [--quick | --more])

Each (task, seed) is a whole chain: a kit, a transfer in each way, the arms made from the paper's candidates, and an oracle on the real rows, trained as
`evaluate --oracle` does it beside the default: for as many steps, but for at most six epochs. --quick takes three tasks; --more adds transfers with the
discriminator's cut or another generator, and more arms. --jobs chains run at a time, on an even share of the cores each.

Logs and runs lie in runs/quality/; what is there is not computed again. Figures of finished chains are kept in benchmarks/quality.json, so that chains may be
run on several days; table and plot are made from it, and say of which commits they are. A chain of another task, recipe or set of ways replaces what was kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import results
import transfer
import yaml
from chains import KEPT, SHOWN, Chain, finished, keep, plot, table
from rounds import answered, translora

from translora_ray.answers import find_answers
from translora_ray.config import EPOCHS
from translora_ray.engines.base import AdapterRef
from translora_ray.evaluation import gate
from translora_ray.evaluation.compare import summary
from translora_ray.kit import load
from translora_ray.reading import load_task
from translora_ray.recipe import Recipe, Synthesis
from translora_ray.records import read_rows
from translora_ray.storage import RunStore
from translora_ray.stream.dedup import normal

SHORT = 4
"""Epochs where there are `CHOSEN_FOR_A_ROW` examples for each row: fewer than `EPOCHS`, as chains are long enough."""
# As many seeds as the paper's hardest task had (15), or one for each label where there are more. Of one seed for each label, as snips_intents would have with
# 7, a base writes little else than copies: 3 % of its candidates became examples, of two for each label 12 % (counted without a look at accuracy).
INTENT = {"prompt": "Message: {input}\nIntent:", "max_new_tokens": 10, "source_training": {"epochs": 5}}
TASKS: dict[str, dict[str, Any]] = {
    "intents/clinc_utility": {"task": {**INTENT, "seeds": 15}, "recipe": {"training": {"epochs": SHORT}}},
    "intents/banking_cards": {"task": {**INTENT, "seeds": 16}, "recipe": {"training": {"epochs": SHORT}}},
    "intents/snips_intents": {"task": {**INTENT, "seeds": 15}, "recipe": {"training": {"epochs": SHORT}}},
    "slots/snips_GetWeather": {
        "task": {"prompt": "Message: {input}\nSlots:", "max_new_tokens": 48, "seeds": 15, "source_training": {"epochs": 4}},
        "recipe": {"training": {"epochs": SHORT}},
    },
    "bbh/boolean_expressions": {
        "task": transfer.TASKS["bbh/boolean_expressions"]["task"],
        "recipe": {"training": {"epochs": 6}, "synthesis": {"temperature": 1.0}},
    },
}
QUICK = list(TASKS)[:3]
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"selection": {"method": "discriminator"}, "synthesis": {"fewest_shots": Synthesis().shots}},
    "default": {},
    "alone": {"selection": {"method": "none"}},
}
"""A recipe's sections that turn the default into each transfer's way. The paper's has as many examples as rows, and a kit of its own, whose task is `open`: a
list of seeds goes on, the discriminator has learnt from such lists, and any answer of the teacher counts. `alone` is a kit without a discriminator; where the
default asks none, it is the default."""
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "cut": {"selection": {"method": "discriminator"}},
    "target": {"synthesis": {"generator": "target"}},
    "turns": {"synthesis": {"generator": ["source", "target"]}},
    "adapter": {"synthesis": {"generator": "adapter"}},
}
"""More ways to do it."""
ARMS, MORE_ARMS = ["unfiltered"], ["seeds_only", "importance", "excess", "both"]
"""Arms that are made from the paper's candidates."""


def write_task(name: str, here: Path, data: Path, tested: int | None = None, **keys: object) -> Path:
    """The task's file, and beside it as test.jsonl the first `tested` test rows that are not among the training rows, as one of banking_cards is."""
    here.mkdir(parents=True, exist_ok=True)
    rows = data / name
    learnt = {normal(row.input) for row in read_rows(rows / "train.jsonl")}
    unseen = [row for row in read_rows(rows / "test.jsonl") if normal(row.input) not in learnt][:tested]
    (here / "test.jsonl").write_text("".join(json.dumps({"input": row.input, "target": row.target}) + "\n" for row in unseen))
    task = {"name": name.split("/")[1], "train": str(rows / "train.jsonl"), **keys}
    (here / "task.yaml").write_text(yaml.safe_dump(task))
    return here / "task.yaml"


def prepared(name: str, here: Path, data: Path, engine: str, task: dict[str, Any], tested: int | None = None) -> Path:
    """The kit of a task, made where it is not there yet; its test rows lie beside it."""
    file = write_task(name, here, data, tested, **task)
    if not (here / "kit").exists():
        translora("prepare", str(file), "--base", transfer.SOURCE, "--out", str(here / "kit"), "--engine", engine)
    return here / "kit"


def run(name: str, seed: int, data: Path, work: Path, threads: int, more: bool) -> Chain:
    """One chain, on `threads` cores."""
    here, ways = work / f"{name.split('/')[1]}-{seed}", WAYS | (OTHERS if more else {})
    task = write_task(name, here, data, seed=seed, generator_adapter=more, **TASKS[name]["task"])
    rows, asked = read_rows(data / name / "train.jsonl"), load_task(task)
    found = find_answers(asked, rows)
    labels, checked = found.classes, bool(found.classes) or found.answer_words != "any"
    common = {way: {**TASKS[name]["recipe"], **(_as_paper(len(rows), labels) if way == "paper" else {})} for way in ways}
    decide = {
        way: partial(
            Recipe.decided,
            classes=[] if way == "paper" else labels,
            rows=len(rows),
            discriminator={"calibration": []},
            copies=way != "paper" and isinstance(found.answer_words, list),
        )
        for way in ways
    }
    recipes = {way: _recipe(here, way, seed, threads, common[way], sections, decide[way]) for way, sections in ways.items()}
    decided = {way: decide[way](recipe) for way, recipe in recipes.items()}
    if decided["default"].selection.method == "none":
        del ways["alone"], decided["alone"]
    recipe_of = {way: recipe.model_dump() for way, recipe in decided.items()}
    settings = {"task": asked.model_dump() | {"train": name}, "recipes": recipe_of, "more": more, "oracle": "default"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if (kept := finished().get(name, {}).get(str(seed))) and kept["settings"] == digest:
        return dict(kept)
    transfer.keep_to(here, settings)
    kit = here / "kit"
    if not kit.exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--out", str(kit))
    kits = dict.fromkeys(ways, kit) | ({"paper": _paper_kit(name, here, data, threads, seed)} if checked else {})
    asked_of = {"paper": ("--arms", *ARMS, *(MORE_ARMS if more else [])), "default": ("--oracle", str(data / name / "train.jsonl"))}
    chain: Chain = {"commit": results.commit(), "settings": digest, "accuracy": {}, "verdicts": {}, "agreement": {}, "paired": {}, "candidates": {}}
    answers: dict[str, list[float]] = {}
    for way in ways:
        out = here / way
        manifest = transfer.transferred(here, threads, out, str(kits[way]), "--target", transfer.TARGET, "--recipe", str(here / f"{way}.yaml"))
        if way in asked_of:
            result = evaluated(here, threads, out, asked_of[way])
            answers = {arm: [row["scores"][arm] for row in RunStore(str(out)).answers()] for arm in result["arms"]}
            chain["accuracy"] |= {arm: value["accuracy"] for arm, value in result["arms"].items() if arm in SHOWN}
        else:
            adapter = AdapterRef("transferred", str(out / "adapter"))
            scores = answered(load(kit), transfer.TARGET, adapter, read_rows(here / "test.jsonl"), here / f"{way}-scores.json")
            result = summary(answers | {"transferred": scores}, "exact_match")
            result["gate"] = gate.on_rows(recipes[way].gate, result["against"])
        chain["accuracy"][way] = result["arms"]["transferred"]["accuracy"]
        chain["verdicts"][way] = [manifest["gate"]["verdict"], result["gate"]["verdict"]]
        chain["agreement"][way] = agreement(manifest)
        chain["paired"][way] = [result["against"][key] for key in ("difference", "low", "high")]
        chain["candidates"][way] = manifest["counts"]["candidates"]
    if "alone" not in ways:
        chain["accuracy"]["alone"] = chain["accuracy"]["default"]
    return chain


def _as_paper(rows: int, labels: object) -> dict[str, Any]:
    """As many examples as rows. Of snips_GetWeather's candidates the cut leaves one in thirty, so there may be more."""
    return {"selection": {"quota": rows, **({} if labels else {"max_candidates": 100})}}


def _recipe(
    here: Path, way: str, seed: int, threads: int, common: dict[str, Any], sections: dict[str, dict[str, Any]], decide: Callable[[Recipe], Recipe]
) -> Recipe:
    """The recipe of a way, which also lies in a file. The task's epochs are for `CHOSEN_FOR_A_ROW` examples a row; more examples take no more steps."""
    recipe = {"seed": seed, **common}
    for section, keys in sections.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    if way != "paper":
        epochs, asked = recipe["training"]["epochs"], decide(Recipe.model_validate({**recipe, "training": {}}))
        recipe["training"] = {**recipe["training"], "epochs": max(1, round(epochs * asked.training.passes / EPOCHS))}
    (here / f"{way}.yaml").write_text(yaml.safe_dump({"cluster": {"engine_cpus": threads, "worker_cpus": threads}, **recipe}))
    return Recipe.model_validate(recipe)


def _paper_kit(name: str, here: Path, data: Path, threads: int, seed: int) -> Path:
    """The same source adapter, any answer of the teacher, and a discriminator that has learnt from lists that go on."""
    kit = here / "paper-kit"
    task = write_task(name, here / "open", data, seed=seed, labels="open", **TASKS[name]["task"])
    if not kit.exists():
        transfer.translora(here, threads, "prepare", str(task), "--base", transfer.SOURCE, "--adapter", str(here / "kit" / "adapter"), "--out", str(kit))
    return kit


def evaluated(here: Path, threads: int, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    result = here / f"{out.name}.json"
    if not result.exists():
        transfer.translora(here, threads, "evaluate", str(out), "--data", str(here / "test.jsonl"), *options, "--json", str(result))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def agreement(manifest: dict[str, Any]) -> list[float]:
    """Agreement with the teacher, as the gate measured it, and the ends of its interval."""
    (found,) = (each for each in manifest["gate"]["checks"] if each["name"] == "agreement with the teacher")
    return [found["value"], found["low"], found["high"]]


def main() -> None:
    chosen, threads = transfer.options(__doc__, list(TASKS), "quality", quick=True)
    names = chosen.task or (QUICK if chosen.quick else list(TASKS))

    def work(name: str, seed: int) -> Chain:
        return run(name, seed, chosen.data.resolve(), chosen.work.resolve(), threads, chosen.more)

    def show(chains: dict[str, dict[int, Chain]]) -> None:
        if any(chains.values()):
            kept = keep(chains, TASKS)
            results.replace("quality", table(kept))
            plot(kept, KEPT.with_suffix(".svg"))

    transfer.run_all(chosen, names, work, show)


if __name__ == "__main__":
    main()
