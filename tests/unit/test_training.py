"""The loop: labelled positions only, every row once an epoch, the same mathematics for any number of workers."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.conftest import save_model
from translora_ray import adapters, models
from translora_ray.config import Lora, Training
from translora_ray.errors import UsageError
from translora_ray.prompts import Prompt
from translora_ray.training import loop
from translora_ray.training.task import encode, train_adapter

ROWS = [loop.Encoded([5, 6, 7, 8, 2], 2), loop.Encoded([9, 10, 2], 1), loop.Encoded([11, 12, 13, 14, 15, 16, 2], 3)]


def plain_loss(model: torch.nn.Module, rows: list[loop.Encoded]) -> torch.Tensor:
    """The usual way: each row by itself, all logits, summed over labelled positions."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(ids).logits[0, :-1].float()
        total = total + functional.cross_entropy(logits[-row.labels :], ids[0, -row.labels :], reduction="sum")
    return total


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen", "gpt2"])
def test_label_loss_and_gradients_equal_the_plain_forward(tmp_path: Path, family: str) -> None:
    base = models.load_base(save_model(tmp_path / family, family)).float()
    model = adapters.create(base, rank=4, alpha=8.0, dropout=0.0, seed=1)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in weights.values():  # LoRA's B is zero at first, which would hide half of the gradients
        torch.nn.init.normal_(weight, std=0.1)
    found = loop.label_loss(model, model.get_output_embeddings(), loop.collate(ROWS, 0, torch.device("cpu")))
    gradients = torch.autograd.grad(found, list(weights.values()))
    expected = plain_loss(model, ROWS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, ours, theirs in zip(weights, gradients, torch.autograd.grad(expected, list(weights.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_an_empty_share_of_a_batch_has_zero_loss_and_gradients(tiny_llama: str) -> None:
    model = adapters.create(models.load_base(tiny_llama), 4, 8.0, 0.0, 1)
    batch = loop.collate([loop.Encoded([5, 6], 0)], 0, torch.device("cpu"))
    loss = loop.label_loss(model, model.get_output_embeddings(), batch)
    loss.backward()
    assert float(loss) == 0
    assert all(not weight.grad.any() for weight in model.parameters() if weight.requires_grad)


def test_every_row_once_an_epoch_and_each_epoch_another_order() -> None:
    lengths = [i % 7 for i in range(101)]
    first, second = (loop.epoch_batches(lengths, 8, seed=3, epoch=epoch) for epoch in (0, 1))
    assert sorted(row for batch in first for row in batch) == list(range(101))
    assert len(first) == 13
    assert first != second
    assert first == loop.epoch_batches(lengths, 8, seed=3, epoch=0)


def test_training_resumes_to_the_same_weights(tiny_llama: str, tmp_path: Path) -> None:
    def fresh() -> loop.Loop:
        return loop.Loop(adapters.create(models.load_base(tiny_llama), 4, 8.0, 0.0, 1), ROWS * 5, 0, Training(epochs=2, batch_size=4), 5)

    whole = fresh()
    loop.train(whole)
    half = fresh()
    list(half.run_epoch())
    adapters.save(half.model, tmp_path / "a", tiny_llama)
    resumed = fresh()
    adapters.load_weights(resumed.model, tmp_path / "a")
    resumed.load_state_dict(half.state_dict())
    loop.train(resumed)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_training_learns_and_saves_an_adapter_that_peft_loads(tiny_llama: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pairs = [(Prompt(f"Q: {word}\nA:"), answer) for word, answer in (("red", "a"), ("blue", "b"), ("green", "c"))] * 10
    losses = []
    train_adapter(
        tiny_llama,
        pairs,
        Lora(rank=8, alpha=16.0, dropout=0.0),
        Training(epochs=10, learning_rate=0.01),
        0,
        tmp_path / "a",
        lambda step: losses.append(step.loss),
    )
    assert losses[-1] < 0.2 * losses[0]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "a")
    assert loaded.peft_config["default"].base_model_name_or_path == tiny_llama


def test_a_row_over_the_context_is_an_error(tiny_llama: str) -> None:
    with pytest.raises(UsageError, match="exceeds the base's context of 8"):
        encode(models.load_tokenizer(tiny_llama), [(Prompt("too long for it"), "b")], context=8)
