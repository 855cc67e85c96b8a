"""Differentially private training (DP-SGD: Abadi and others, arXiv 1607.00133), with opacus: how far one row can change what the adapter writes has a bound.

Each row's gradient is cut to a length, and noise of a size that follows from epsilon is added to their sum; rows are drawn by Poisson, as the accountant
assumes. Draws and noise come from the machine's own randomness, anew for each step: who knew a seed could take the noise away. So no two trainings are the
same. Against attacks on the rounding of the noise (opacus's secure mode) nothing is done.
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
from translora_ray.errors import Diverged, UsageError
from translora_ray.records import Step
from translora_ray.training.loop import Encoded, collate, label_loss
from translora_ray.training.task import AnyPair, start


def train_privately(
    base: str, pairs: Sequence[AnyPair], adapter: Adapter, settings: Training, seed: int, out: Path, on_step: Callable[[Step], None], privacy: Privacy
) -> dict[str, float]:
    """Train an adapter on `base` and save it at `out`; returns what is guaranteed: `epsilon` and `delta` for each pair, with the `noise` in multiples of the
    `clip` that a row's gradient is cut to. Losses are shown, for whoever may see the rows, and not returned: the guarantee does not hold for them."""
    noise, rate, steps, delta = planned(privacy, settings, len(pairs))
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizer

    made = start(base, pairs, adapter, settings, seed)
    made.model.enable_input_require_grads()  # for opacus's hooks on the first layer
    weights = [weight for weight in made.model.parameters() if weight.requires_grad]
    model, draw, noises = GradSampleModule(made.model, loss_reduction="sum"), torch.Generator(), torch.Generator(made.device)
    optimizer = DPOptimizer(made.optimizer, noise_multiplier=noise, max_grad_norm=privacy.clip, expected_batch_size=settings.batch_size, generator=noises)
    accountant, seen, began, tokens = RDPAccountant(), 0.0, time.perf_counter(), 0
    model.train()
    for number in range(1, steps + 1):
        for generator in (draw, noises):
            generator.manual_seed(secrets.randbits(32))  # of more torch takes no notice on CPUs
        chosen = [made.rows[int(row)] for row in (torch.rand(len(made.rows), generator=draw) < rate).nonzero()]
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
    if not all(weight.isfinite().all() for weight in weights):
        raise Diverged("The private training came to weights that are no numbers: lower generator_training.learning_rate.")
    adapting.save(made.model, out, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent = float(accountant.get_epsilon(delta))
    del made, model, optimizer
    models.release()
    return {"epsilon": spent, "delta": delta, "noise": noise, "clip": privacy.clip}


def planned(privacy: Privacy, settings: Training, rows: int) -> tuple[float, float, int, float]:
    """(noise, chance of a row to be in a step, steps, delta). Raises `UsageError` where opacus is not there, or epsilon is smaller than it can account for."""
    try:
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError:
        raise UsageError("generator_privacy needs opacus: pip install '.[private]', or leave it out.") from None
    rate, steps, delta = min(1.0, settings.batch_size / rows), -(-rows // settings.batch_size) * settings.passes, privacy.delta or 0.1 / rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of orders at the end of their range, which cost a little tightness
            noise = get_noise_multiplier(target_epsilon=privacy.epsilon, target_delta=delta, sample_rate=rate, steps=steps)
    except ValueError as error:
        raise UsageError(f"generator_privacy.epsilon {privacy.epsilon:g} is too small for {rows} rows ({error}): give more, or a larger delta.") from None
    return float(noise), rate, steps, delta


def _evenly(row: Encoded) -> Encoded:
    """The row with weights with which its labels count as one together: a long row is no more than a short one."""
    return replace(row, weights=(1 / row.labels,) * row.labels)
