"""Prompts, records, metrics, repetition: text in, text out."""

import copy
import json
from pathlib import Path

import pytest

from translora_ray.errors import UsageError
from translora_ray.evaluation.compare import recovery, summary
from translora_ray.evaluation.gate import on_rows
from translora_ray.evaluation.metrics import choice, code, exact_match, number, rouge_l
from translora_ray.evaluation.statistics import flips, mcnemar, paired_interval, wilson
from translora_ray.kit import choose_seeds
from translora_ray.models import load_tokenizer
from translora_ray.prompts import (
    Prompt,
    answer_ids,
    answer_stops,
    few_shot_prompt,
    has_numbered_lines,
    labelled_prompt,
    parse_synthesis,
    prompt_ids,
    several_lines,
    synthesis_prompt,
    synthesis_stops,
    task_prompt,
)
from translora_ray.recipe import Gate
from translora_ray.records import Candidate, Pack, TaskRow, derive_seed, pack_to_table, packs_from_table, read_rows, request_pack
from translora_ray.stream.dedup import DUPLICATE, NEAR_DUPLICATE, SEED_COPY, SEED_PASSAGE, Passages, SeedFilter, Seen


def test_template_takes_braces_literally() -> None:
    assert task_prompt('{"q": "{input}"}', "a {b}", "text") == Prompt('{"q": "a {b}"}')


def test_synthesis_prompt_is_a_list_to_continue() -> None:
    prompt = synthesis_prompt(["one", "two", "three"], shots=2, seed=4)
    lines = prompt.text.split("\n")
    assert lines[0] == "Here are 4 examples:"
    assert lines[-1] == "3."
    assert {line[3:] for line in lines[1:3]} < {"one", "two", "three"}
    assert prompt == synthesis_prompt(["one", "two", "three"], shots=2, seed=4)
    assert len({synthesis_prompt(["one", "two", "three"], shots=2, seed=seed).text for seed in range(20)}) == 6


def test_labelled_prompt_shows_the_label_last_and_asks_for_it() -> None:
    seeds = [TaskRow("one", "a"), TaskRow("two", "b"), TaskRow("three", "b"), TaskRow("four", "c")]
    lines = labelled_prompt(seeds, shots=3, seed=4, label="b").text.split("\n")
    assert lines[0] in {"a: one", "c: four"} and set(lines[1:3]) == {"b: two", "b: three"} and lines[3] == "b:"
    assert labelled_prompt(seeds, shots=3, seed=4, label="b").text.split("\n") == lines
    unseen = labelled_prompt(seeds, shots=9, seed=4, label="d").text.split("\n")
    assert len(unseen) == 5 and unseen[-1] == "d:", "a label without seeds has its name"


@pytest.mark.parametrize(("seeds", "gap"), [(["one", "two"], "\n"), (["one\ntwo", "three"], "\n\n"), (["one\n\ntwo", "three"], "\n\n\n")])
def test_items_end_at_what_stands_between_them(seeds: list[str], gap: str) -> None:
    assert synthesis_stops(seeds) == (gap,)
    assert synthesis_prompt(seeds, shots=2, seed=0).text.split(gap)[0] == "Here are 4 examples:"
    labelled = labelled_prompt([TaskRow(seed, "a") for seed in seeds], shots=2, seed=0, label="a").text
    assert set(labelled.split(gap)[:2]) == {f"a: {seed}" for seed in seeds} and labelled.endswith(f"{gap}a:")


@pytest.mark.parametrize(("text", "item"), [(" buy milk", "buy milk"), ("a\n7. b", "a"), (" ", ""), ("costs 3. 50", "costs 3. 50")])
def test_parse_synthesis(text: str, item: str) -> None:
    assert parse_synthesis(text) == item


def test_items_with_numbered_lines_stay_whole() -> None:
    assert has_numbered_lines("Which is a fruit?\n1. apple\n2. chair") and not has_numbered_lines("costs 3. 50")
    assert parse_synthesis(" Which is a bird?\n1. crow", whole=True) == "Which is a bird?\n1. crow"
    assert parse_synthesis("7. crow", whole=True) == ""


@pytest.mark.parametrize(("targets", "stops"), [(["a", "b"], ("\n",)), (["yes\n", "no"], ("\n",)), (["a\nb", "c"], ())])
def test_answers_of_several_lines_do_not_end_at_the_first(targets: list[str], stops: tuple[str, ...]) -> None:
    assert answer_stops(several_lines([TaskRow("x", target) for target in targets]), "text") == stops
    assert answer_stops(False, "chat") == ()


def test_few_shot_shows_answers_and_ends_with_the_question() -> None:
    assert few_shot_prompt("Q: {input}\nA:", [("1", "one")], "2", "text").text == "Q: 1\nA: one\n\nQ: 2\nA:"


def test_prompt_and_answer_tokens_meet_with_one_blank(tiny_llama: str) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tiny_llama))  # it is shared
    prompt = Prompt("Q: red\nA:")
    ids = prompt_ids(tokenizer, prompt) + answer_ids(tokenizer, prompt, "b")
    assert tokenizer.decode(ids[:-1]) == "Q: red\nA: b"
    assert ids[-1] == tokenizer.eos_token_id


def test_chat_without_template_is_refused(tiny_llama: str) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        prompt_ids(load_tokenizer(tiny_llama), Prompt("hello", "chat"))


def test_chat_renders_one_user_message_with_the_bases_own_template(tiny_llama: str) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(tiny_llama))  # it is shared
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    assert tokenizer.decode(prompt_ids(tokenizer, Prompt("hi", "chat"))) == "user: hi\nbot: "


def test_seeds_and_packs_are_derived() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2) != derive_seed(1, "a", 3)
    assert request_pack(7, 2, 4) == request_pack(7, 2, 4)
    indices = [candidate.index for number in range(3) for candidate in request_pack(7, number, 4).candidates]
    assert indices == list(range(12))


def test_a_pack_survives_its_table() -> None:
    pack = Pack(3, [Candidate(0, 5, "a", -1.5, None, "off task"), Candidate(1, derive_seed(1), "b", None, "x", None)])
    pack.spend("teacher", 4, 0.5)
    table = pack_to_table(pack)
    assert table.num_rows == 1
    assert packs_from_table(table) == [pack]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"input": "a"}', "line 2: a row needs"),
        ('{"input": "a", "target": 3}', "line 2"),
        ('{"input": " ", "target": "b"}', "line 2"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "a", "target": "b"}) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=f"{path}, {message}"):
        read_rows(path)


def test_seeds_take_turns_between_targets() -> None:
    rows = [TaskRow(str(i), "often" if i else "rare") for i in range(50)]
    chosen = choose_seeds(rows, 4, seed=0)
    assert sorted(row.target for row in chosen) == ["often", "often", "often", "rare"]
    assert chosen == choose_seeds(rows, 4, seed=0)


def test_seeds_stand_for_each_kind_of_row_and_not_for_what_is_like_no_other() -> None:
    kinds = {"how": ["how do I share {}", "where do I find {}", "what is new in {}"], "bug": ["{} crashes", "the button of {} does nothing", "{} is blank"]}
    of = {kind.format(name): kind for found in kinds.values() for kind in found for name in ("Quill", "Orbit", "Tandem", "Lumen")}
    rows = [TaskRow(text, next(target for target, found in kinds.items() if kind in found)) for text, kind in of.items()]
    rows.append(TaskRow("xyzzy 0123456789 xyzzy 0123456789", "how"))
    chosen = choose_seeds(rows, 6, seed=3)
    assert {of.get(row.input) for row in chosen} == set(of.values())
    assert len(choose_seeds(rows, 1, seed=3)) == 1


def test_seeds_of_open_answers_stand_for_kinds_of_answers() -> None:
    places = [TaskRow(f"weather in {city}", f"city={city}") for city in ("Oslo", "Rome", "Lima", "Bern", "Kyiv", "Riga")]
    parks = [TaskRow(f"weather in {park}", f"geographic_poi={park}") for park in ("Oslo Park", "Rome Park", "Lima Park")]
    assert any(row in parks for row in choose_seeds(places + parks, 2, seed=0))


def test_of_more_targets_than_seeds_each_has_one_at_most() -> None:
    rows = [TaskRow(f"{word} {i}", word) for word, count in (("often", 90), ("rare", 2), ("seldom", 3), ("never", 1)) for i in range(count)]
    assert len({row.target for row in choose_seeds(rows, 3, seed=0)}) == 3
    assert len(choose_seeds(rows[:2], 5, seed=0)) == 2


def test_repetition() -> None:
    seen = Seen(0.9, ["set an alarm for eight"])
    assert seen.repeats("Set  an alarm for EIGHT") == DUPLICATE
    assert seen.repeats("set an alarm for eighty") == NEAR_DUPLICATE
    assert seen.repeats("what is the weather") is None
    pack = Pack(0, [Candidate(i, i, text) for i, text in enumerate(["set an alarm for eight", "roll a die", "Roll a die"])])
    assert [candidate.reason for candidate in SeedFilter(["set an alarm for eight"], 0.9).process(pack).candidates] == [SEED_COPY, None, DUPLICATE]


def test_words_taken_over_from_a_seed_are_found_but_not_what_seeds_have_in_common() -> None:
    frame = "here is a table of penguins and their ages in years:"
    seeds = [f"{frame} which of the penguins in it is older than louis", f"{frame} how many of the animals are younger than eight"]
    texts = [
        f"please answer this: {seeds[0]}, and be quick about it",  # a seed inside
        "which of the penguins in it is older",  # inside a seed
        f"{frame} what is the name of the last penguin in alphabetical order",  # the frame alone
        f"{frame} which of the penguins in this list has the longest of all names",  # half of a phrase
        "older than louis",  # too short to tell
    ]
    pack = Pack(0, [Candidate(i, i, text) for i, text in enumerate(texts)])
    assert [candidate.reason for candidate in SeedFilter(seeds, 0.95, 0.8).process(pack).candidates] == [SEED_PASSAGE, SEED_PASSAGE, None, None, None]
    assert not Passages([], 0.8).repeats(texts[0])
    assert Passages([seeds[0], seeds[0].upper()], 0.8).repeats(texts[0])  # a seed that is there twice is no frame


def test_metrics() -> None:
    assert exact_match(" True", "True") == 1 and exact_match("true", "True") == 0
    assert choice("The answer is (B).", "(B)") == 1 and choice("(A)", "(B)") == 0 and choice("none", "(B)") == 0
    assert number("so 1,200 + 34 = 1,234.", "#### 1234") == 1 and number("no idea", "3") == 0
    assert rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3) and rouge_l("", "a") == 0
    assert code("def f(): return 3", "assert f() == 3") == 1 and code("def f(): return 4", "assert f() == 3") == 0
    assert code("\0", "assert True") == 0


def test_intervals() -> None:
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    ours, theirs = [1.0] * 60 + [0.0] * 40, [0.0] * 10 + [1.0] * 50 + [0.0] * 40
    difference, low, high = paired_interval(ours, theirs)
    assert difference == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.05, 0.16), abs=0.011)  # 10 of 100 rows differ, all one way: a binomial's 2.5 % tails are 0.05 and 0.16
    assert paired_interval(ours, theirs) == (difference, low, high)
    assert paired_interval(ours, ours) == (0.0, 0.0, 0.0)


def test_mcnemar_and_flips() -> None:
    ours, theirs = [1.0] * 9 + [0.0] * 1 + [1.0] * 5, [0.0] * 9 + [1.0] * 1 + [1.0] * 5
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours) == pytest.approx(2 * 11 / 1024)  # 9 against 1: 2 (C(10,0) + C(10,1)) / 2^10
    assert mcnemar(ours, ours) == 1.0
    assert flips(theirs, ours) == [9]


def test_a_summary_compares_with_the_better_of_source_adapter_and_bare_target() -> None:
    scores = {"source_base": [0.0] * 4, "source_adapter": [1.0, 1.0, 1.0, 0.0], "target_base": [0.0, 0.0, 0.0, 1.0], "transferred": [1.0, 1.0, 0.0, 0.0]}
    result = summary(scores, "exact_match")
    assert result["n"] == 4 and result["arms"]["transferred"]["accuracy"] == 0.5
    assert (result["against"]["arm"], result["against"]["difference"], result["negative_flips"]) == ("source_adapter", -0.25, 1)
    scores["target_base"] = [1.0] * 4
    assert summary(scores, "exact_match")["against"]["arm"] == "target_base"


@pytest.mark.parametrize(("rows", "gained", "low"), [(1, 0, -0.7935), (5, 1, -0.2345), (100, 0, -0.0370)])
def test_a_few_rows_without_a_loss_do_not_prove_that_there_is_none(rows: int, gained: int, low: float) -> None:
    arm = [1.0] * (rows - gained) + [0.0] * gained
    paired = summary({"source_base": [0.0] * rows, "source_adapter": arm, "target_base": [0.0] * rows, "transferred": [1.0] * rows}, "exact_match")["against"]
    assert paired["low"] == pytest.approx(low, abs=1e-3)  # Wilson's for 0 of 1, of 5 and of 100: 0.7935, 0.4345 and 0.0370
    assert on_rows(Gate(loss=0.05), paired)["verdict"] == ("ship" if rows == 100 else "review")


def test_recovery() -> None:
    arms = {name: {"accuracy": accuracy} for name, accuracy in (("target_base", 0.1), ("transferred", 0.7), ("oracle", 0.9))}
    assert recovery(arms) == pytest.approx(0.75)
    assert recovery({name: arm for name, arm in arms.items() if name != "oracle"}) is None
