"""What the vLLM engine adds to vLLM's worker processes: which modules an adapter was applied to, LoRA arithmetic for CPUs, and an end.

vLLM 0.32's arithmetic on CPUs takes a request without an adapter, whose index is -1, for one of the last adapter wherever both kinds meet
in a batch (vllm pull requests 48421 and 49656, open), and copies an adapter's weights for every token. `GroupedLora` does neither. On GPUs
vLLM's own kernels are right and are left alone.

vLLM's processes do not notice that the process they work for was killed, and would keep its memory: a thread here does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class Group(NamedTuple):
    """Adapters that about as many tokens of a batch name: their `slots`, and in `places` (adapters, most tokens) the tokens of each, filled up with token 0."""

    slots: torch.Tensor
    places: torch.Tensor


def groups_of(indices: torch.Tensor) -> tuple[list[Group], torch.Tensor]:
    """The groups of a batch whose tokens name the adapters in these slots (-1: none). Inside a group no adapter has twice as many tokens as another.

    And of each token the position among the places of all groups, one group after the other, or, without an adapter, the position after the last.
    """
    by_size: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for slot in sorted(set(indices.tolist())):
        if slot >= 0:
            tokens = (indices == slot).nonzero()[:, 0]
            by_size.setdefault(len(tokens).bit_length(), []).append((slot, tokens))
    groups = []
    position = torch.full_like(indices, -1)
    count = 0
    for members in by_size.values():
        places = pad_sequence([tokens for _, tokens in members], batch_first=True, padding_value=-1)
        there = (places >= 0).flatten().nonzero()[:, 0]
        position[places.flatten()[there]] = count + there
        count += places.numel()
        groups.append(Group(torch.tensor([slot for slot, _ in members], device=indices.device), places.clamp(min=0)))
    return groups, torch.where(position < 0, count, position)


class GroupedLora(PunicaWrapperCPU):  # type: ignore[misc]
    """One batched product for each group of adapters: one for each adapter would take longer in calls than in arithmetic."""

    groups: list[Group]
    position: torch.Tensor

    def update_metadata(self, *arguments: Any, **keywords: Any) -> None:
        """Takes in which token names which adapter, once per step."""
        super().update_metadata(*arguments, **keywords)
        self.groups, self.position = groups_of(self.token_lora_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Adds to `y` (tokens, outputs of all slices) what the adapters make of `x` (tokens, inputs).

        For each slice, `lora_a_stacked` is (slots, 1, rank, inputs) and `lora_b_stacked` (slots, 1, outputs of the slice, rank).
        """
        if not self.groups:
            return
        outputs, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        parts = [inputs[group.places] for group in self.groups]
        left = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            changes = [
                torch.bmm(torch.bmm(part, a[group.slots, 0].mT) * scale, b[group.slots, 0].mT).flatten(0, 1)
                for part, group in zip(parts, self.groups, strict=True)
            ]
            nothing = changes[0].new_zeros(1, width)
            outputs[:, left : left + width] += torch.cat([*changes, nothing])[self.position]
            left += width


if current_platform.is_cpu():
    current_platform.get_punica_wrapper = lambda: f"{__name__}.{GroupedLora.__name__}"


def _end_with(owner: int, parent: int | None) -> None:
    """End vLLM's processes when their owner is gone: this one, and the one that started it, where that is vLLM's, too, and not gone itself."""
    while True:
        time.sleep(1)
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            if parent and parent != owner and os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


started = multiprocessing.parent_process()
if owner := os.environ.get("TRANSLORA_ENGINE_OWNER"):
    threading.Thread(target=_end_with, args=(int(owner), started.pid if started else None), daemon=True).start()


class AppliedModules:
    """A `worker_extension_cls`: its methods become the worker's."""

    model_runner: Any

    def applied_modules(self, adapter: int) -> list[str]:
        """Modules of the base to which an adapter was applied, as its file names them: where vLLM merges modules (q, k, v), the parts."""
        manager = self.model_runner.lora_manager._adapter_manager
        given = manager.get_adapter(adapter)
        applied: list[str] = []
        for name in manager.modules:
            if (weights := manager._get_lora_layer_weights(given, name)) is None:
                continue
            if parts := manager.packed_modules.get(name):
                applied += [part for part, factor in zip(parts, weights.lora_a, strict=True) if factor is not None]
            else:
                applied.append(name)
        return applied
