"""The stages of the stream, one by one, on a tiny engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import task_rows
from translora_ray import kit
from translora_ray.engines.base import Generate, Generation, Sampling
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.prompts import discriminator_prompt, task_prompt
from translora_ray.recipe import Selection, Synthesis
from translora_ray.records import TOO_LONG, Candidate, Pack, TaskRow, request_pack
from translora_ray.stream.discriminate import OFF_TASK, Discriminator, verdicts
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.stream.teach import OTHER_LABEL, Teacher


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def loaded(tiny_kit: Path) -> kit.Kit:
    return kit.load(tiny_kit)


def prompts(count: int) -> Pack:
    return Pack(0, [Candidate(i, i, row["input"]) for i, row in enumerate(task_rows(count))])


def test_the_synthesizer_fills_every_candidate_or_says_why_not(engine: TransformersEngine, loaded: kit.Kit) -> None:
    settings = Synthesis(temperature=1.0, min_p=0.0, max_tokens=40).settled(())
    found = Synthesizer(engine, settings, loaded.seeds).process(request_pack(1, 0, 16))
    assert {candidate.reason for candidate in found.candidates} <= {None, TOO_LONG, "empty prompt"}
    assert all(candidate.input and "\n" not in candidate.input for candidate in found.open())
    assert len({candidate.input for candidate in found.candidates}) > 8
    again = Synthesizer(engine, settings, loaded.seeds).process(request_pack(1, 0, 16))
    assert again.candidates == found.candidates
    assert 16 <= found.tokens["generator"] <= 16 * 40


def test_requests_of_open_tasks_show_one_to_five_seeds(engine: TransformersEngine) -> None:
    def shown(settings: Synthesis) -> list[int]:
        writer = Synthesizer(engine, settings, [TaskRow(f"seed {i}", "a") for i in range(9)])
        return [prompt.text.count("seed") for prompt in writer._prompts(request_pack(1, 0, 64))]

    assert set(shown(Synthesis().settled(()))) == {1, 2, 3, 4, 5}
    assert shown(Synthesis().settled(())) == shown(Synthesis().settled(()))
    assert set(shown(Synthesis().settled(["yes", "no"]))) == {5}
    assert set(shown(Synthesis(fewest_shots=2, shots=3).settled(["yes", "no"]))) == {2, 3}
    with pytest.raises(ValueError, match="fewest_shots must not be higher"):
        Synthesis(fewest_shots=6)


def test_as_many_seeds_are_shown_as_fit(engine: TransformersEngine) -> None:
    def writer(words: int, classes: tuple[str, ...] = ()) -> Synthesizer:
        rows = [TaskRow(f"seed {'red ' * words}{i}", "a") for i in range(5)]
        return Synthesizer(engine, Synthesis(fewest_shots=5, max_tokens=8).settled(classes), rows, classes)

    for classes in ((), tuple("abcdef")):
        prompts = writer(engine.context // (4 * engine.count_tokens("red ")), classes)._prompts(request_pack(1, 0, 2))
        assert {prompt.text.count("seed") for prompt in prompts if prompt} <= {1, 2, 3} and None not in prompts
        assert {candidate.reason for candidate in writer(engine.context, classes).process(request_pack(1, 0, 2)).candidates} == {TOO_LONG}


def test_every_other_pack_of_a_generator_may_be_warmer(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Generate] = []
    monkeypatch.setattr(engine, "generate", lambda requests: asked.extend(requests) or [Generation("x", 1, 1, True) for _ in requests])
    for generators, found in {("source",): [1.0, 1.5, 1.0, 1.5], ("source", "target"): [1.0, 1.0, 1.5, 1.5]}.items():
        settings = Synthesis(generator=generators, temperature=1.0, high_temperature=1.5).settled(())
        writer = Synthesizer(engine, settings, [TaskRow("seed", "a")])
        for number in range(4):
            writer.process(request_pack(1, number, 1))
        assert [request.sampling.temperature for request in asked] == found
        asked.clear()


def test_labels_are_asked_for_in_turn_and_must_come_back(engine: TransformersEngine, loaded: kit.Kit) -> None:
    classes = loaded.task.classes
    settings = Synthesis(by_label=True, temperature=1.0, min_p=0.0, max_tokens=40).settled(classes)
    writer = Synthesizer(engine, settings, loaded.seeds, classes)
    pack = request_pack(1, 0, 16)
    assert [prompt.text.rpartition("\n")[2] for prompt in writer._prompts(pack)] == [f"{classes[number % len(classes)]}:" for number in range(16)]
    assert len(writer.process(pack).open()) > 8
    selection = Selection(as_asked=True)
    found = Teacher(engine, loaded.task, loaded.adapter, selection=selection).process(prompts(12)).candidates
    plain = Teacher(engine, loaded.task, loaded.adapter).process(prompts(12)).candidates
    expected = [None if candidate.target == classes[candidate.index % len(classes)] else OTHER_LABEL for candidate in plain]
    assert [candidate.reason for candidate in found] == expected
    assert set(expected) == {None, OTHER_LABEL}


def test_the_discriminator_cuts_at_its_threshold(engine: TransformersEngine, loaded: kit.Kit) -> None:
    pack = prompts(20)
    pack.candidates[3].reason = "copies a seed"
    texts = [candidate.input for candidate in pack.open()]
    expected = verdicts(engine, loaded.task.name, texts, loaded.discriminator_adapter)
    threshold = median(expected)
    found = Discriminator(engine, loaded.task.name, loaded.discriminator_adapter, threshold).process(pack)
    assert found.candidates[3].verdict is None
    assert [candidate.verdict for candidate in found.candidates if candidate.index != 3] == expected
    assert {candidate.reason for candidate in found.candidates if candidate.verdict is not None and candidate.verdict <= threshold} == {OFF_TASK}
    assert all(candidate.verdict > threshold for candidate in found.open())
    assert 5 < len(found.open()) < 15


def test_the_verdict_is_yes_over_no(engine: TransformersEngine, loaded: kit.Kit) -> None:
    """Against the logits of plain peft: the answers are `Yes` and `No` after a blank, which is a token of its own here."""
    import torch
    from peft import PeftModel

    from translora_ray.models import load_base

    model = PeftModel.from_pretrained(load_base(loaded.base), loaded.discriminator_adapter.path)
    text = discriminator_prompt(loaded.task.name, "red 3 blue").text + " "
    logits = model(torch.tensor([engine.tokenizer(text).input_ids])).logits[0, -1].float()
    yes, no = (engine.tokenizer.convert_tokens_to_ids(letter) for letter in "YN")
    found = verdicts(engine, loaded.task.name, ["red 3 blue"], loaded.discriminator_adapter)
    assert found == pytest.approx([(logits[yes] - logits[no]).item()], rel=0.05, abs=0.05)


def test_the_teacher_answers_what_is_open_and_nothing_else(engine: TransformersEngine, loaded: kit.Kit) -> None:
    pack = prompts(12)
    pack.candidates[5].reason = OFF_TASK
    found = Teacher(engine, loaded.task, loaded.adapter).process(pack)
    assert found.candidates[5].target is None
    asked = [Generate(task_prompt(loaded.task.prompt, candidate.input, "text"), Sampling(4), loaded.adapter) for candidate in found.open()]
    assert [candidate.target for candidate in found.open()] == [generation.text.strip() for generation in engine.generate(asked)]
    assert all(candidate.target in {"a", "b", "c"} for candidate in found.open())


def test_what_exceeds_the_context_is_a_reject_and_no_error(engine: TransformersEngine, loaded: kit.Kit) -> None:
    for stage in (Teacher(engine, loaded.task, loaded.adapter), Discriminator(engine, loaded.task.name, loaded.discriminator_adapter, -1e9)):
        pack = Pack(0, [Candidate(0, 0, "long " * 500), Candidate(1, 1, "red 3 blue")])
        found = stage.process(pack)
        assert found.candidates[0].reason == TOO_LONG
        assert found.candidates[1].reason is None


def test_what_the_target_can_not_take_whole_is_a_reject(engine: TransformersEngine, loaded: kit.Kit) -> None:
    teacher = Teacher(engine, loaded.task, loaded.adapter, lambda prompt, answer: "blue" not in prompt.text)
    pack = request_pack(0, 0, 2)
    pack.candidates[0].input, pack.candidates[1].input = "red 1 blue", "red 1 green"
    teacher.process(pack)
    assert [candidate.reason for candidate in pack.candidates] == [TOO_LONG, None]


def test_an_answer_ends_where_the_targets_will(engine: TransformersEngine, loaded: kit.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Generate] = []
    monkeypatch.setattr(engine, "generate", lambda requests: asked.extend(requests) or [Generation("a", 1, 1, True) for _ in requests])
    Teacher(engine, loaded.task, loaded.adapter, stops=("\n",)).process(prompts(1))
    assert asked[0].sampling.stop == ("\n",)


def test_an_answer_that_does_not_end_is_a_reject(engine: TransformersEngine, loaded: kit.Kit) -> None:
    found = Teacher(engine, replace(loaded, task=loaded.task.model_copy(update={"max_new_tokens": 1})).task, loaded.adapter).process(prompts(4))
    assert {candidate.reason for candidate in found.candidates} <= {"answer too long", "empty answer"}
