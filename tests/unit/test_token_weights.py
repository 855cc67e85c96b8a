"""Token weights: right by characters where tokenizers differ, and the loss that they make is the one computed by hand."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import CHARACTERS, lora, save_tokenizer, task_rows
from translora_ray import adapting, kit, models
from translora_ray.config import Task, Training
from translora_ray.engines.base import Complete
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.prompts import Prompt, answer_ids, task_prompt
from translora_ray.records import Candidate, Pack, TaskRow, pack_to_table, packs_from_table
from translora_ray.stream.teach import Teacher
from translora_ray.token_weights import answer_spans, require_offsets, spread, weigh
from translora_ray.training import loop
from translora_ray.training.task import Pair, encode, start, task_pairs

PROMPT = Prompt("Q: ten\nA:")


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("characters")
    save_tokenizer(folder, CHARACTERS)
    return tokenizer_at(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokens ` re`, `d`, `blu`, `e`, and characters for the rest."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys(CHARACTERS), "re", " re", "bl", "blu"]
    merges = [("r", "e"), (" ", "re"), ("b", "l"), ("bl", "u")]
    tokenizer = Tokenizer(kinds.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>"))
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return tokenizer_at(folder)


def tokenizer_at(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_tokens_stand_where_their_characters_do(characters: Any, words: Any) -> None:
    assert answer_spans(characters, PROMPT, "red") == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert answer_spans(words, PROMPT, "red") == [(0, 3), (3, 4)]
    assert answer_spans(words, Prompt("Q: ten\nA: "), "red") == [(0, 2), (2, 3)]  # no blank of its own where the prompt ends with one
    for tokenizer in (characters, words):
        assert len(answer_spans(tokenizer, PROMPT, "red blue")) + 1 == len(answer_ids(tokenizer, PROMPT, "red blue"))


def test_excess_goes_from_large_tokens_to_small_ones_and_back(characters: Any, words: Any) -> None:
    large, small = (answer_spans(tokenizer, PROMPT, "red blue") for tokenizer in (words, characters))
    assert large == [(0, 3), (3, 4), (4, 5), (5, 8), (8, 9)]  # " re", "d", " ", "blu", "e"
    found = spread([3.0, 0.5, -1.0, 6.0, 0.0, 2.0], large)
    assert found == pytest.approx([1, 1, 1, 0.5, -1, 2, 2, 2, 0, 2])
    gains = [1, 1, 1, 0.5, 0, 2, 2, 2, 0, 2]
    assert weigh(found, small, 1.0) == pytest.approx([10 * gain / sum(gains) for gain in gains])
    assert weigh(found, large, 1.0) == pytest.approx([6 * gain / 11.5 for gain in (3, 0.5, 0, 6, 0, 2)])
    assert weigh(found, large, 0.4) == pytest.approx([0.6 + 0.4 * weight for weight in weigh(found, large, 1.0)])
    back = spread([1.0, 1.0, 1.0, 0.5, -1.0, 2.0, 2.0, 2.0, 0.0, 2.0], small)
    assert weigh(back, large, 1.0) == pytest.approx(weigh(found, large, 1.0))


def test_weights_are_one_in_the_mean_whatever_the_excess() -> None:
    for excess in ([0.3, -2.0, 5.0, 0.0], [1e-9, 0.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]):
        assert sum(weigh(excess, [(0, 2), (2, 3)], 0.7)) == pytest.approx(3)
    assert weigh([-1.0, 0.0, -3.0], [(0, 1), (1, 2)], 1.0) == (1.0, 1.0, 1.0)  # nothing that the adapter adds
    assert weigh([2.0, 1.0], [(0, 1), (0, 1)], 1.0) == pytest.approx([1.0, 1.0, 1.0])  # two bytes of one character, and the end
    assert weigh([1.0, 1.0], [(0, 1), (1, 2)], 1.0) == pytest.approx([1.5, 0.0, 1.5])  # a character that the source does not know of


@pytest.fixture(scope="module")
def engine(tiny_llama: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama)
    yield engine
    engine.close()


def test_the_teacher_tells_the_excess_of_each_character(engine: TransformersEngine, tiny_kit: Path) -> None:
    loaded = kit.load(tiny_kit)
    pack = Pack(0, [Candidate(i, i, row["input"]) for i, row in enumerate(task_rows(4))])
    Teacher(engine, loaded.task, loaded.adapter, spans=lambda prompt, answer: answer_spans(engine.tokenizer, prompt, answer)).process(pack)
    for candidate in pack.open():
        prompt = task_prompt(loaded.task.prompt, candidate.input, "text")
        ours, bare = engine.token_logprobs([Complete(prompt, candidate.target or "", adapter) for adapter in (loaded.adapter, None)])
        assert candidate.char_excess == pytest.approx([a - b for a, b in zip(ours, bare, strict=True)], abs=0.1)  # a character is a token here
    (again,) = packs_from_table(pack_to_table(pack))
    assert again.candidates[0].char_excess == pytest.approx(pack.candidates[0].char_excess, rel=1e-6)
    assert pack.open() and not any(candidate.char_excess for candidate in answered(engine, loaded))


def answered(engine: TransformersEngine, loaded: kit.Kit) -> list[Candidate]:
    """Without token weights nothing is measured."""
    return Teacher(engine, loaded.task, loaded.adapter).process(Pack(0, [Candidate(0, 0, "red 3 blue")])).candidates


def test_the_weighted_loss_is_the_one_computed_by_hand(tiny_gemma: str) -> None:
    tokenizer = models.load_tokenizer(tiny_gemma)
    pairs = [Pair(PROMPT, "red", (0.0, 2.0, 1.0, -1.0, 0.5)), Pair(Prompt("Q: a\nA:"), "b")]
    rows = encode(tokenizer, pairs, 100, 0.5)
    assert rows[0].weights == pytest.approx([0.5, 0.5 + 0.5 * 2 / 0.7, 0.5 + 0.5 / 0.7, 0.5, 0.5 + 0.5 * 0.5 / 0.7])
    assert rows[1].weights is None and [row.weights for row in encode(tokenizer, pairs, 100)] == [None, None]
    model = models.load_base(tiny_gemma).float()
    found = loop.label_loss(model, model.get_output_embeddings(), loop.collate(rows, 0, torch.device("cpu")))
    expected = 0.0
    for row in rows:
        logprobs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for place, weight in zip(range(len(row.ids) - row.labels, len(row.ids)), row.weights or [1.0] * row.labels, strict=True):
            expected -= weight * float(logprobs[place - 1, row.ids[place]])
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_weights_of_one_are_the_loss_without_weights_bit_for_bit(tiny_llama: str) -> None:
    model = adapting.create(models.load_base(tiny_llama).float(), lora(), 1)
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    plain = [loop.Encoded([5, 6, 7, 8, 2], 2), loop.Encoded([11, 12, 13, 14, 15, 16, 2], 3)]
    ones = [loop.Encoded(row.ids, row.labels, (1.0,) * row.labels) for row in plain]
    losses = [loop.label_loss(model, model.get_output_embeddings(), loop.collate(rows, 0, torch.device("cpu"))) for rows in (plain, ones)]
    assert torch.equal(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, learnt) for loss in losses), strict=True):
        assert torch.equal(ours, theirs)


def test_training_takes_the_weights_of_its_rows(tiny_llama: str) -> None:
    task = Task(name="t", prompt="Q: {input}\nA:", train="-")
    pairs = task_pairs(task, [TaskRow("ten", "red", (0.0, 3.0, 0.0, 0.0, 0.0)), TaskRow("six", "blue", (0.0, 3.0, 0.0, 0.0, 0.0, 0.0))])
    weighed, plain = (start(tiny_llama, pairs, lora(), Training(epochs=1, token_weights=share), 0) for share in (1.0, 0.0))
    assert [row.weights for row in weighed.rows] == [(0, 5, 0, 0, 0), (0, 6, 0, 0, 0, 0)]
    assert next(weighed.run_epoch()).loss != pytest.approx(next(plain.run_epoch()).loss, rel=1e-3)


def test_what_can_not_be_weighed_is_refused() -> None:
    with pytest.raises(ValueError, match="put it into the recipe's training"):
        Task(name="t", prompt="{input}", train="-", source_training=Training(token_weights=0.5))
    with pytest.raises(UsageError, match=r"set training\.token_weights to 0"):
        require_offsets(SimpleNamespace(is_fast=False, name_or_path="old"))
