"""Our training loop against transformers.Trainer and TRL's SFTTrainer (completion-only loss): same rows, batch, precision, optimiser.

    make bench-training        (or: python benchmarks/training.py --base REF)

A round is an epoch over the first rows of the example with a fresh adapter, and then, outside the time, the loss on the rows that are left; the base is
loaded before the first round, each side in a process of its own. Tokens are those of the rows, padding not counted. Nothing else may run on the machine.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import results
from rounds import CPUS, EXAMPLE, LORA, Side, alternate, run_parts

from translora_ray import adapting, models, references
from translora_ray.config import Training
from translora_ray.reading import load_task
from translora_ray.records import read_rows
from translora_ray.training import loop
from translora_ray.training.task import encode, task_pairs

SETTINGS = Training(epochs=1, batch_size=8, learning_rate=5e-4)
Epoch = Callable[[Any, list[loop.Encoded], int, int], tuple[float, list[float]]]
"""(base with a fresh adapter, rows, padding token, seed) -> seconds of the epoch, without what is made before it, and the loss of each step."""


def ours(model: Any, rows: list[loop.Encoded], pad: int, seed: int) -> tuple[float, list[float]]:
    training = loop.Loop(model, rows, pad, SETTINGS, seed)
    began = time.perf_counter()
    return _since(began, [step.loss for step in training.run_epoch()])


def _since(began: float, losses: list[float]) -> tuple[float, list[float]]:
    return time.perf_counter() - began, losses


def common(scratch: str, seed: int) -> dict[str, Any]:
    """Arguments of transformers' trainers that ask for what our loop does, and for nothing beside."""
    return {
        "output_dir": scratch,
        "num_train_epochs": 1,
        "per_device_train_batch_size": SETTINGS.batch_size,
        "learning_rate": SETTINGS.learning_rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": SETTINGS.max_gradient_norm,
        "weight_decay": 0.0,
        "seed": seed,
        "bf16": models.computes_in_bf16("cpu"),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def logged(trainer: Any) -> tuple[float, list[float]]:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    return _since(began, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def transformers_trainer(model: Any, rows: list[loop.Encoded], pad: int, seed: int) -> tuple[float, list[float]]:
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(part: Sequence[loop.Encoded]) -> dict[str, torch.Tensor]:
        return loop.collate(part, pad, torch.device("cpu"))

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(remove_unused_columns=False, **common(scratch, seed))
        return logged(Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate))


def trl_trainer(model: Any, rows: list[loop.Encoded], _pad: int, seed: int) -> tuple[float, list[float]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = [{"input_ids": row.ids, "labels": [loop.IGNORE] * (len(row.ids) - row.labels) + row.ids[-row.labels :]} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **common(scratch, seed))
        tokenizer = models.load_tokenizer(model.peft_config["default"].base_model_name_or_path)
        return logged(SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(made), processing_class=tokenizer))


KEPT = ", freed memory kept"
"""A side whose process keeps what it frees, as ours does and the others do not by themselves."""
SIDES: dict[str, Epoch] = {
    "our loop": ours,
    "transformers.Trainer": transformers_trainer,
    "trl.SFTTrainer": trl_trainer,
    f"transformers.Trainer{KEPT}": transformers_trainer,
}


def side(name: str, base: str, count: int, pipe: Any) -> None:
    """A process that trains an epoch with a fresh adapter whenever it is asked; answers (seconds, tokens, losses, peak bytes)."""
    import torch

    torch.set_num_threads(CPUS)
    if SIDES[name] is ours or name.endswith(KEPT):
        models.keep_freed_memory()
    task = load_task(EXAMPLE / "task.yaml")
    tokenizer, model = models.load_tokenizer(base), models.load_base(base)
    every = encode(tokenizer, task_pairs(task, read_rows(task.train)), models.context_of(model))
    rows, held_out = every[:count], every[count:]
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        adapted = adapting.create(model, LORA, turn[1])
        adapted.peft_config["default"].base_model_name_or_path = references.resolve(base)
        seconds, losses = SIDES[name](adapted, rows, tokenizer.pad_token_id, turn[1])
        learnt = loop.Loop(adapted, rows, tokenizer.pad_token_id, SETTINGS, turn[1]).loss_on(held_out)
        adapted.unload()
        pipe.send((seconds, sum(len(row.ids) for row in rows), losses, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, learnt))


def loops(rounds: int, requests: int, base: str) -> list[str]:
    sides = {name: Side(side, name, base, requests) for name in SIDES}
    measured: dict[str, list[Any]] = alternate({name: each.round(name) for name, each in sides.items()}, rounds)
    for each in sides.values():
        each.close()
    lines = [f"Rows of {EXAMPLE.name}, batches of {SETTINGS.batch_size}, LoRA of rank {LORA.rank}; wanted: 2.5 times both on Gemma, 1.2 on SmolLM2."]
    columns = ("", "tokens/s", "our loop is faster by", "loss, first quarter", "loss, last quarter", "loss on other rows afterwards", "peak memory, GiB")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, found in measured.items():
        faster = results.spread([theirs[0] / own[0] for theirs, own in zip(found, measured["our loop"], strict=True)], 2)
        quarter = len(found[0][2]) // 4
        first, last = ([sum(part) / len(part) for part in parts] for parts in ([one[2][:quarter] for one in found], [one[2][-quarter:] for one in found]))
        speed = results.spread([one[1] / one[0] for one in found], 0)
        losses = " | ".join(map(results.spread, (first, last, [one[4] for one in found])))
        lines.append(f"| {name} | {speed} | {faster} | {losses} | {max(one[3] for one in found) / 2**30:.1f} |")
    return [*lines, ""]


if __name__ == "__main__":
    run_parts(__doc__, {"loops": loops})
