"""Which engine a command uses, and opening it. Engine modules are imported here and only when asked for."""

from __future__ import annotations

from importlib.util import find_spec

from translora_ray.config import EngineKind
from translora_ray.engines.base import Engine
from translora_ray.errors import UsageError


def choose_engine(kind: EngineKind) -> EngineKind:
    """`auto` is the transformers engine: it is always there. Asking for one that is not installed is an error."""
    if kind == "vllm":
        installed = "is installed, but this release has no engine for it yet" if find_spec("vllm") else "is not installed"
        raise UsageError(f"vLLM {installed}: use --engine transformers.")
    return "transformers"


def open_engine(kind: EngineKind, base: str, device: str | None = None) -> Engine:
    """Load `base` once, on `device` (None: a GPU if there is one); the caller closes the engine."""
    from translora_ray.engines.transformers import TransformersEngine

    choose_engine(kind)
    return TransformersEngine(base, device=device)
