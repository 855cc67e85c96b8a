"""Which candidates become examples, which answers count, and what the gate makes of the result."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.conftest import task_rows
from translora_ray import kit
from translora_ray.answers import copied, find_answers
from translora_ray.cluster import Cluster
from translora_ray.config import Privacy, Task
from translora_ray.engines.base import Complete, Generate, Generation, Sampling
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.evaluation import gate
from translora_ray.evaluation.distance import _hidden, _unit, bandwidth, mmd
from translora_ray.evaluation.metrics import well_formed
from translora_ray.evaluation.statistics import wilson
from translora_ray.gating import likeness, pass_gate
from translora_ray.progress import Display
from translora_ray.prompts import task_prompt
from translora_ray.recipe import Gate, GeneratorKind, Recipe, Selection, Synthesis
from translora_ray.records import Candidate, Pack, TaskRow, request_pack
from translora_ray.storage import RunStore
from translora_ray.stream.choose import choose
from translora_ray.stream.collect import LABEL_FULL, Collector, Totals
from translora_ray.stream.discriminate import calibrate, outline
from translora_ray.stream.plan import Plan
from translora_ray.stream.teach import ILL_FORMED, NOT_COPIED, OTHER_LABEL, UNSURE, Teacher


@pytest.fixture
def loaded(tiny_kit: Path) -> kit.Kit:
    return kit.load(tiny_kit)


def planned(loaded: kit.Kit, held_out: float = 0.1, **selection: Any) -> Plan:
    recipe = Recipe(selection=Selection(quota=20, **selection), gate=Gate(held_out=held_out), synthesis=Synthesis(pack_size=4))
    return Plan(loaded, "target", recipe, Cluster(commit_seconds=0), "transformers", 1.0, 0.0)


def candidates(count: int) -> list[Candidate]:
    draw = random.Random(0)
    return [Candidate(i, i, f"prompt {i}", draw.gauss(0, 1), "a", excess=draw.gauss(0, 1)) for i in range(count)]


@pytest.mark.parametrize(("method", "wanted"), [("discriminator", 22), ("none", 22), ("excess", 44), ("importance", 44), ("both", 44)])
def test_methods_that_choose_want_more_answers_than_examples(loaded: kit.Kit, method: str, wanted: int) -> None:
    plan = planned(loaded, method=method)
    assert (plan.quota, plan.held_out, plan.wanted) == (20, 2, wanted)
    trained, held_out = choose(plan, candidates(wanted))
    assert (len(trained), len(held_out)) == (20, 2)
    assert [row.index for row in trained + held_out] == sorted({row.index for row in trained + held_out})


def test_excess_takes_the_highest(loaded: kit.Kit) -> None:
    rows = candidates(44)
    best = sorted([row for row in rows if row.index not in (3, 4)], key=lambda row: row.excess or 0.0)[-22:]
    rows[3].excess, rows[4].excess = None, math.nan
    trained, held_out = choose(planned(loaded, method="excess"), rows)
    assert {row.index for row in trained + held_out} == {row.index for row in best}


def test_what_is_chosen_has_no_more_of_a_label_than_its_share(loaded: kit.Kit) -> None:
    rows = candidates(44)
    for row in rows:
        row.excess, row.target = (1.0, "a") if row.index < 30 else (0.5, "b")
    trained, held_out = choose(planned(loaded, method="excess", balance=1.2), rows)
    assert Counter(row.target for row in trained + held_out) == {"a": 9, "b": 9}  # 1.2 * 22 / 3 of each at most
    for row in rows:
        row.target = ("(A)", "A", "A.")[row.index % 3]
    choices = replace(loaded, task=loaded.task.model_copy(update={"metric": "choice", "labels": ["A", "B", "C"]}))
    assert len([*chain(*choose(planned(choices, method="excess", balance=1.2), rows))]) == 9, "they are one label"


def test_importance_draws_by_the_calibrated_odds_and_not_only_the_best(loaded: kit.Kit) -> None:
    """Written ones have verdicts from N(0, 1), real ones would have them from N(1, 1): log-odds of v - 1/2, and a mean near 1 of those chosen."""
    sure = replace(loaded, discriminator={"calibration": [1.0, -0.5]})
    plan = planned(sure, method="importance", held_out=0.0, surplus=10.0)
    means, worst = [], []
    for start in range(20):
        draw = random.Random(start)
        rows = [Candidate(i, 1000 * start + i, str(i), draw.gauss(0, 1), "a") for i in range(200)]
        trained, _ = choose(plan, rows)
        means.append(numpy.mean([row.verdict or 0.0 for row in trained]))
        worst.append(min(row.verdict or 0.0 for row in trained))
    assert numpy.mean(means) == pytest.approx(0.93, abs=0.12)  # a little less than 1: drawn without replacement
    assert max(worst) < 1.2  # the 20 best of 200 would all be above


def test_calibration_finds_the_odds_of_two_known_distributions() -> None:
    """N(2, 1) against N(0, 1): the log-odds are 2 v - 2, whatever the numbers of each."""
    draw = random.Random(0)
    a, b = calibrate([draw.gauss(2, 1) for _ in range(4000)], [draw.gauss(0, 1) for _ in range(1000)])
    assert (a, b) == (pytest.approx(2.0, abs=0.2), pytest.approx(-2.0, abs=0.25))
    a, b = calibrate([5.0] * 5, [-5.0] * 5)  # told apart wholly: finite all the same
    assert 0 < a < 2


def test_prepare_calibrates_the_discriminator(loaded: kit.Kit) -> None:
    a, b = planned(loaded, method="importance").calibration
    assert math.isfinite(a) and math.isfinite(b)


@pytest.mark.parametrize(
    ("selection", "without", "message"),
    [
        ({"method": "importance"}, {"discriminator": None}, "has no discriminator, which selection.method importance asks"),
        ({"method": "importance"}, {"discriminator": {}}, "made before discriminators were calibrated"),
        ({"balance": 2.0}, {"open": True}, "selection.balance needs a task with labels"),
        ({"as_asked": True}, {"open": True}, "selection.as_asked needs a task with labels"),
        ({"as_asked": True}, {}, "selection.as_asked compares with the label that was asked for, and a list asks for none"),
    ],
)
def test_a_kit_that_lacks_what_the_recipe_asks_is_refused(loaded: kit.Kit, selection: dict[str, Any], without: dict[str, Any], message: str) -> None:
    if without.pop("open", False):
        without = {"task": loaded.task.model_copy(update={"labels": "open"})}
    with pytest.raises(UsageError, match=message):
        planned(replace(loaded, **without), **selection).check()


def test_labels_that_are_checked_select_else_the_discriminator(loaded: kit.Kit) -> None:
    labelled = replace(loaded, task=loaded.task.model_copy(update={"labels": list("abcdef")}))
    assert [planned(labelled, **asked).method for asked in ({}, {"as_asked": False}, {"method": "discriminator"})] == ["none", "importance", "discriminator"]
    assert planned(replace(labelled, discriminator=None)).method == "none"
    assert planned(loaded).method == "importance"
    assert planned(replace(loaded, discriminator={})).method == "discriminator", "it was made before they were calibrated"
    assert Recipe(overlap=True).selects([], loaded.discriminator).method == "discriminator"
    alone = planned(replace(loaded, discriminator=None))
    assert (alone.method, alone.chooses, alone.judges) == ("none", False, False)
    assert [pool.roles for pool in alone.pools()] == [("generator", "teacher")]
    unjudged = planned(loaded, method="none")
    assert [pool.roles for pool in unjudged.pools()] == [("generator", "teacher")]


def test_labels_are_asked_for_where_there_are_more_than_a_list_shows(loaded: kit.Kit) -> None:
    kits = [replace(loaded, task=loaded.task.model_copy(update={"labels": labels})) for labels in (list("abcdef"), list("abcde"), "open")]
    assert [planned(one).as_asked for one in kits] == [True, False, False]
    assert planned(kits[0], as_asked=False).selection.as_asked is False
    found = [planned(one).synthesis("source") for one in kits]
    assert [(settings.by_label, settings.temperature) for settings in found] == [(True, 1.0), (False, 0.7), (False, 0.7)]
    assert Synthesis().settled(["a"], "adapter").by_label and Synthesis(by_label=True).settled(["a"]).by_label
    as_said = Synthesis(by_label=False, temperature=0.9, high_temperature=0.9, fewest_shots=5, fill=False)
    assert Synthesis(by_label=False, temperature=0.9).settled(["a"]) == as_said


def test_by_label_half_of_the_requests_are_warmer() -> None:
    def high(classes: str, generator: GeneratorKind = "source", **keys: Any) -> float | None:
        return Synthesis(**keys).settled(list(classes), generator).high_temperature

    assert (high("abcdef"), high("abc"), high("")) == (1.5, 0.7, 0.7)
    assert high("abcdef", "adapter") == 1.0, "an adapter has learnt how inputs are spread"
    assert high("abcdef", temperature=1.2) == 1.2 and high("abcdef", temperature=1.2, high_temperature=1.4) == 1.4
    assert Recipe().decided(list("abcdef"), 10, None).synthesis.high_temperature == 1.5


@pytest.mark.parametrize(
    ("labels", "keys", "quota", "epochs"),
    [
        ("abcdef", {}, 40, 3),
        ("", {}, 20, 6),
        ("", {"selection": {"method": "none"}}, 40, 3),
        ("abcdef", {"selection": {"quota": 10}}, 10, 6),
        ("abcdef", {"selection": {"quota": 500}}, 500, 1),
        ("abcdef", {"training": {"epochs": 5}}, 40, 5),
    ],
)
def test_more_examples_take_no_more_steps(labels: str, keys: dict[str, Any], quota: int, epochs: int) -> None:
    found = Recipe.model_validate(keys).decided(list(labels), 10, {"calibration": (1, 0)})
    assert (found.selection.quota, found.training.epochs) == (quota, epochs)


def test_no_label_gets_more_than_its_share(loaded: kit.Kit, tmp_path: Path) -> None:
    assert loaded.task.classes == ["a", "b", "c"]
    plan = planned(loaded, method="discriminator", balance=1.2, near_duplicate=1.0)
    assert plan.most_of_a_label(plan.wanted) == 9  # 1.2 * 22 / 3
    collector = Collector(plan, RunStore(str(tmp_path / "run")))
    for number in range(20):
        pack = request_pack(0, number, 4)
        for candidate in pack.candidates:
            candidate.input, candidate.target = f"prompt {candidate.index}", "a" if candidate.index % 4 else random.Random(candidate.index).choice("bc")
        collector.take(pack, [])
        if collector.full:
            break
    counted = collector.labels
    assert max(counted.values()) == 9 and sum(counted.values()) == 22
    assert collector.totals.rejects[LABEL_FULL] > 0
    assert Collector(plan, collector.store).labels == counted  # also after an interruption


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"labels": ["card lost", "refund"]}, "refund", "refunds"),
        ({"labels": ["(A)", "(B)"], "metric": "choice"}, "The answer is (B)", "C"),
        ({"metric": "number"}, "so it is 12", "twelve"),
        ({"metric": "choice"}, "(C)", "none"),
        ({"metric": "code"}, "def f(): return 1", "def f(: return"),
        ({"metric": "code"}, "-1", "-" * 100_000 + "1"),
        ({}, "anything", " "),
    ],
)
def test_answers_that_can_not_be_right_are_known(keys: dict[str, Any], good: str, bad: str) -> None:
    task = Task(name="t", prompt="{input}", train="t", **keys)
    assert (well_formed(task, good), well_formed(task, bad)) == (True, False)


def test_labels_are_found_where_targets_are_classes() -> None:
    task = Task(name="t", prompt="{input}", train="rows.jsonl")
    classes = [TaskRow(str(i), "ab"[i % 2]) for i in range(20)]
    assert find_answers(task, classes).classes == ["a", "b"]
    assert find_answers(task, [TaskRow(str(i), str(i)) for i in range(20)]).labels == "open"
    assert find_answers(task, [TaskRow(str(i), "a") for i in range(20)]).labels == "open"  # nothing to tell apart
    assert find_answers(task.model_copy(update={"labels": "open"}), classes).labels == "open"
    with pytest.raises(UsageError, match=r"rows.jsonl: 10 rows have a target that is none of the task's labels, 'b' first"):
        find_answers(task.model_copy(update={"labels": ["a", "c"]}), classes)


SLOTS = [TaskRow(f"weather in {place} on {day}", f"city={place}; day={day}") for place, day in zip("ABCDEFGHIJ", "KLMNOPQRST", strict=True)]


def test_words_beside_the_inputs_are_found_where_answers_are_copies() -> None:
    task = Task(name="t", prompt="{input}", train="rows.jsonl")
    found = find_answers(task, SLOTS)
    assert (found.labels, found.answer_words) == ("open", ["city", "day"])
    assert copied(found, "day=R; city=Rome", "how is Rome on R")
    assert not copied(found, "city=rome", "how is Rome") and not copied(found, "town=Rome", "how is Rome")
    closed = [TaskRow(f"question {i}", "first" if i % 2 else "second") for i in range(10)]
    assert find_answers(task.model_copy(update={"metric": "rouge_l"}), closed).answer_words == "any", "nothing in them is a copy"
    assert find_answers(task.model_copy(update={"generator_privacy": Privacy()}), SLOTS).answer_words == "any"
    others = [TaskRow(f"question {i}", f"one says {i} of {i * 7}") for i in range(10)]
    assert find_answers(task, others).answer_words == "any"
    assert find_answers(task.model_copy(update={"labels": "open"}), SLOTS).answer_words == "any"  # no words are told of answers that are to stay open
    assert find_answers(task.model_copy(update={"answer_words": "any"}), SLOTS).answer_words == "any"
    assert copied(task, "whatever", "it says") and copied(find_answers(task, others), "whatever", "it says")
    with pytest.raises(UsageError, match=r"rows.jsonl: 10 rows have a target with words that are neither their input's nor in answer_words, 'day' first: add"):
        find_answers(task.model_copy(update={"answer_words": ["city"]}), SLOTS)


class Voter:
    """An engine that gives scripted answers in turn."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.seeds: list[int] = []

    def fits(self, prompt: object, new_tokens: int) -> bool:
        return True

    def generate(self, requests: list[Generate]) -> list[Generation]:
        self.seeds += [request.seed for request in requests]
        return [Generation(text, 1, 1, text != "endless") for text in self.answers]


@pytest.mark.parametrize(
    ("answers", "target", "reason"),
    [
        (["a", "b", "a", "a", "a"], "a", None),
        (["a", "b", "a", "b", "a"], "a", UNSURE),
        (["a", "endless", "endless", "a", "a"], "a", None),
        (["endless"] * 5, "endless", "answer too long"),
        (["z"] * 5, "z", ILL_FORMED),
        (["b", "The (A).", "(A)", "I say A", "A"], "The (A).", None),
        (["1 and 2 make 3", "so 3", "3.0", "4", "it is 3"], "1 and 2 make 3", None),
    ],
)
def test_the_teachers_votes_are_counted(loaded: kit.Kit, answers: list[str], target: str, reason: str | None) -> None:
    voter = Voter(answers)
    pack = Pack(0, [Candidate(0, 7, "red 1 blue")])
    read = {"(A)": {"metric": "choice", "labels": ["(A)", "(B)"]}, "so 3": {"metric": "number", "labels": "open"}}
    task = loaded.task.model_copy(update=next((read[answer] for answer in answers if answer in read), {}))
    Teacher(voter, task, loaded.adapter, selection=Selection(votes=5, margin=0.4)).process(pack)  # type: ignore[arg-type]
    assert (pack.candidates[0].target, pack.candidates[0].reason) == (target, reason)
    assert len(set(voter.seeds)) == 5


def test_an_answer_that_is_not_from_its_prompt_is_a_reject(loaded: kit.Kit) -> None:
    pack = Pack(0, [Candidate(0, 7, "how is Rome"), Candidate(1, 8, "how is Rome")])
    task = loaded.task.model_copy(update={"labels": "open", "answer_words": ["city"]})
    for candidate, answer in zip(pack.candidates, ("city=Rome", "city=Paris"), strict=True):
        Teacher(Voter([answer]), task, loaded.adapter).process(Pack(0, [candidate]))  # type: ignore[arg-type]
    assert [candidate.reason for candidate in pack.candidates] == [None, NOT_COPIED]


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama)
    yield engine
    engine.close()


def test_excess_is_what_the_adapter_adds_to_each_token(engine: TransformersEngine, loaded: kit.Kit) -> None:
    pack = Pack(0, [Candidate(i, i, row["input"]) for i, row in enumerate(task_rows(6))])
    Teacher(engine, loaded.task, loaded.adapter, by_excess=True).process(pack)
    for candidate in pack.open():
        prompt = task_prompt(loaded.task.prompt, candidate.input, "text")
        ours, bare = engine.token_logprobs([Complete(prompt, candidate.target or "", adapter) for adapter in (loaded.adapter, None)])
        assert candidate.excess == pytest.approx(numpy.mean(ours) - numpy.mean(bare), abs=0.05)
        assert candidate.excess > 0  # the adapter was trained on these rows
    greedy = engine.generate([Generate(task_prompt(loaded.task.prompt, row.input, "text"), Sampling(4), loaded.adapter) for row in pack.open()])
    assert [answer.text.strip() for answer in greedy] == [row.target for row in pack.open()]


def test_likeness_is_the_share_of_pairs_in_which_an_example_looks_more_real() -> None:
    draw = random.Random(0)
    real = [draw.gauss(2.0, 1.5) for _ in range(400)]
    for mean, area in ((2.0, 0.5), (0.5, 0.24), (-4.0, 0.0)):  # the chance that one normal number is above another
        examples = [Candidate(i, i, "", draw.gauss(mean, 1.5)) for i in range(400)]
        found = likeness({"real_verdicts": outline(real), "held_out_real": 400}, [*examples, Candidate(400, 0, "")])
        assert found["likeness"] == pytest.approx(area, abs=0.04) and 0.45 < found["chance"] < 0.47
    assert likeness({"true_accept_rate": 1.0}, examples) == likeness({"real_verdicts": [1.0], "held_out_real": 1}, [Candidate(0, 0)]) == {}


@pytest.mark.parametrize(("unsettled", "warm"), [(0, False), (3, False), (70, False), (3, True)])
def test_agreement_counts_prompts_between_labels_by_their_share(loaded: kit.Kit, unsettled: int, warm: bool) -> None:
    plan = planned(loaded)  # 20 examples and 2 held out
    rows = [Candidate(i, i, f"prompt {i}", 1.0, "a") for i in range(22)]
    rows += [Candidate(2 * i, 22 + i, f"hard {i}", 1.0, "b", OTHER_LABEL) for i in range(unsettled)]
    if warm:  # every other pack of two is written at a higher temperature
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"synthesis": Synthesis(temperature=1.0, high_temperature=1.5, pack_size=1)}))
        rows += [Candidate(2 * i + 1, i, f"warm {i}", 1.0, "b", OTHER_LABEL) for i in range(9)]
    rows += [Candidate(200, 200, "Prompt 0", 1.0, "b", OTHER_LABEL), Candidate(202, 201, "hard 0", 1.0, "b", OTHER_LABEL if unsettled else "off task")]
    asked: list[str] = []

    def run(_given: Any, _plan: Plan, _store: RunStore, inputs: list[str]) -> list[str]:
        asked.extend(inputs)
        return ["a", "b", *["a"] * (len(inputs) - 2 - len(loaded.seeds)), *(seed.target for seed in loaded.seeds)]

    totals = Totals(candidates=len(rows), accepted=22)
    with Display() as display:
        found = pass_gate(plan, None, rows, choose(plan, rows), totals, run, display)  # type: ignore[arg-type]
    assert found and asked == ["prompt 20", "prompt 21", *[f"hard {i}" for i in range(min(64, unsettled))], *loaded.seed_inputs]
    by_name = {check["name"]: check["value"] for check in found["checks"]}
    accepted = 11 if warm else 22
    assert by_name["agreement with the teacher"] == pytest.approx(accepted / (accepted + unsettled) * 0.5) and by_name["accuracy on the seeds"] == 1.0
    share, (low, high), (lowest, _) = unsettled / (accepted + unsettled), wilson(1, 2), wilson(0, min(64, unsettled) or 1)
    assert found["checks"][0]["high"] == pytest.approx(high), "perhaps no real prompt lies between labels"
    assert found["checks"][0]["low"] == pytest.approx((1 - share) * low + share * lowest)
    assert (found["checks"][1]["low"], found["checks"][1]["high"]) == pytest.approx(wilson(len(loaded.seeds), len(loaded.seeds)))
    assert (found["held_out"], found["between"]) == (2, min(64, unsettled))


def test_what_does_not_fit_into_the_target_is_not_asked_by_the_gate(loaded: kit.Kit) -> None:
    plan, rows = planned(loaded), [Candidate(i, i, f"prompt {i}", 1.0, "a") for i in range(22)]
    given = ["a", None, None, *(seed.target for seed in loaded.seeds[1:])]
    with Display() as display:
        found = pass_gate(plan, None, rows, choose(plan, rows), Totals(candidates=22, accepted=22), lambda *asked: given, display)  # type: ignore[arg-type]
    assert found and [check["value"] for check in found["checks"][:2]] == [1.0, 1.0] and found["held_out"] == 1


def answered(accepted: float = 0.5, given: str = "aabbcc", of: int = 30, **measured: float) -> dict[str, Any]:
    seen = gate.answers(["a", "b", "c"], [TaskRow("1", "a"), TaskRow("2", "b")], list(given))
    shares = {"agreement": 1.0, "seeds": 1.0, **measured}
    ends = {f"{name}_ends": wilson(shares[name] * of, of) for name in ("agreement", "seeds")}
    return gate.without_rows(Gate(), shares | ends, accepted, seen)


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        ({}, "ship", None),
        ({"agreement": 0.8}, "review", r"answers new prompts otherwise than its teacher \(0.800, 0.627 to 0.905\)"),
        ({"agreement": 0.8, "of": 300}, "refuse", "otherwise than its teacher"),  # of thirty it may be enough
        ({"agreement": 0.95, "of": 20}, "ship", None),
        ({"agreement": 0.0, "of": 4}, "refuse", "otherwise than its teacher"),
        ({"of": 3}, "review", r"too few answers for the accuracy on the seeds \(1.000, 0.439 to 1.000\)"),
        ({"of": 5}, "ship", None),
        ({"agreement": math.nan}, "refuse", "otherwise than its teacher"),
        ({"seeds": 0.2, "accepted": 0.001}, "refuse", "gets seeds wrong"),
        ({"accepted": 0.001}, "review", "few candidates"),
        ({"likeness": 0.3, "chance": 0.4}, "ship", None),
        ({"likeness": 0.1, "chance": 0.4}, "review", "far from real prompts"),
        ({"likeness": 0.1, "chance": 0.05}, "ship", None),
        ({"given": "aabb"}, "review", "'c' is the label of none of the examples"),
        ({"given": "ab" * 15 + "c"}, "review", "'c' is the label of 1 of the examples"),
        ({"given": "ab" * 6 + "c"}, "ship", None),
        ({"given": "a" * 98 + "bc"}, "review", "nearly all examples have one answer"),
    ],
)
def test_the_gate_says_why(found: dict[str, Any], verdict: str, reason: str | None) -> None:
    judged = answered(**found)
    assert judged["verdict"] == verdict
    if reason:
        assert any(re.search(reason, each) for each in judged["reasons"])
    else:
        assert judged["reasons"] == []
    assert json.dumps(judged)


def test_answers_that_can_not_be_told_right_from_wrong_are_for_a_person() -> None:
    seen = gate.answers([], [TaskRow("1", "a"), TaskRow("2", "b")], list("abcdef"))
    few = gate.without_rows(Gate(), {"agreement": 0.2, "agreement_ends": wilson(60, 300)}, 0.5, seen)
    assert few["verdict"] == "review" and "otherwise than its teacher" in few["reasons"][0]
    all_ = gate.without_rows(Gate(), {"agreement": 1.0, "agreement_ends": wilson(300, 300)}, 0.5, seen)
    assert all_["verdict"] == "ship" and "accuracy on the seeds" not in [check["name"] for check in all_["checks"]]


@pytest.mark.parametrize(("low", "high", "verdict"), [(-0.04, 0.03, "ship"), (-0.08, 0.01, "review"), (-0.2, -0.06, "refuse")])
def test_real_rows_decide_by_the_whole_interval(low: float, high: float, verdict: str) -> None:
    paired = {"arm": "source_adapter", "difference": (low + high) / 2, "low": low, "high": high, "p": 0.5}
    assert gate.on_rows(Gate(loss=0.05), paired)["verdict"] == verdict


def test_mmd_is_nothing_between_halves_and_something_between_others(tiny_llama: str) -> None:
    real = random.Random(1).sample([row["input"] for row in task_rows(80)], 80)
    other = [f"{i} times {i + 1} is what number?" for i in range(40)]
    with Display() as display:
        vectors = _unit(_hidden(tiny_llama, None, [*real, *other], display))
    assert numpy.linalg.norm(vectors, axis=1) == pytest.approx(numpy.ones(120), abs=1e-4)
    width = bandwidth(vectors)
    same, apart = mmd(vectors[:40], vectors[40:80], width), mmd(vectors[:80], vectors[80:], width)
    assert abs(same) < 0.05
    assert apart > 0.3


def test_a_recipe_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="excess chooses among all examples"):
        Recipe(overlap=True, selection=Selection(method="excess"))
    with pytest.raises(ValueError, match="refuse must not be higher than ship"):
        Gate(ship=0.3, refuse=0.5)
