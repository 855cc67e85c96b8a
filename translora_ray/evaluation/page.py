"""`RUN/report.html`: one page that says whether a transferred adapter may ship, and shows what that rests on. Made from what the run directory holds.

Nothing in it is loaded from elsewhere. It holds texts: seeds' labels, candidates, and after `translora evaluate` the test rows that the adapter lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from translora_ray.config import Task
from translora_ray.evaluation import plots
from translora_ray.evaluation.markup import Html, document, figure, listed, section, soft, table, tag
from translora_ray.evaluation.report import ARMS, looked_at, trainings
from translora_ray.evaluation.statistics import flips
from translora_ray.recipe import CUTTING, Recipe
from translora_ray.records import Candidate, TaskRow
from translora_ray.releases import verdict
from translora_ray.storage import MAP, REPORT, RESULT, RunStore
from translora_ray.stream.collect import NOT_NEEDED

EXAMPLES, PER_REASON, FLIPS = 6, 2, 20
"""Rows shown of the accepted candidates, of the rejected ones for each reason, and of the negative flips."""
LONGEST = 600
"""Characters of a text that are shown."""
FIGURES = {"verdict": "log-odds", "excess": "excess"}
"""Figures of a candidate, and what they are called."""
VERDICTS = {"ship": "the adapter may ship", "review": "a person should look at it before it ships", "refuse": "the adapter must not ship"}
NO_DATA = "This run was not evaluated on real rows: translora evaluate RUN --data test.jsonl adds them here."


@dataclass(frozen=True)
class Run:
    """What the page is made from. `result`, `answers` and `map` are there after `translora evaluate`."""

    uri: str
    manifest: dict[str, Any]
    seeds: Sequence[TaskRow]
    candidates: list[Candidate]
    result: dict[str, Any] | None
    answers: list[dict[str, Any]]
    map: dict[str, Any] | None

    @property
    def accepted(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.accepted]

    @property
    def rejected(self) -> list[Candidate]:
        """Those that came when the quota was full are neither."""
        return [candidate for candidate in self.candidates if candidate.reason not in (None, NOT_NEEDED)]

    @property
    def recipe(self) -> Recipe:
        return Recipe.model_validate(self.manifest["recipe"])


def write(store: RunStore, manifest: dict[str, Any], seeds: Sequence[TaskRow]) -> None:
    """Write the run's report, or write it again; `seeds` are those of its kit."""
    candidates = store.candidates()
    found = [store.read_json(name) if store.exists(name) else None for name in (RESULT, MAP)]
    run = Run(place(store), manifest, seeds, candidates, found[0], store.answers(), found[1])
    store.write(REPORT, render(run).encode())


def place(store: RunStore) -> str:
    """Where the run lies, for people to read: a URI may have keys in it."""
    return store.root if store.local else f"{store.uri.split('://')[0]}://{store.root}"


def render(run: Run) -> str:
    manifest = run.manifest
    name, bases = manifest["task"]["name"], f"From {manifest['source_base']} to {manifest['target_base']}, "
    parts = (_verdict, _tiles, _results, _gate, _stream, _scores, _texts, _map, _training, _examples, _flips, _costs, _origin)
    head = tag("header", tag("h1", f"Transfer report: {name}"), tag("p", bases, tag("code", run.uri)))
    return document(f"Transfer report: {name}", head, tag("main", *(part(run) for part in parts)))


def _verdict(run: Run) -> Html:
    without, real = run.manifest.get("gate"), run.result and run.result["gate"]
    judged, before = (real, without) if real else (without, None)
    if real and without and verdict(without, run.result) != real["verdict"]:
        judged, before = without, real
    if judged is None:
        reason = "The recipe holds no examples out for the gate (gate.held_out is 0), and the run was not evaluated on real rows."
        return tag("div", tag("h2", "Verdict: none"), tag("p", reason), class_="banner")
    on_rows = f"on {run.result['n']} real rows" if run.result else ""
    where, there = ("without real rows", on_rows) if judged is without else (on_rows, "without real rows")
    lines = [tag("h2", f"Verdict: {judged['verdict']}"), tag("p", f"{where[0].upper()}{where[1:]}: {VERDICTS[judged['verdict']]}.")]
    if judged["reasons"]:
        lines.append(listed(judged["reasons"]))
    if before:
        why = f" ({'; '.join(before['reasons'])})" if before["reasons"] else ""
        lines.append(tag("p", f"The other one, {there}, is {before['verdict']}{why}."))
    return tag("div", *lines, class_=f"banner {judged['verdict']}")


def _tiles(run: Run) -> Html:
    counts = run.manifest["counts"]
    shown: list[tuple[str, str]] = []
    if run.result:
        for arm in ("transferred", "source_adapter"):
            value = run.result["arms"][arm]
            shown.append((f"{value['accuracy']:.3f}", f"{ARMS[arm]}, {value['low']:.3f} to {value['high']:.3f}"))
        if run.result["recovery"] is not None:
            shown.append((f"{run.result['recovery']:.3f}", "recovery of what real rows gain"))
    elif run.manifest.get("gate"):
        shown += [(f"{check['value']:.3f}", check["name"]) for check in run.manifest["gate"]["checks"][:2]]
    shown.append((f"{run.manifest['training']['rows']:,}", "examples trained on"))
    shown.append((f"{counts['accepted'] / max(1, counts['candidates']):.1%}", f"of {counts['candidates']:,} candidates accepted"))
    return listed([Html(tag("b", value) + tag("span", name)) for value, name in shown], class_="tiles")


def _results(run: Run) -> Html:
    title, result = "Accuracy of the arms", run.result
    if result is None:
        return section(title, soft(NO_DATA))
    arms = {arm: result["arms"][arm] for arm in ARMS if arm in result["arms"]}
    rows = [(ARMS[arm], f"{value['accuracy']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}") for arm, value in arms.items()]
    caption = f"{result['metric']} on {result['n']} real rows, with Wilson's 95 % intervals"
    found = table(caption, ("arm", "accuracy", "95 % interval"), rows, numbers=(1, 2), marked=ARMS["transferred"])
    against = result["against"]
    interval = f"{against['low']:+.3f} to {against['high']:+.3f}; McNemar's p {against['p']:.2g}"
    facts = [
        f"Transferred minus {ARMS[against['arm']]}, row by row: {against['difference']:+.3f} ({interval}).",
        f"{result['negative_flips']} of {result['n']} rows were right on the bare target and are wrong now.",
    ]
    if result["recovery"] is not None:
        facts.append(f"Recovery: {result['recovery']:.3f} of what training on the real rows gains over the bare target.")
    facts += [f"{line[0].upper()}{line[1:]}." for line in (*trainings(result), *looked_at(result))]
    return section(title, found, listed(facts), figure(plots.arms(arms, ARMS), "Accuracy on the real rows; bars are 95 % intervals."))


def _gate(run: Run) -> Html:
    title, gate = "What the gate measured without real rows", run.manifest.get("gate")
    if gate is None:
        return section(title, soft("Nothing: the recipe holds no examples out for it (gate.held_out is 0)."))
    rows = [(check["name"], _value(check), check["wanted"], tag("span", check["verdict"], class_=check["verdict"])) for check in gate["checks"]]
    caption = f"{gate['held_out']} accepted examples were held out of training and answered by the adapter"
    if gate.get("between"):
        caption += f", and {gate['between']} prompts that the teacher gave another label than they were written for"
    return section(title, table(caption, ("check", "value", "wanted", "verdict"), rows, numbers=(1,)))


def _value(check: dict[str, Any]) -> str:
    return f"{check['value']:.3f}" + (f" ({check['low']:.3f} to {check['high']:.3f})" if "low" in check else "")


def _stream(run: Run) -> Html:
    counts, written = run.manifest["counts"], max(1, run.manifest["counts"]["candidates"])
    kinds = [("accepted", counts["accepted"]), *sorted(counts["rejects"].items(), key=lambda item: -item[1])]
    rows = [(name if name in ("accepted", NOT_NEEDED) else f"rejected: {name}", f"{count:,}", f"{count / written:.1%}") for name, count in kinds]
    caption = f"{counts['candidates']:,} candidates, selected by {run.manifest['selection']}; of the accepted ones {counts['trained']:,} were trained on, "
    caption += f"{counts['held_out']:,} held out for the gate and {counts['left']:,} left over"
    content = [table(caption, ("outcome", "candidates", "share"), rows, numbers=(1, 2))]
    if len(generators := counts.get("generators", {})) > 1:
        turns = [(name, f"{each['candidates']:,}", f"{each['accepted'] / max(1, each['candidates']):.1%}") for name, each in generators.items()]
        content.append(table("Generators, which took turns", ("generator", "candidates", "accepted"), turns, numbers=(1, 2)))
    if run.candidates:
        plot = plots.over_time([candidate.reason for candidate in run.candidates], run.recipe.synthesis.pack_size, NOT_NEEDED)
        content.append(figure(plot, "What became of the candidates, from the first pack to the last."))
    return section("Candidates over time", *content)


def _scores(run: Run) -> Html:
    title = "Scores of the discriminator"
    real = ((run.result or {}).get("verdicts") or {}).get("real", [])
    groups = {"real": real, "accepted": _verdicts(run.accepted), "rejected": _verdicts(run.rejected)}
    if not groups["accepted"] and not groups["rejected"]:
        return section(title, soft("No candidate has one: this run asked no discriminator."))
    cut = (run.recipe.selection.threshold, "threshold") if run.manifest["selection"] in CUTTING else None
    caption = "Log-odds that a prompt is one of the task's, of the candidates that were asked about. The ends of the axis hold what lies beyond them."
    missing = [] if real else [soft("Scores of real rows come with translora evaluate, where the discriminator's base is the teacher's.")]
    return section(title, figure(plots.histogram(groups, "log-odds of the discriminator", cut), caption), *missing)


def _verdicts(candidates: Sequence[Candidate]) -> list[float]:
    return [candidate.verdict for candidate in candidates if candidate.verdict is not None and math.isfinite(candidate.verdict)]


def _texts(run: Run) -> Html:
    groups = {
        "seeds": [seed.input for seed in run.seeds],
        "real": [row["input"] for row in run.answers],
        "accepted": [candidate.input for candidate in run.accepted],
        "rejected": [candidate.input for candidate in run.rejected if candidate.input],
    }
    lengths = plots.histogram({name: [len(text) for text in texts] for name, texts in groups.items()}, "length of the prompt in characters")
    content = [figure(lengths, "Prompts, real and synthetic. The ends of the axis hold what lies beyond them.")]
    given = [candidate.target for candidate in run.accepted if candidate.target]
    if Task.model_validate(run.manifest["task"]).classes and given:
        content.append(figure(plots.labels([seed.target for seed in run.seeds], given), f"The {plots.MOST_LABELS} most frequent labels at most."))
    else:
        content.append(soft("The task's answers are open text: there are no labels to compare."))
    return section("Lengths and labels", *content)


def _map(run: Run) -> Html:
    title = "Map of the prompts"
    if run.map is None:
        return section(title, soft("It needs embeddings, which translora evaluate computes."))
    content = [figure(plots.plane(run.map["points"], run.map["variance"]), "Hidden states of the source base, on the two directions in which they vary most.")]
    if run.result and "distance" in run.result:
        far = run.result["distance"]
        told = f"Distance to the real rows (squared MMD, 0 for prompts of the same kind): trained on {far['filtered']:.3f}, all {far['unfiltered']:.3f}."
        content.append(tag("p", told))
    return section(title, *content)


def _training(run: Run) -> Html:
    training = run.manifest["training"]
    if not training.get("epoch_losses"):
        return section("Training", soft("No epoch was trained to its end."))
    steps = -(-training["rows"] // run.recipe.training.batch_size)
    plot = plots.loss(training.get("loss_curve", []), training["epoch_losses"], training["held_out_losses"], steps)
    caption = f"{training['rows']:,} rows, learning rate {training['learning_rate']:g}; the weights after epoch {training['best_epoch']} were taken."
    return section("Training", figure(plot, caption))


def _examples(run: Run) -> Html:
    accepted = _spread(run.accepted, EXAMPLES)
    reasons = dict.fromkeys(candidate.reason for candidate in run.rejected)
    rejected = [row for reason in reasons for row in _spread([row for row in run.rejected if row.reason == reason], PER_REASON)]
    asked = [name for name in FIGURES if any(getattr(row, name) is not None for row in run.candidates)]
    heads = ["prompt", "teacher's answer", *(FIGURES[name] for name in asked)]
    figures = range(2, len(heads))

    def cells(row: Candidate) -> list[str]:
        values = [getattr(row, name) for name in asked]
        return [_short(row.input), _short(row.target or ""), *("" if value is None else f"{value:+.2f}" for value in values)]

    kept = table("Accepted", heads, map(cells, accepted), figures, (0, 1)) if accepted else soft("None was accepted.")
    others = [[row.reason or "", *cells(row)] for row in rejected]
    lost = table("Rejected", ["reason", *heads], others, [column + 1 for column in figures], (1, 2)) if rejected else soft("None was rejected.")
    remark = (
        "Log-odds: what the discriminator gave. Excess: how much likelier the source adapter makes the answer, per token. Empty where it was not asked for."
    )
    return section("Examples", soft(remark) if asked else "", kept, lost)


def _spread(rows: list[Candidate], most: int) -> list[Candidate]:
    """`most` rows in even steps from the first on."""
    return [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _flips(run: Run) -> Html:
    title = "Rows that were lost"
    if not run.answers:
        return section(title, soft("They need real rows, which translora evaluate brings."))
    return section(title, *(part for arm in ("source_adapter", "target_base") for part in _lost(run, arm)))


def _lost(run: Run, arm: str) -> Iterator[Html]:
    """Rows that an arm gets right and the transferred adapter gets wrong, side by side: of the bare target negative flips."""
    before, after = ([row["scores"][each] for row in run.answers] for each in (arm, "transferred"))
    lost, won = flips(before, after), flips(after, before)
    told = f"{ARMS[arm].capitalize()}: {len(lost)} of {len(run.answers)} rows right that the transferred adapter gets wrong; the other way round {len(won)}."
    yield tag("p", told)
    if lost:
        picked = [run.answers[number] for number in lost[:FLIPS]]
        rows = [[_short(text) for text in (row["input"], row["target"], row["answers"][arm], row["answers"]["transferred"])] for row in picked]
        what = "Negative flips: right on the bare target" if arm == "target_base" else "Right with the source adapter"
        caption = f"{what}, wrong with the transferred one{f': the first {FLIPS}' if len(lost) > FLIPS else ''}"
        yield table(caption, ("input", "wanted", ARMS[arm], "transferred"), rows, texts=(0, 1, 2, 3))


def _costs(run: Run) -> Html:
    tokens, seconds, last = (run.manifest[name] for name in ("tokens", "seconds", "last_attempt_seconds"))
    rows = [
        (phase, f"{seconds.get(phase, 0):,.1f}", f"{tokens.get(phase, 0):,}", f"{tokens.get(phase, 0) / seconds[phase]:,.0f}" if seconds.get(phase) else "")
        for phase in dict.fromkeys([*seconds, *tokens])
    ]
    loads = run.manifest["counts"]["engine_loads"]
    told = [
        f"last attempt: {last['transfer']:,.1f} s from start to manifest, {last['stream']:,.1f} s of them for the stream",
        f"attempts that committed candidates: {len(loads)}; engines loaded: {sum(map(len, loads.values()))}",
        f"memory of the driver at its most: {run.manifest['driver_peak_mib']:,} MiB",
    ]
    caption = "All attempts together; packs that an engine computed at the same time share its seconds; of the discriminator prompts, not tokens"
    return section("Seconds and tokens", table(caption, ("phase", "seconds", "tokens", "tokens/s"), rows, numbers=(1, 2, 3)), listed(told))


def _origin(run: Run) -> Html:
    manifest = run.manifest
    names = ("source_base", "target_base", "target", "kit_path", "kit", "adapter_digest", "adapter_modules", "recipe_hash", "engine", "selection")
    facts = [(name.replace("_", " "), tag("code", manifest[name])) for name in names]
    facts += [(f"adapter {number} before it", tag("code", digest)) for number, digest in enumerate(manifest["lineage"], 1)]
    facts += [("adapter", tag("code", json.dumps(manifest["training"]["adapter"])))] if "adapter" in manifest["training"] else []
    versions = [(name, tag("code", number)) for name, number in manifest["versions"].items()]
    recipe = tag("details", tag("summary", "Recipe"), tag("pre", json.dumps(manifest["recipe"], indent=2)))
    both = table("Lineage and digests", ("what", "value"), facts), table("Versions", ("package", "version"), versions)
    return section("Lineage", *both, recipe)
