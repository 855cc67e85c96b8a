"""The training loop: torch and peft, no Ray. Source adapter, discriminator and target adapter are all trained here.

Logits and loss exist only where there is a label: the output embedding sees the labelled positions alone. With a vocabulary of
262,144 that is most of a step's cost.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from translora_ray.config import Training
from translora_ray.errors import Diverged, RunFailed, UsageError
from translora_ray.models import computes_in_bf16
from translora_ray.records import Step, derive_seed

IGNORE = -100
BUCKET_BATCHES = 4
"""Batches made together of rows of like length. More of them save padding and learn slower: like rows have like answers, so steps differ more."""
OTHER_ORDER = "The training's last checkpoint is of a version that takes rows in another order: remove the folder train in the run, and it begins anew."
CURVE_POINTS = 200
"""Most points of the loss over the steps that are kept."""


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids of prompt and answer; the last `labels` of them are learnt, each with its weight, 1 in the mean, where there are some."""

    ids: list[int]
    labels: int
    weights: tuple[float, ...] | None = None


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
    """Right-padded tensors of shape (rows, longest); `labels` is `IGNORE` wherever nothing is learnt. `weights` of labels, where a row has some."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, len(row.ids) - row.labels : len(row.ids)] = ids[i, len(row.ids) - row.labels : len(row.ids)]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if any(row.weights for row in rows):
        batch["weights"] = torch.ones((len(rows), longest))
        for i, row in enumerate(rows):
            if row.weights:
                batch["weights"][i, len(row.ids) - row.labels : len(row.ids)] = torch.tensor(row.weights)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_loss(model: torch.nn.Module, output: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy over the labels of a batch from `collate`, each times its weight, computed in float32.

    `output` is the model's output embedding. A hook before it lets through the hidden states that predict a label, as (1, labels, hidden); what the family
    does to logits afterwards (soft-capping, scaling) acts on each position by itself and stays its own. Virtual tokens stand before the rows.
    """
    labels = batch["labels"]
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)

    def labelled(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        virtual = args[0].shape[1] - labels.shape[1]
        return (args[0][rows, columns + virtual - 1].unsqueeze(0),)

    hook = output.register_forward_pre_hook(labelled)
    try:
        logits = model(**{name: tensor for name, tensor in batch.items() if name not in {"labels", "weights"}}, use_cache=False).logits[0]
    finally:
        hook.remove()
    losses = functional.cross_entropy(logits.float(), labels[rows, columns], reduction="none")
    return (losses * batch["weights"][rows, columns] if "weights" in batch else losses).sum()


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the hardware computes in bf16, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if computes_in_bf16(device.type) else contextlib.nullcontext()


def hold_out(rows: Sequence[Encoded], share: float, seed: int) -> tuple[Sequence[Encoded], list[Encoded]]:
    """(rows to train on, rows to choose epoch and learning rate by): `share` of the rows, one at least, drawn by `seed`; none where it is 0."""
    if not share:
        return rows, []
    if len(rows) < 2:
        raise UsageError("There is one row alone, which can not be trained on and held out: leave training.held_out out, or make more rows.")
    held = set(random.Random(f"{seed}/held out").sample(range(len(rows)), max(1, round(share * len(rows)))))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


class Loop:
    """A model with trainable adapter weights, its optimiser, schedule and place in the data: what a checkpoint holds (`state_dict`).

    `run_epoch` is called for each epoch in turn until `done`. A step's rows and random numbers derive from its number, so a loop that goes on
    from a state makes the steps that an undisturbed one would. Each worker has all trainable weights, and adds up its gradients with the others'.
    `at_once` is the most rows that a worker computes together, whose gradients add up to a step's; it is halved when memory runs out, unless the base is spread
    over the workers, who then have to compute as often as each other.
    `in_order` takes the rows of the first epoch one after the other, for rows that come while it trains.
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
        in_order: bool = False,
    ) -> None:
        self.model, self.pad_id, self.settings, self.seed, self.in_order = model, pad_id, settings, seed, in_order
        self.rows, self.held_out = hold_out(rows, settings.held_out, seed)
        if not self.rows:
            raise UsageError("There is nothing to train on: no example was accepted.")
        self.rank, self.world = rank, world
        self._in_step = any(hasattr(weight, "device_mesh") for weight in model.parameters())
        """Whether the base is spread over the workers."""
        self.at_once = min(at_once or settings.batch_size, settings.batch_size)
        self.device = next(model.parameters()).device
        self.steps_per_epoch = -(-len(self.rows) // settings.batch_size)
        total = self.steps_per_epoch * settings.passes
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.held_out_losses: list[float] = []
        """Mean loss per label of the rows held out, after each epoch."""
        self._best: list[torch.Tensor] = []
        self.optimizer = torch.optim.AdamW(self._weights, lr=settings.learning_rate, weight_decay=0.0, fused=True)
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
        place = {"epoch": self.epoch, "position": self.position, "tokens": self.tokens, "held_out_losses": self.held_out_losses, "best": self._best}
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "order": self._order(self.epoch), **place}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a state; or, with nothing changed, why that can not be."""
        if state.get("order") != self._order(state["epoch"]):
            return OTHER_ORDER
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.position, self.tokens = state["epoch"], state["position"], state["tokens"]
        self.held_out_losses, self._best = state["held_out_losses"], state["best"]
        return None

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights `use_best` takes: that of the least held-out loss, or the last."""
        return 1 + self.held_out_losses.index(min(self.held_out_losses)) if self.held_out_losses else self.epoch

    @property
    def done(self) -> bool:
        """Whether all epochs are trained, or the held-out loss has not fallen for `patience` epochs."""
        patience = self.settings.patience or self.settings.passes
        return self.epoch >= self.settings.passes or (bool(self.held_out_losses) and self.epoch - self.best_epoch >= patience)

    def use_best(self) -> None:
        """Take the weights of the best epoch."""
        if self._best:
            with torch.no_grad():
                for weight, best in zip(self._weights, self._best, strict=True):
                    weight.copy_(best)

    def run_epoch(self) -> Iterator[Step]:
        """Train what is left of the epoch, yielding a `Step` after each optimiser step; afterwards `epoch` is one higher."""
        self.model.train()
        batches = self._batches(self.epoch)
        began, before = time.perf_counter(), self.tokens
        for indices in batches[self.position :]:
            torch.manual_seed(derive_seed(self.seed, "step", self.step, self.rank))
            loss = self._step(indices)
            self.tokens += sum(len(self.rows[i].ids) for i in indices)
            self.position += 1
            yield Step(self.step, self.steps_per_epoch * self.settings.passes, loss, self.tokens - before, time.perf_counter() - began)
        self.epoch, self.position = self.epoch + 1, 0
        if self.held_out:
            self.held_out_losses.append(self.loss_on(self.held_out))
            if self.best_epoch == self.epoch:
                self._best = [weight.detach().cpu().clone() for weight in self._weights]

    def _batches(self, epoch: int) -> list[list[int]]:
        """Row indices of an epoch's steps."""
        size = self.settings.batch_size
        if self.in_order and epoch == 0:
            return [list(range(start, min(start + size, len(self.rows)))) for start in range(0, len(self.rows), size)]
        return epoch_batches([len(row.ids) for row in self.rows], size, self.seed, epoch)

    def _order(self, epoch: int) -> str:
        """A digest of an epoch's steps, if there is such an epoch."""
        return hashlib.sha256(repr(self._batches(epoch)).encode()).hexdigest() if epoch < self.settings.passes else ""

    def loss_on(self, held_out: Sequence[Encoded]) -> float:
        """Mean loss per label of rows that are not trained on."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        shares = [held_out[start + self.rank :: self.world][: self.at_once] for start in range(0, len(held_out), self.at_once * self.world)]
        with torch.no_grad(), autocast(self.device):
            for rows in shares:
                total += label_loss(self.model, self._output, collate(rows or self._empty(), self.pad_id, self.device))
        if self.world > 1:
            torch.distributed.all_reduce(total)
        loss = float(total) / sum(row.labels for row in held_out)
        return loss if loss == loss else float("inf")  # what is not a number is never the least

    def _empty(self) -> list[Encoded]:
        """A row without labels, for a worker whose share is smaller than another's."""
        return [Encoded(self.rows[0].ids, 0)]

    @property
    def _output(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

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
        share = -(-len(rows) // self.world)  # of the largest worker: where the base is spread over them, all must compute as often
        mine = rows[self.rank :: self.world]
        total = self._gradients(mine + self._empty() * (share - len(mine)), sum(row.labels for row in rows))
        if self.world > 1:
            total = self._add_up(total)
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
                return sum((self._part(part, labels) for part in parts), torch.zeros((), device=self.device))
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                held = min(self.at_once, len(rows))
                if held == 1 or self._in_step:
                    raise RunFailed(f"Memory does not hold {held} rows of training at once: {fewer(held)}, or set cluster.recompute.") from None
                self.at_once = held // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _part(self, rows: Sequence[Encoded], labels: int) -> torch.Tensor:
        with autocast(self.device):
            loss = label_loss(self.model, self._output, collate(rows, self.pad_id, self.device)) / labels
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _add_up(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum loss and gradients over the workers, in one message: adapters are small."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        message = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(message)
        parts = torch.split(message[1:], [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return message[0]


def fewer(held: int) -> str:
    """What to do where memory does not hold so many rows at once."""
    return f"set cluster.rows_at_once to {held // 2}" if held > 1 else "spread the base over workers (cluster.workers, cluster.spread_base)"


def train(training: Loop, on_step: Callable[[Step], None] = lambda step: None) -> float:
    """Run the epochs that are left; returns the mean loss of the last epoch."""
    losses: list[float] = []
    while not training.done:
        losses = []
        for step in training.run_epoch():
            losses.append(step.loss)
            on_step(step)
    training.use_best()
    return sum(losses) / max(1, len(losses))


def add_point(curve: list[list[float]], losses: Sequence[float], step: Step) -> None:
    """Every so many steps a point [step, mean loss since the last one], so that a long training keeps no longer a list; `losses` are those of the epoch."""
    every = -(-step.steps // CURVE_POINTS)
    if step.step % every == 0:
        recent = losses[-every:]
        curve.append([step.step, sum(recent) / len(recent)])
