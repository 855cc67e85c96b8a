"""The loop: labelled positions only, every row once an epoch, the same mathematics for any number of workers."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tests.conftest import lora, save_model
from translora_ray import adapters, adapting, models, workflow
from translora_ray.cluster import Cluster
from translora_ray.config import Adapter, AdapterType, Task, Training
from translora_ray.errors import Diverged, RunFailed, StreamEnded, UsageError
from translora_ray.prompts import Prompt
from translora_ray.records import Candidate, Step, TaskRow
from translora_ray.storage import RunStore
from translora_ray.training import loop, trainer
from translora_ray.training.checkpoints import METRICS, Checkpoints
from translora_ray.training.task import encode, start, train_adapter

PAIRS = [(Prompt(f"Q: {word}\nA:"), answer) for word, answer in (("red", "a"), ("blue", "b"), ("green", "c"), ("grey one", "a"), ("pink", "b"))] * 3
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
    model = adapting.create(base, lora(), 1)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in weights.values():  # LoRA's B is zero at first, which would hide half of the gradients
        torch.nn.init.normal_(weight, std=0.1)
    found = loop.label_loss(model, model.get_output_embeddings(), loop.collate(ROWS, 0, torch.device("cpu")))
    gradients = torch.autograd.grad(found, list(weights.values()))
    expected = plain_loss(model, ROWS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, ours, theirs in zip(weights, gradients, torch.autograd.grad(expected, list(weights.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_virtual_tokens_stand_before_the_labels(tiny_gemma: str) -> None:
    model = adapting.create(models.load_base(tiny_gemma).float(), Adapter(type="prompt_tuning", virtual_tokens=5), 1)
    found = loop.label_loss(model, model.get_output_embeddings(), loop.collate(ROWS, 0, torch.device("cpu")))
    expected = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.ids]), attention_mask=torch.ones((1, len(row.ids)))).logits[0, :-1].float()
        expected = expected + functional.cross_entropy(logits[-row.labels :], torch.tensor(row.ids[-row.labels :]), reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    prompt = model.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, prompt)[0] for loss in (found, expected)), rtol=1e-3, atol=1e-5)


def test_an_empty_share_of_a_batch_has_zero_loss_and_gradients(tiny_llama: str) -> None:
    model = adapting.create(models.load_base(tiny_llama), lora(), 1)
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


def fresh(base: str, rows: list[loop.Encoded], **settings: Any) -> loop.Loop:
    model = adapting.create(models.load_base(base).float(), lora(), 1)
    return loop.Loop(model, rows, 0, Training(**{"epochs": 2, "batch_size": 4, **settings}), 5)


def test_training_resumes_inside_an_epoch_to_the_same_weights(tiny_llama: str, tmp_path: Path) -> None:
    whole = fresh(tiny_llama, ROWS * 5)
    loop.train(whole)
    broken = fresh(tiny_llama, ROWS * 5)
    list(broken.run_epoch())
    next(broken.run_epoch())
    assert (broken.epoch, broken.position, broken.step) == (1, 1, 5)
    adapting.save(broken.model, tmp_path / "a", tiny_llama)
    resumed = fresh(tiny_llama, ROWS * 5)
    adapting.load_weights(resumed.model, tmp_path / "a")
    resumed.load_state_dict(broken.state_dict())
    loop.train(resumed)
    assert resumed.tokens == whole.tokens
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_rows_held_out_choose_the_epoch_and_end_the_training(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = fresh(tiny_llama, ROWS * 4, epochs=9, held_out=0.25, patience=2)
    assert (len(chosen.rows), len(chosen.held_out)) == (9, 3)
    losses = iter([3.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(chosen, "loss_on", lambda rows: next(losses))
    after: list[list[torch.Tensor]] = []
    while not chosen.done:
        list(chosen.run_epoch())
        after.append([weight.detach().clone() for weight in chosen._weights])
    assert (chosen.epoch, chosen.best_epoch, chosen.held_out_losses) == (4, 2, [3.0, 1.0, 2.0, 2.0])
    chosen.use_best()
    for weight, second, last in zip(chosen._weights, after[1], after[3], strict=True):
        assert torch.equal(weight, second) and not torch.equal(weight, last)
    resumed = fresh(tiny_llama, ROWS * 4, epochs=9, held_out=0.25, patience=2)
    resumed.load_state_dict(chosen.state_dict())
    assert resumed.done and resumed.best_epoch == 2


def test_the_loss_of_rows_held_out_is_the_plain_one(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "autocast", lambda device: contextlib.nullcontext())
    training = fresh(tiny_llama, ROWS * 4, held_out=0.4)
    assert training.held_out and training.loss_on(training.held_out) == pytest.approx(
        float(plain_loss(training.model, training.held_out)) / sum(row.labels for row in training.held_out), rel=1e-5
    )


def in_float32() -> None:
    """So that sums in another order are nearly the same."""
    models.computes_in_bf16 = loop.computes_in_bf16 = lambda device: False


def one_of_two(rank: int, base: str, folder: str, spread: bool, at_once: int) -> None:
    """A worker of two, on gloo; the first saves what it learnt and its losses. Where it may, the second finds that its memory holds one row."""
    in_float32()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    settings = Training(epochs=2, batch_size=5, learning_rate=0.01, held_out=0.2)
    training = start(base, PAIRS, lora(), settings, 0, rank, 2, "cpu", at_once=at_once, spread=spread)
    if rank and at_once > 1:
        training.model.register_forward_pre_hook(refuse_more_than(1, torch.OutOfMemoryError()), with_kwargs=True)
    if spread:
        base_weights = [weight for weight in training.model.parameters() if not weight.requires_grad]
        assert 2 * sum(weight.to_local().numel() for weight in base_weights) == sum(weight.numel() for weight in base_weights)
    losses = []
    for _ in range(2):
        losses += [step.loss for step in training.run_epoch()]
        if rank == 0:
            adapting.save(training.model, f"{folder}/checkpoint", base)  # by one worker alone, as between epochs
    if rank == 0:
        adapting.save(training.model, f"{folder}/adapter", base)
        torch.save((losses, training.held_out_losses), f"{folder}/losses")
    assert training.at_once == (1 if rank else at_once)
    torch.distributed.destroy_process_group()


def refuse_more_than(room: int, error: RuntimeError) -> Callable[..., None]:
    def refuse(_module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["input_ids"]) > room:
            raise error

    return refuse


@pytest.mark.parametrize(("spread", "at_once"), [(False, 3), (True, 1)])
def test_two_workers_take_the_steps_of_one_with_the_base_whole_or_spread(
    tiny_gemma: str, tmp_path: Path, spread: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (models, loop):
        monkeypatch.setattr(module, "computes_in_bf16", lambda device: False)
    torch.multiprocessing.spawn(one_of_two, (tiny_gemma, str(tmp_path), spread, at_once), nprocs=2)
    losses, held_out = torch.load(tmp_path / "losses")
    alone = start(tiny_gemma, PAIRS, lora(), Training(epochs=2, batch_size=5, learning_rate=0.01, held_out=0.2), 0)
    assert [step.loss for _ in range(2) for step in alone.run_epoch()] == pytest.approx(losses, rel=1e-4)
    assert alone.held_out_losses == pytest.approx(held_out, rel=1e-4)
    adapting.save(alone.model, tmp_path / "alone", tiny_gemma)
    ours, theirs = (load_file(tmp_path / name / adapters.WEIGHTS) for name in ("adapter", "alone"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_that_add_up_are_those_of_all_rows_together(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "autocast", lambda device: contextlib.nullcontext())
    whole, parts = fresh(tiny_llama, ROWS), fresh(tiny_llama, ROWS)
    parts.at_once = 2
    losses = [float(one._gradients(ROWS, 6)) for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(whole._weights, parts._weights, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")])
def test_memory_that_runs_out_halves_the_rows_at_once_until_one_is_too_many(tiny_llama: str, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    monkeypatch.setattr(loop, "autocast", lambda device: contextlib.nullcontext())
    calm, poor = fresh(tiny_llama, ROWS * 3), fresh(tiny_llama, ROWS * 3)
    hook = poor.model.register_forward_pre_hook(refuse_more_than(2, error), with_kwargs=True)
    losses = [[step.loss for step in one.run_epoch()] for one in (calm, poor)]
    assert poor.at_once == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    hook.remove()
    poor.model.register_forward_pre_hook(refuse_more_than(0, error), with_kwargs=True)
    with pytest.raises(RunFailed, match=r"does not hold 1 rows of training at once: spread the base over workers"):
        poor._step([0])


def test_without_examples_or_with_one_answer_alone_nothing_is_trained(tiny_llama: str) -> None:
    with pytest.raises(UsageError, match=r"nothing to train on"):
        fresh(tiny_llama, [])
    kit = SimpleNamespace(seeds=[TaskRow("red", "a"), TaskRow("blue", "b")])
    plan: Any = SimpleNamespace(kit=kit, quota=100, held_out=0, chooses=False, fills=lambda index: False, recipe=SimpleNamespace(overlap=False))

    def given(answers: str) -> Any:
        return SimpleNamespace(candidates=lambda: [Candidate(number, 0, "red", target=answer) for number, answer in enumerate(answers)])

    with pytest.raises(RunFailed, match=r"each of the 20 examples the same answer, 'a': prepare the kit with more seeds"):
        workflow.check_answers(plan, given("a" * 20))
    workflow.check_answers(plan, given("a" * 19 + "b"))
    plan.kit.seeds.pop()
    workflow.check_answers(plan, given("a" * 20))  # it is the only answer of the seeds, too


def test_a_step_whose_loss_is_not_a_number_names_its_rows_and_changes_nothing(tiny_llama: str) -> None:
    training = fresh(tiny_llama, ROWS * 2)
    bad = next(weight for name, weight in training.model.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        bad.fill_(float("nan"))
    before = [weight.clone() for weight in training.model.parameters()]
    with pytest.raises(Diverged, match=r"in step 1 \(epoch 1, rows \d, \d, \d, \d\): lower the learning rate"):
        loop.train(training)
    for ours, theirs in zip(training.model.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_rate_that_diverges_leaves_the_others_and_all_that_do_are_an_error(tiny_llama: str, tmp_path: Path) -> None:
    rates = Training(epochs=2, batch_size=4, learning_rates=[1e30, 0.01], held_out=0.2)
    assert train_adapter(tiny_llama, PAIRS, lora(), rates, 0, tmp_path / "one", lambda step: None) < 10
    with pytest.raises(Diverged):
        train_adapter(tiny_llama, PAIRS, lora(), rates.model_copy(update={"learning_rates": [1e30, 1e31]}), 0, tmp_path / "none", lambda step: None)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_one_worker_sees_and_another_does_not(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / METRICS).write_text("{}")
    ours, theirs = (Checkpoints(RunStore(str(tmp_path / place)), "target0") for place in ("ours", "theirs"))
    ours.add(tmp_path / "made")
    ours.add(tmp_path / "made")
    (tmp_path / "ours" / ours.place / "000002").mkdir()  # on its way to an object store: its metrics arrive last
    assert (ours.last(), theirs.last()) == ("000001", None)
    with ours.open("000001") as folder, theirs.open(None) as none:
        assert folder and none is None
    with (
        pytest.raises(RunFailed, match=r"does not see .*theirs/train/target0/checkpoints/000001, .*: give --out a place that all nodes share"),
        theirs.open("000001"),
    ):
        pass


def test_a_run_that_is_stopped_in_its_second_rate_does_not_commit_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.ray, "get", lambda answer: answer)
    stopped = SimpleNamespace(why_ended=SimpleNamespace(remote=lambda: "somebody asked for it"))
    settings, store = Training(learning_rates=[1e-4, 1e-3], held_out=0.1), RunStore(str(tmp_path))
    job = trainer.Job(Task(name="t", prompt="{input}", train="-"), "target", lora(), settings, 0, Cluster(), stopped, frozenset())

    def fit(_trial: trainer.Job, name: str) -> trainer.Result:
        return trainer.Result("ended" if name == "target1" else None, Checkpoints(store, name))

    with pytest.raises(StreamEnded, match="somebody asked for it"):
        trainer.train_target(job, store, fit)
    assert not store.exists("adapter")


def test_a_worker_does_not_train_another_version_of_the_target(tiny_llama: str, tmp_path: Path) -> None:
    task = Task(name="t", prompt="{input}", train="-")
    job = trainer.Job(task, tiny_llama, lora(), Training(), 0, Cluster(), None, frozenset(), "of another version")
    with pytest.raises(UsageError, match="is not the one this transfer began with"):
        trainer.work(job, SimpleNamespace(), Checkpoints(RunStore(str(tmp_path)), "target0"))  # type: ignore[arg-type]


def test_a_state_whose_steps_have_other_rows_is_not_gone_on_from(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Training(epochs=2, batch_size=2)
    first, same, other = (start(tiny_llama, PAIRS, lora(), settings, 0) for _ in range(3))
    next(first.run_epoch())
    state = first.state_dict()
    assert same.load_state_dict(state) is None and same.step == first.step == 1
    monkeypatch.setattr(loop, "BUCKET_BATCHES", 1)
    assert "rows in another order" in (other.load_state_dict(state) or "") and other.step == 0
    state.pop("order")
    assert "rows in another order" in (same.load_state_dict(state) or ""), "as older versions wrote it"


def test_recomputed_activations_give_the_same_step(tiny_llama: str) -> None:
    pairs = [(Prompt(f"Q: {word}\nA:"), "a") for word in ("red", "blue", "green")]
    plain, saving = (start(tiny_llama, pairs, lora(), Training(epochs=1, batch_size=2), 0, recompute=recompute) for recompute in (False, True))
    assert saving.model.is_gradient_checkpointing
    losses = [[step.loss for step in one.run_epoch()] for one in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_rates_to_try_are_tried_and_the_better_adapter_is_saved(tiny_llama: str, tmp_path: Path) -> None:
    rates = Training(epochs=3, batch_size=4, learning_rates=[1e-6, 0.01], held_out=0.2)
    train_adapter(tiny_llama, PAIRS, lora(), rates, 0, tmp_path / "chosen", lambda step: None)
    train_adapter(tiny_llama, PAIRS, lora(), rates.trials[1], 0, tmp_path / "better", lambda step: None)
    ours, theirs = (load_file(tmp_path / name / adapters.WEIGHTS) for name in ("chosen", "better"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_one_row_can_not_be_held_out(tiny_llama: str) -> None:
    with pytest.raises(UsageError, match="one row alone"):
        start(tiny_llama, PAIRS[:1], lora(), Training(held_out=0.1), 0)


def test_virtual_tokens_count_in_the_context(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "context_of", lambda model: 12)
    start(tiny_llama, [(Prompt("Q: red\nA:"), "a")], lora(), Training(), 0)  # 12 tokens
    with pytest.raises(UsageError, match="exceeds the base's context of 9"):
        start(tiny_llama, [(Prompt("Q: red\nA:"), "a")], Adapter(type="prompt_tuning", virtual_tokens=3), Training(), 0)


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt_tuning"])
def test_every_type_goes_on_from_its_saved_weights(kind: AdapterType, tiny_llama: str, tmp_path: Path) -> None:
    adapter = Adapter(type=kind, rank=4, alpha=8.0, dropout=0.0, modules="all-linear", virtual_tokens=4)
    settings = Training(epochs=2, batch_size=4, learning_rate=0.01)
    whole, broken, resumed = (start(tiny_llama, PAIRS, adapter, settings, 0) for _ in range(3))
    loop.train(whole)
    list(broken.run_epoch())
    adapting.save(broken.model, tmp_path / "a", tiny_llama)
    adapting.load_weights(resumed.model, tmp_path / "a")
    resumed.load_state_dict(broken.state_dict())
    loop.train(resumed)
    for ours, theirs in zip(resumed._weights, whole._weights, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_base_in_eight_or_four_bits_learns_what_the_whole_one_does(tiny_llama: str) -> None:
    settings = Training(epochs=6, batch_size=4, learning_rate=0.01)
    losses = []
    for bits in (None, 8, 4):
        training = start(tiny_llama, PAIRS, lora(), settings.model_copy(update={"base_bits": bits}), 0)
        losses.append(loop.train(training))
        stored = {kind for module in training.model.modules() for kind in (8, 4) if f"{kind}bit" in type(module).__name__}
        assert stored == ({bits} if bits else set())
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=0.3) and max(losses) < 1.5


def test_training_learns_and_saves_an_adapter_that_peft_loads(tiny_llama: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pairs = [(Prompt(f"Q: {word}\nA:"), answer) for word, answer in (("red", "a"), ("blue", "b"), ("green", "c"))] * 10
    losses = []
    train_adapter(
        tiny_llama,
        pairs,
        lora(8, 16.0),
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


@pytest.mark.parametrize(("steps", "points"), [(7, 7), (200, 200), (201, 100), (5000, 200)])
def test_the_loss_that_is_kept_is_short_and_says_the_mean(steps: int, points: int) -> None:
    curve: list[list[float]] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        losses.append(float(step))
        loop.add_point(curve, losses, Step(step, steps, float(step), 0, 1.0))
    assert len(curve) == points
    every = curve[0][0]
    assert curve == [[step, step - (every - 1) / 2] for step in range(int(every), steps + 1, int(every))]
