"""Bases: loading one, what it is, telling two apart, and whether a task can move between them. References lead to directories in `references.py`."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from translora_ray.errors import UsageError, first_line
from translora_ray.references import resolve


@dataclass(frozen=True)
class ModelInfo:
    """What `translora inspect` says of a base. `vocabulary` counts tokens, `context` is in tokens."""

    reference: str
    family: str
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    chat_template: bool
    end_token: str


_Found = TypeVar("_Found")


def _remembered(read: Callable[[str], _Found]) -> Callable[[str], _Found]:
    """`read`, once per process and base, and again where a file of the base changed: a fleet asks many times after few bases. What it returns is shared."""
    known: dict[str, tuple[object, _Found]] = {}

    @functools.wraps(read)
    def remembering(reference: str) -> _Found:
        folder = resolve(reference)
        stamp = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(folder).iterdir() if file.is_file())
        if folder not in known or known[folder][0] != stamp:
            known[folder] = (stamp, read(reference))
        return known[folder][1]

    return remembering


@_remembered
def load_tokenizer(reference: str) -> Any:
    """The base's tokenizer, with a padding token (the end token where it has none of its own)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(reference), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"The model {reference} has no tokenizer that can be read ({first_line(error)}): put it beside the weights.") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(f"The tokenizer of {reference} has no end-of-sequence token: answers would never end; choose another base.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def computes_in_bf16(device: str) -> bool:
    """Whether the hardware behind a torch device computes in bf16; where it does not, bf16 is many times slower than float32."""
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported())


def require_bits(bits: int | None) -> None:
    """Raise `UsageError` where a base can not be loaded with so many bits per weight."""
    if bits and not find_spec("bitsandbytes"):
        raise UsageError(f"A base in {bits} bits needs bitsandbytes: install the extra quantized, or leave training.base_bits out.")


def _c_library(function: str, *arguments: int) -> int:
    """What a function of the C library returns, 0 where it has none: what is asked for below is glibc's."""
    import ctypes

    found = getattr(ctypes.CDLL(None), function, None)
    return int(found(*arguments)) if found else 0


def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to a gibibyte at a time, for what it allocates next; nothing where there is a GPU.

    The C library gives every large tensor back at once, and the kernel clears each page of the next one: a quarter of a training step on a CPU
    (mallopt in glibc's manual; M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3).
    """
    import torch

    if not torch.cuda.is_available():
        for most in (1 << 30, 32 << 20):  # before glibc 2.35 the second was the most
            if _c_library("mallopt", -3, most):
                _c_library("mallopt", -1, 1 << 30)
                return


def release() -> None:
    """Give the memory of models that are no longer referred to back to the GPU, or to the machine, for whoever loads the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        _c_library("malloc_trim", 0)


def load_base(reference: str, device: str | None = None, bits: int | None = None, stays_on_cpu: bool = False) -> Any:
    """The base's weights on `device` (default: a GPU if there is one), in bf16 where the hardware computes in it, frozen.

    safetensors only, no remote code. On a CPU attention is computed plainly: for short rows torch's fused kernel is slower there.
    `bits` (4 or 8) stores linear layers with so many bits per weight. With `stays_on_cpu` the weights wait there, made for `device`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if computes_in_bf16(device) else torch.float32
    attention = "eager" if device == "cpu" else None
    how = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True, "trust_remote_code": False, **_quantized(bits, dtype, device)}
    model = AutoModelForCausalLM.from_pretrained(resolve(reference), **how)
    model.requires_grad_(False)
    # logits_to_keep hands the output embedding a strided slice; torch then copies the whole embedding once per row of the batch.
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return (model if bits or stays_on_cpu else model.to(device)).eval()


def _quantized(bits: int | None, dtype: Any, device: str) -> dict[str, Any]:
    if not bits:
        return {}
    require_bits(bits)
    from transformers import BitsAndBytesConfig

    kind = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": device}}


def context_of(model: Any) -> int:
    """Most tokens that the base takes; very many where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those of the generation configuration (chat models often have their own)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named] if named is not None else [])}


@_remembered
def skeleton(reference: str) -> Any:
    """The base without weights (torch's meta device): module names and shapes at no cost."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = resolve(reference)
    _check_weights(reference, Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"The model {reference} is not a causal language model that transformers knows ({first_line(error)}).") from None


def _check_weights(reference: str, folder: Path) -> None:
    """Raise `UsageError` unless every file of weights is there and whole. Headers only: the weights themselves are not read."""
    from safetensors import SafetensorError, safe_open

    files = {file.name for file in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"The model {reference} is not whole: {index.name} can not be read ({first_line(error)}); copy it again.") from None
    if not files:
        raise UsageError(f"The model {reference} has no weights in safetensors: convert it; pickled weights are never loaded.")
    for name in sorted(files):
        try:
            with safe_open(str(folder / name), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"The model {reference} is not whole: {name} can not be read ({first_line(error)}); copy it again.") from None


def linear_shapes(reference: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every two-dimensional weight of the base but its embeddings, by module name."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in skeleton(reference).named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and type(module).__name__ != "Embedding":
            conv1d = type(module).__name__ == "Conv1D"
            shapes[name] = (weight.shape[0], weight.shape[1]) if conv1d else (weight.shape[1], weight.shape[0])
    return shapes


def width(reference: str) -> int:
    """Size of the base's embeddings."""
    return int(skeleton(reference).config.get_text_config().hidden_size)


def family(reference: str) -> str:
    """What transformers calls the base's kind of model."""
    return str(skeleton(reference).config.get_text_config().model_type)


def describe(reference: str) -> ModelInfo:
    model, tokenizer = skeleton(reference), load_tokenizer(reference)
    config = model.config.get_text_config()
    return ModelInfo(
        reference=reference,
        family=config.model_type,
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=len(tokenizer),
        context=context_of(model),
        chat_template=bool(tokenizer.chat_template),
        end_token=tokenizer.eos_token,
    )


@_remembered
def fingerprint(reference: str) -> str:
    """A short digest of a base's configuration, tokenizer, templates, and samples spread over its weights: tells two fine-tunes of one
    architecture apart without reading gigabytes."""
    folder = Path(resolve(reference))
    parts = [_sampled(file) for file in sorted(folder.glob("*.safetensors"))]
    texts = [*sorted(folder.glob("tokenizer*.json")), *sorted(folder.glob("*.jinja")), *sorted(folder.glob("generation_config.json"))]
    parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in texts]
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"The model {reference} has no config.json that can be read ({first_line(error)}): copy it again.") from None
    for key in ("_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    return hashlib.sha256(json.dumps([config, parts], sort_keys=True).encode()).hexdigest()[:16]


def require_same(reference: str, wanted: str, which: str) -> None:
    """Raise `UsageError` where the base on this machine has another fingerprint than is wanted, that of the one `which` says. Of "" nothing is known."""
    if wanted and fingerprint(reference) != wanted:
        raise UsageError(f"The base {reference} on {socket.gethostname()} is not the one {which}: bring that version of it there.")


def _sampled(file: Path, samples: int = 64, chunk: int = 1 << 16) -> str:
    """sha256 of a file's size and of `samples` chunks spread evenly over it."""
    size = file.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as weights:
        for i in range(samples):
            weights.seek(max(0, size - chunk) * i // (samples - 1))
            sha.update(weights.read(chunk))
    return sha.hexdigest()


def pair_obstacle(source: ModelInfo, target: ModelInfo, format: str) -> str | None:
    """Why a task in `format` can not move from `source` to `target`, in one sentence; None where it can."""
    for info in (source, target):
        if format == "chat" and not info.chat_template:
            return f"{info.reference} has no chat template and the task's format is chat: use format: text, or an instruct model."
    return None
