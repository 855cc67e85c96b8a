"""From rows to a trained adapter in one process: encoding with the base's own rendering, then the loop. No Ray.

`prepare` and the oracle of `evaluate` call `train_adapter`; Ray Train's workers use the pieces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from translora_ray import adapters, models
from translora_ray.config import Lora, Task, Training
from translora_ray.errors import UsageError
from translora_ray.prompts import Prompt, answer_ids, prompt_ids, task_prompt
from translora_ray.records import Step, TaskRow, derive_seed
from translora_ray.training import loop

Pair = tuple[Prompt, str]


def task_pairs(task: Task, rows: Sequence[TaskRow]) -> list[Pair]:
    return [(task_prompt(task.prompt, row.input, task.format), row.target) for row in rows]


def encode(tokenizer: Any, pairs: Sequence[Pair], context: int) -> list[loop.Encoded]:
    """Token ids per pair; the labels are the answer and the end token. A row longer than the context is an error, never cut."""
    rows = []
    for prompt, answer in pairs:
        labels = answer_ids(tokenizer, prompt, answer)
        rows.append(loop.Encoded(prompt_ids(tokenizer, prompt) + labels, len(labels)))
        if len(rows[-1].ids) > context:
            raise UsageError(f"A row of {len(rows[-1].ids)} tokens exceeds the base's context of {context}: shorten it ({prompt.text[:60]!r}...).")
    return rows


def start(
    base: str,
    pairs: Sequence[Pair],
    lora: Lora,
    settings: Training,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: str | None = None,
    at_once: int | None = None,
    recompute: bool = False,
) -> loop.Loop:
    """Load the base, put a fresh adapter on it and encode the rows. `lora` must be fully set.

    `recompute` keeps few activations and computes the others again for the gradients (torch's gradient checkpointing).
    """
    if lora.rank is None or lora.alpha is None or lora.dropout is None:
        raise ValueError("rank, alpha and dropout must be set before training")
    tokenizer = models.load_tokenizer(base)
    model = adapters.create(models.load_base(base, device), lora.rank, lora.alpha, lora.dropout, derive_seed(seed, "adapter"))
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = encode(tokenizer, pairs, models.context_of(model))
    return loop.Loop(model, rows, tokenizer.pad_token_id, settings, derive_seed(seed, "order"), rank, world, at_once)


def train_adapter(base: str, pairs: Sequence[Pair], lora: Lora, settings: Training, seed: int, out: Path, on_step: Callable[[Step], None]) -> float:
    """Train an adapter on `base` and save it at `out`; returns the last epoch's mean loss."""
    training = start(base, pairs, lora, settings, seed)
    loss = loop.train(training, on_step)
    adapters.save(training.model, out, base)
    return loss


def copy_adapter(source: str, out: Path, base: str) -> None:
    """The two files that make an adapter, with the base named by reference."""
    import json

    out.mkdir(parents=True)
    shutil.copy(Path(source) / adapters.WEIGHTS, out / adapters.WEIGHTS)
    config = json.loads((Path(source) / adapters.CONFIG).read_text())
    (out / adapters.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}, indent=2))
