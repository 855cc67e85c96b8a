"""From rows to a trained adapter in one process: encoding with the base's own rendering, then the loop. No Ray.

`prepare` and the oracle of `evaluate` call `train_adapter`; Ray Train's workers use the pieces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from translora_ray import adapters, adapting, models
from translora_ray.config import Adapter, Task, Training
from translora_ray.errors import Diverged, UsageError
from translora_ray.prompts import Prompt, answer_ids, prompt_ids, task_prompt
from translora_ray.records import Step, TaskRow, derive_seed
from translora_ray.token_weights import answer_spans, weigh
from translora_ray.training import loop


class Pair(NamedTuple):
    """What is asked and the answer to learn; `excess` as in `TaskRow`."""

    prompt: Prompt
    answer: str
    excess: tuple[float, ...] = ()


AnyPair = Pair | tuple[Prompt, str]
"""The pair of a real row needs no excess."""


def task_pairs(task: Task, rows: Sequence[TaskRow]) -> list[Pair]:
    return [Pair(task_prompt(task.prompt, row.input, task.format), row.target, row.excess) for row in rows]


class AsTheyCome(Sequence[loop.Encoded]):
    """Rows that are encoded when they are asked for, of pairs that may still be to come: asking for one waits for it."""

    def __init__(self, pairs: Sequence[AnyPair], encoded: Callable[[AnyPair], loop.Encoded]) -> None:
        self.pairs, self.encoded = pairs, encoded
        self.known: dict[int, loop.Encoded] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: Any) -> Any:
        if row not in self.known:
            self.known[row] = self.encoded(self.pairs[row])
        return self.known[row]


def encode(tokenizer: Any, pairs: Sequence[AnyPair], context: int, token_weights: float = 0.0) -> list[loop.Encoded]:
    """Token ids per pair; the labels are the answer and the end token, with weights where `token_weights` asks for them and the pair has an excess. A row
    longer than the context is an error, never cut."""
    rows = []
    for prompt, answer, excess in (Pair(*pair) for pair in pairs):
        labels = answer_ids(tokenizer, prompt, answer)
        weights = weigh(excess, answer_spans(tokenizer, prompt, answer), token_weights) if token_weights and excess else None
        rows.append(loop.Encoded(prompt_ids(tokenizer, prompt) + labels, len(labels), weights))
        if len(rows[-1].ids) > context:
            raise UsageError(f"A row of {len(rows[-1].ids)} tokens exceeds the base's context of {context}: shorten it ({prompt.text[:60]!r}...).")
    return rows


def start(
    base: str,
    pairs: Sequence[AnyPair],
    adapter: Adapter,
    settings: Training,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: str | None = None,
    at_once: int | None = None,
    recompute: bool = False,
    spread: bool = False,
    coming: bool = False,
) -> loop.Loop:
    """Load the base, put a fresh adapter on it and encode the rows. `adapter` must be fully set. `coming` says that asking for a pair may wait for it.

    `recompute` keeps few activations and computes the others again for the gradients (torch's gradient checkpointing). `spread` leaves each of
    the `world` workers a part of the base.
    """
    spread = spread and world > 1
    models.require_bits(settings.base_bits)
    models.keep_freed_memory()
    tokenizer = models.load_tokenizer(base)
    model = adapting.create(models.load_base(base, device, settings.base_bits, stays_on_cpu=spread), adapter, derive_seed(seed, "adapter"))
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spread:
        _spread(model, device or "cpu", world)
    context = models.context_of(model) - (adapter.virtual_tokens or 0)
    weighed = settings.token_weights
    rows = AsTheyCome(pairs, lambda pair: encode(tokenizer, [pair], context, weighed)[0]) if coming else encode(tokenizer, pairs, context, weighed)
    return loop.Loop(model, rows, tokenizer.pad_token_id, settings, derive_seed(seed, "order"), rank, world, at_once, in_order=coming)


def _spread(model: Any, device: str, world: int) -> None:
    """Give each worker a part of the frozen base; layers come together when they compute (docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapter = {weight for weight in model.parameters() if weight.requires_grad}
    for weight in adapter:
        weight.data = weight.data.to(device)
    mesh = init_device_mesh(torch.device(device).type, (world,))
    layers = set(model.get_base_model()._no_split_modules or ())
    for module in [*(module for module in model.modules() if type(module).__name__ in layers), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)


def train_adapter(base: str, pairs: Sequence[AnyPair], adapter: Adapter, settings: Training, seed: int, out: Path, on_step: Callable[[Step], None]) -> float:
    """Train an adapter on `base` and save it at `out`; returns the last epoch's mean loss. Of several learning rates the rows held out choose one."""
    best, loss, failure = float("inf"), float("nan"), None
    for trial in settings.trials:
        training = start(base, pairs, adapter, trial, seed)
        try:
            last = loop.train(training, on_step)
        except Diverged as diverged:
            failure = diverged.with_traceback(None)  # whose frames would keep the model
        else:
            if not out.exists() or min(training.held_out_losses) < best:
                best, loss = min(training.held_out_losses, default=0.0), last
                adapting.save(training.model, out, base)
        del training
        models.release()
    if failure and not out.exists():
        raise failure
    return loss


def copy_adapter(source: str, out: Path, base: str) -> None:
    """The two files that make an adapter, with the base named by reference."""
    import json

    out.mkdir(parents=True)
    shutil.copy(Path(source) / adapters.WEIGHTS, out / adapters.WEIGHTS)
    config = json.loads((Path(source) / adapters.CONFIG).read_text())
    (out / adapters.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}, indent=2))
