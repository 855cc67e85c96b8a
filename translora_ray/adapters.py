"""PEFT directories: what is in them, whether they fit a base, what a target adapter takes over from one. No model is loaded here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from translora_ray.config import Adapter, AdapterType
from translora_ray.errors import RunFailed, UsageError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ALL: Literal["all-linear"] = "all-linear"
LORA_TYPES = ("lora", "rslora", "dora")
SERVED_BY_VLLM = ("lora", "rslora")
NAMES: dict[AdapterType, str] = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "prompt_tuning": "prompt-tuning", "ia3": "IA3"}
PROMPT = "prompt_embeddings"
HARMLESS = ("gaussian", "eva", "orthogonal")
"""Beginnings of a LoRA that leave the base as it is (peft, LoraConfig.init_lora_weights)."""
_MAGNITUDE = re.compile(r"^base_model\.model\..+\.lora_magnitude_vector(\.weight)?$")
_LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_IA3 = re.compile(r"^base_model\.model\.(?P<module>.+)\.ia3_l$")
_ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "o_proj": "o", "out_proj": "o", "dense": "o",
    "gate_proj": "u", "up_proj": "u", "gate_up_proj": "u", "fc1": "u", "c_fc": "u", "dense_h_to_4h": "u",
    "down_proj": "d", "fc2": "d", "dense_4h_to_h": "d", "c_proj": "od",
}  # fmt: skip
"""What linear layers do, by their names in transformers: query, key, value, output of attention; up and down in the feed-forward part."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter directory says of itself.

    `shapes` maps a base module to (inputs, outputs) its LoRA factors need, or for IA3 to the one side that its vector scales; both are
    empty for prompt tuning, which has `virtual_tokens` vectors of `width` instead. `rank` and `alpha` are 0 where there is no LoRA.
    """

    path: str
    base: str
    type: AdapterType
    parameters: int
    digest: str
    shapes: dict[str, tuple[int, ...]]
    rank: int = 0
    alpha: float = 0.0
    alphas: bool = False
    """Whether single modules have an alpha of their own (peft's `alpha_pattern`)."""
    dropout: float = 0.0
    virtual_tokens: int = 0
    width: int = 0


def inspect(path: str | Path) -> AdapterInfo:
    """Read an adapter directory without loading a model. Raises `UsageError` where it is not a sound adapter in safetensors."""
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_header(folder)
    kind = _type(folder, config)
    facts = {"shapes": _ia3_shapes(folder, tensors)} if kind == "ia3" else _prompt(folder, tensors) if kind == "prompt_tuning" else None
    return AdapterInfo(
        path=str(folder),
        base=str(config.get("base_model_name_or_path") or ""),
        type=kind,
        parameters=sum(math.prod(shape) for shape in tensors.values()),
        digest=digest(folder),
        **(_lora(folder, config, tensors) if facts is None else facts),
    )


def type_of(path: str | Path) -> AdapterType:
    """The kind alone, without reading the weights."""
    return _type(Path(path), _read_config(Path(path)))


def require(path: str | Path, digest: str, place: str) -> AdapterInfo:
    """What is in the directory, the adapter of the run at `place`; raises `UsageError` where its digest is another than the run's manifest says."""
    info = inspect(path)
    if info.digest != digest:
        raise UsageError(f"The adapter in {place} is not the one its manifest describes: remove the run, and transfer again.")
    return info


def _type(folder: Path, config: dict[str, Any]) -> AdapterType:
    found = config.get("peft_type")
    if found == "LORA":
        return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    if found in ("IA3", "PROMPT_TUNING"):
        return cast(AdapterType, str(found).lower())
    raise UsageError(f"{folder} is a {found} adapter: only LoRA (plain, rsLoRA, DoRA), IA3 and prompt tuning can be moved.")


def _foreign(folder: Path, tensor: str) -> UsageError:
    return UsageError(f"{folder / WEIGHTS} holds the tensor {tensor}, which is no part of such an adapter: only adapters without other weights can be moved.")


def _lora(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> dict[str, Any]:
    dora = bool(config.get("use_dora"))
    sides: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors.items():
        if dora and _MAGNITUDE.match(name):
            continue
        match = _LORA.match(name)
        if match is None:
            raise _foreign(folder, name)
        sides.setdefault(match["module"], {})[match["side"]] = shape
    halves = [module for module, pair in sides.items() if len(pair) < 2]
    if dora and sum(bool(_MAGNITUDE.match(name)) for name in tensors) < len(sides):
        halves.append("magnitude vectors of DoRA")
    if halves or not sides:
        raise UsageError(f"{folder / WEIGHTS} is incomplete: {', '.join(halves) or 'no LoRA factors in it'}; save the adapter again.")
    if config.get("init_lora_weights") not in (None, True, False, *HARMLESS):
        raise UsageError(
            f"{folder / CONFIG} has init_lora_weights {config['init_lora_weights']!r}, which changes the base's own weights: convert it to a plain LoRA first."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or config.get("rank_pattern"):
        raise UsageError(f"{folder / CONFIG} does not give one rank and one alpha for all modules: only such adapters can be moved.")
    for module, pair in sides.items():
        if {pair["A"][0], pair["B"][1]} != {rank}:
            raise UsageError(f"{folder} says rank {rank}, but its weights at {module} have rank {pair['A'][0]} and {pair['B'][1]}: save it again.")
    shapes = {module: (pair["A"][1], pair["B"][0]) for module, pair in sides.items()}
    return {
        "rank": rank,
        "alpha": float(alpha),
        "alphas": bool(config.get("alpha_pattern")),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "shapes": shapes,
    }


def _ia3_shapes(folder: Path, tensors: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        match = _IA3.match(name)
        if match is None:
            raise _foreign(folder, name)
        shapes[match["module"]] = (math.prod(shape),)
    return shapes


def _prompt(folder: Path, tensors: dict[str, list[int]]) -> dict[str, Any]:
    if foreign := [name for name in tensors if name != PROMPT]:
        raise _foreign(folder, foreign[0])
    if not tensors:
        raise UsageError(f"{folder / WEIGHTS} is incomplete: no {PROMPT} in it; save the adapter again.")
    if len(tensors[PROMPT]) != 2:
        raise UsageError(f"{folder / WEIGHTS} has {PROMPT} of {len(tensors[PROMPT])} dimensions for two: save the adapter again.")
    tokens, width = tensors[PROMPT]
    return {"shapes": {}, "virtual_tokens": tokens, "width": width}


def digest(path: str | Path) -> str:
    """sha256 over the adapter's configuration and weights: the same content has the same digest wherever it lies."""
    sha = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        sha.update((Path(path) / name).read_bytes())
    return sha.hexdigest()


def check_fits(info: AdapterInfo, base_name: str, linear_shapes: dict[str, tuple[int, int]], hidden: int) -> None:
    """Raise `UsageError` unless every module of the adapter exists in the base (`models.linear_shapes`) with its shape.

    `hidden` is the width of the base's embeddings, which virtual tokens must have.
    """
    if info.type == "prompt_tuning" and info.width != hidden:
        raise UsageError(f"The adapter {info.path} has virtual tokens of width {info.width}, {base_name} embeds in {hidden}: name the base it was trained on.")
    for module, shape in info.shapes.items():
        if module not in linear_shapes:
            raise UsageError(f"The adapter {info.path} changes the module {module}, which {base_name} does not have: name the base it was trained on.")
        there = linear_shapes[module]
        if not (shape == there or (len(shape) == 1 and shape[0] in there)):
            raise UsageError(
                f"The adapter {info.path} has shape {'x'.join(map(str, shape))} at {module}, {base_name} has "
                f"{there[0]}x{there[1]}: name the base it was trained on."
            )


def inherit(info: AdapterInfo, wanted: Adapter, linear_shapes: dict[str, tuple[int, int]]) -> Adapter:
    """The target adapter, fully set: what the recipe wants, else what the source adapter has. What a LoRA's product is multiplied by stays as it is there.

    `linear_shapes` are the target's; kinds of modules are mapped to its names. Raises `UsageError` where wanted modules match nothing.
    """
    kind = wanted.type or info.type
    if kind == "prompt_tuning":
        return Adapter(type=kind, virtual_tokens=wanted.virtual_tokens or info.virtual_tokens or 20)
    if kind == "ia3":
        return Adapter(type=kind)
    if info.alphas and wanted.alpha is None:
        raise UsageError(f"The adapter {info.path} has an alpha of its own for single modules, which the target's does not take over: set adapter.alpha.")
    rank = wanted.rank or info.rank or 16
    return Adapter(
        type=kind,
        rank=rank,
        alpha=wanted.alpha or (info.alpha / _divisor(info.type, info.rank) if info.rank else 2.0) * _divisor(kind, rank),
        dropout=info.dropout if wanted.dropout is None else wanted.dropout,
        modules=target_modules(info, wanted, linear_shapes),
    )


def _divisor(kind: AdapterType, rank: int) -> float:
    """By what alpha is divided: rsLoRA's root of the rank (arXiv 2312.03732), or the rank."""
    return math.sqrt(rank) if kind == "rslora" else rank


def target_modules(info: AdapterInfo, wanted: Adapter, linear_shapes: dict[str, tuple[int, int]]) -> Literal["all-linear"] | list[str]:
    """Names of the target's linear layers to adapt, or `ALL`: the wanted ones, else those that do what the source adapter's modules do."""
    there = {module.rpartition(".")[2] for module in linear_shapes if "." in module}  # without a dot: the output embedding
    if wanted.modules == ALL:
        return ALL
    if isinstance(wanted.modules, list):
        if unknown := [name for name in wanted.modules if name not in there]:
            raise UsageError(f"adapter.modules: the target has no linear layer named {unknown[0]}; there are {', '.join(sorted(there))}.")
        return sorted(wanted.modules)
    if info.type not in LORA_TYPES:
        return ALL
    given = {module.rpartition(".")[2] for module in info.shapes}
    roles = {role for name in given for role in _ROLES.get(name, "?")}
    chosen = given if given <= there else {name for name in there if roles & set(_ROLES.get(name, ""))}
    return ALL if chosen == there or not chosen or (chosen != given and "?" in roles) else sorted(chosen)


def title(adapter: Adapter) -> str:
    """A fully set adapter in a few words."""
    if adapter.type == "prompt_tuning":
        return f"prompt tuning, {adapter.virtual_tokens} virtual tokens"
    if adapter.type == "ia3":
        return "IA3 on the modules that peft names for this family"
    modules = "all linear layers" if adapter.modules == ALL else ", ".join(adapter.modules or ())
    return f"{NAMES[adapter.type or 'lora']} rank {adapter.rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}, {modules}"


def has_effect(path: str | Path) -> bool:
    """Whether a LoRA's second factors are more than zeros, with which it begins and changes nothing."""
    from safetensors import safe_open

    with safe_open(str(Path(path) / WEIGHTS), framework="pt") as file:
        return any(bool(file.get_tensor(name).any()) for name in file.keys() if ".lora_B." in name)  # noqa: SIM118


MODULES_NAMED = 5


def require_applied(path: str, applied: set[str]) -> None:
    """Raise unless every module of the adapter file is among the modules to which an engine applied it.

    An adapter whose module names match nothing is otherwise dropped in silence, and the bare base answers in its name.
    """
    expected = set(inspect(path).shapes)
    if missing := expected - applied:
        named = ", ".join(sorted(missing)[:MODULES_NAMED]) + (", ..." if len(missing) > MODULES_NAMED else "")
        raise RunFailed(f"The adapter {path} is not live: {len(missing)} of {len(expected)} modules were not applied: {named}.")


def require_change(path: str, changed: bool) -> None:
    """Raise unless answers to a probe differ with and without the adapter."""
    if not changed:
        raise RunFailed(f"The adapter {path} is not live: it changes nothing, or answers with no numbers at all. Check that it was trained.")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text()).items())
        return config
    except (OSError, AttributeError):
        raise UsageError(f"{folder} is not an adapter: it has no {CONFIG}.") from None
    except ValueError:
        raise UsageError(f"{folder / CONFIG} is not a JSON object: save the adapter again.") from None


def _read_header(folder: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    if not (folder / WEIGHTS).exists():
        if any(folder.glob("adapter_model.bin")):
            raise UsageError(f"{folder} holds pickled weights, which are never loaded: save it with safe_serialization=True.")
        raise UsageError(f"{folder} is not an adapter: it has no {WEIGHTS}.")
    try:
        with safe_open(str(folder / WEIGHTS), framework="numpy") as file:  # shapes alone: torch need not be imported
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{folder / WEIGHTS} is corrupt ({error}): copy it again.") from None
