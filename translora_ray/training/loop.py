"""The training loop: torch and peft, no Ray. Source adapter, discriminator and target adapter are all trained here.

Logits and loss exist only where there is a label: the output embedding sees the labelled positions alone. With a vocabulary of
262,144 that is most of a step's cost.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from translora_ray.config import Training
from translora_ray.errors import Diverged, RunFailed
from translora_ray.models import computes_in_bf16
from translora_ray.records import Step, derive_seed

IGNORE = -100
BUCKET_BATCHES = 16


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids of prompt and answer; the last `labels` of them are learnt."""

    ids: list[int]
    labels: int


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices in batches for one epoch: every row exactly once, batches of like length, order derived from (seed, epoch)."""
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    span = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), span):
        bucket = sorted(order[start : start + span], key=lambda row: lengths[row])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    draw.shuffle(batches)
    return batches


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded tensors of shape (rows, longest); `labels` is `IGNORE` wherever nothing is learnt."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, len(row.ids) - row.labels : len(row.ids)] = ids[i, len(row.ids) - row.labels : len(row.ids)]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_loss(model: torch.nn.Module, output: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy over the labels of a batch from `collate`, computed in float32.

    `output` is the model's output embedding. A hook before it lets through the hidden states that predict a label, as (1, labels, hidden); what the family
    does to logits afterwards (soft-capping, scaling) acts on each position by itself and stays its own.
    """
    labels = batch["labels"]
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)
    hook = output.register_forward_pre_hook(lambda module, args: (args[0][rows, columns - 1].unsqueeze(0),))
    try:
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False).logits[0]
    finally:
        hook.remove()
    return functional.cross_entropy(logits.float(), labels[rows, columns], reduction="sum")


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the hardware computes in bf16, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if computes_in_bf16(device.type) else contextlib.nullcontext()


class Loop:
    """A model with trainable adapter weights, its optimiser, schedule and place in the data: what a checkpoint holds (`state_dict`).

    `run_epoch` is called for each epoch in turn. A step's rows and random numbers derive from its number, so a loop that goes on
    from a state makes the steps that an undisturbed one would.
    `at_once` is the most rows that a worker computes together, whose gradients add up to a step's; alone, it is halved when memory runs out.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Encoded],
        pad_id: int,
        settings: Training,
        seed: int,
        rank: int = 0,
        world: int = 1,
        at_once: int | None = None,
    ) -> None:
        self.model, self.rows, self.pad_id, self.settings, self.seed = model, rows, pad_id, settings, seed
        self.rank, self.world = rank, world
        self.at_once = min(at_once or settings.batch_size, settings.batch_size)
        self.device = next(model.parameters()).device
        self._forward = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        self.steps_per_epoch = -(-len(rows) // settings.batch_size)
        total = self.steps_per_epoch * settings.epochs
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self._weights, lr=settings.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1.0 - step / total))
        self.epoch = 0
        self.position = 0
        """Steps of the epoch that are done."""
        self.tokens = 0

    @property
    def step(self) -> int:
        """Steps done in all."""
        return self.epoch * self.steps_per_epoch + self.position

    def state_dict(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "position": self.position, "tokens": self.tokens}
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), **place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.position, self.tokens = state["epoch"], state["position"], state["tokens"]

    def run_epoch(self) -> Iterator[Step]:
        """Train what is left of the epoch, yielding a `Step` after each optimiser step; afterwards `epoch` is one higher."""
        self.model.train()
        lengths = [len(row.ids) for row in self.rows]
        batches = epoch_batches(lengths, self.settings.batch_size, self.seed, self.epoch)
        began, before = time.perf_counter(), self.tokens
        for indices in batches[self.position :]:
            torch.manual_seed(derive_seed(self.seed, "step", self.step, self.rank))
            loss = self._step(indices)
            self.tokens += sum(lengths[i] for i in indices)
            self.position += 1
            yield Step(self.step, self.steps_per_epoch * self.settings.epochs, loss, self.tokens - before, time.perf_counter() - began)
        self.epoch, self.position = self.epoch + 1, 0

    def any_worker(self, condition: bool) -> bool:
        """Whether the condition holds on any worker; all of them must ask."""
        if self.world == 1:
            return condition
        votes = torch.tensor(float(condition), device=self.device)
        torch.distributed.all_reduce(votes)
        return bool(votes)

    def _step(self, indices: Sequence[int]) -> float:
        """One optimiser step on the rows; returns their mean loss per label. Raises `Diverged`, weights untouched, where that is not a number."""
        rows = [self.rows[i] for i in indices]
        mine = rows[self.rank :: self.world] or [Encoded(rows[0].ids, 0)]
        total = self._gradients(mine, sum(row.labels for row in rows))
        if self.world > 1:
            torch.distributed.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(self._weights, self.settings.max_gradient_norm)
        if not (total.isfinite() and norm.isfinite()):
            self.optimizer.zero_grad(set_to_none=True)
            where = f"step {self.step + 1} (epoch {self.epoch + 1}, rows {', '.join(map(str, sorted(indices)))})"
            raise Diverged(f"The training loss or its gradient is not a number in {where}: lower the learning rate.")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def _gradients(self, rows: Sequence[Encoded], labels: int) -> torch.Tensor:
        """Add up the gradients of the rows, `at_once` at a time; returns their share of the mean loss over all `labels` of the step."""
        while True:
            parts = [rows[i : i + self.at_once] for i in range(0, len(rows), self.at_once)]
            try:
                return sum((self._part(part, labels, last=part is parts[-1]) for part in parts), torch.zeros((), device=self.device))
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                held = min(self.at_once, len(rows))
                if held == 1 or self.world > 1:
                    raise RunFailed(f"Memory does not hold {held} rows of training at once: lower cluster.rows_at_once, or add workers.") from None
                self.at_once = held // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _part(self, rows: Sequence[Encoded], labels: int, last: bool) -> torch.Tensor:
        together = contextlib.nullcontext() if last or self.world == 1 else self._forward.no_sync()
        with together:
            with autocast(self.device):
                loss = label_loss(self._forward, self.model.get_output_embeddings(), collate(rows, self.pad_id, self.device)) / labels
            (loss * self.world).backward()  # type: ignore[no-untyped-call]  # DDP averages gradients over workers
        return loss.detach()


def train(training: Loop, on_step: Callable[[Step], None] = lambda step: None) -> float:
    """Run the epochs that are left; returns the mean loss of the last epoch."""
    losses: list[float] = []
    while training.epoch < training.settings.epochs:
        losses = []
        for step in training.run_epoch():
            losses.append(step.loss)
            on_step(step)
    return sum(losses) / max(1, len(losses))
