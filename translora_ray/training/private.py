"""Differentially private training (DP-SGD: Abadi and others, arXiv 1607.00133), with opacus: how far one row can change what the adapter writes has a bound.

Each row's gradient is cut to a length, and noise of a size that follows from epsilon is added to their sum; rows are drawn by Poisson, as the accountant
assumes. Draws and noise come from the machine's own randomness: who knew a seed could take the noise away. So no two trainings are the same.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from translora_ray import adapting, models
from translora_ray.config import Adapter, Privacy, Training
from translora_ray.errors import UsageError
from translora_ray.records import Step
from translora_ray.training.loop import Encoded, collate, label_loss
from translora_ray.training.task import AnyPair, start


def train_privately(
    base: str, pairs: Sequence[AnyPair], adapter: Adapter, settings: Training, privacy: Privacy, seed: int, out: Path, on_step: Callable[[Step], None]
) -> dict[str, float]:
    """Train an adapter on `base` and save it at `out`; returns what is guaranteed: `epsilon` and `delta` for each pair, with the `noise` in multiples of the
    `clip` that a row's gradient is cut to. Losses are shown, for whoever may see the rows, and not returned: the guarantee does not hold for them."""
    require_opacus()
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer

    made = start(base, pairs, adapter, settings, seed)
    rows, delta = made.rows, privacy.delta or 0.1 / len(pairs)
    rate, steps = min(1.0, settings.batch_size / len(rows)), made.steps_per_epoch * settings.epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders at the end of their range, which cost a little tightness
        noise = get_noise_multiplier(target_epsilon=privacy.epsilon, target_delta=delta, sample_rate=rate, steps=steps)
    made.model.enable_input_require_grads()  # for opacus's hooks on the first layer
    model, weights = GradSampleModule(made.model, loss_reduction="sum"), [weight for weight in made.model.parameters() if weight.requires_grad]
    draw = torch.Generator().manual_seed(secrets.randbits(63))
    noises = torch.Generator(made.device).manual_seed(secrets.randbits(63))
    optimizer = DPOptimizer(made.optimizer, noise_multiplier=noise, max_grad_norm=privacy.clip, expected_batch_size=settings.batch_size, generator=noises)
    accountant, seen, began, tokens = RDPAccountant(), 0.0, time.perf_counter(), 0
    model.train()
    for number in range(1, steps + 1):
        chosen = [rows[int(row)] for row in (torch.rand(len(rows), generator=draw) < rate).nonzero()]
        optimizer.zero_grad()
        if chosen:
            loss = label_loss(model, made.model.get_output_embeddings(), collate([_evenly(row) for row in chosen], made.pad_id, made.device))
            loss.backward()  # type: ignore[no-untyped-call]
            seen = loss.item() / len(chosen)
        else:  # which is as probable as it is, and has its noise, too
            for weight in weights:
                weight.grad_sample = weight.new_zeros(0, *weight.shape)
        optimizer.step()
        made.schedule.step()
        accountant.step(noise_multiplier=noise, sample_rate=rate)
        tokens += sum(len(row.ids) for row in chosen)
        on_step(Step(number, steps, seen, tokens, time.perf_counter() - began))
    model.remove_hooks()
    adapting.save(made.model, out, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent = float(accountant.get_epsilon(delta))
    del made, model, optimizer
    models.release()
    return {"epsilon": spent, "delta": delta, "noise": float(noise), "clip": privacy.clip}


def require_opacus() -> None:
    """Raise `UsageError` where it is not installed."""
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise UsageError("generator_privacy needs opacus: pip install 'translora_ray[private]', or leave it out.") from None


def _evenly(row: Encoded) -> Encoded:
    """The row with weights with which its labels count as one together: a long row is no more than a short one."""
    return replace(row, weights=(1 / row.labels,) * row.labels)
