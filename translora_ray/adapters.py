"""PEFT directories: what is in them, whether they fit a base, how one is made, attached, proved live and saved."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora_ray.config import Lora
from translora_ray.errors import RunFailed, UsageError, first_line

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_MAGNITUDE = re.compile(r"^base_model\.model\..+\.lora_magnitude_vector(\.weight)?$")
_LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter directory says of itself. `shapes` maps a base module to (inputs, outputs) its LoRA factors need;
    `dora` adapters also scale each output (DoRA, arXiv 2402.09353)."""

    path: str
    base: str
    rank: int
    alpha: float
    dropout: float
    dora: bool
    shapes: dict[str, tuple[int, int]]
    parameters: int
    digest: str


def inspect(path: str | Path) -> AdapterInfo:
    """Read an adapter directory without loading a model. Raises `UsageError` where it is not a sound LoRA in safetensors."""
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_header(folder)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA and DoRA adapters can be moved.")
    dora = bool(config.get("use_dora"))
    sides: dict[str, dict[str, list[int]]] = {}
    for name, shape in tensors.items():
        if dora and _MAGNITUDE.match(name):
            continue
        match = _LORA.match(name)
        if match is None:
            raise UsageError(
                f"{folder / WEIGHTS} holds the tensor {name}, which is not a LoRA factor: only LoRA and DoRA adapters without other weights can be moved."
            )
        sides.setdefault(match["module"], {})[match["side"]] = shape
    halves = [module for module, pair in sides.items() if len(pair) < 2]
    if dora and sum(bool(_MAGNITUDE.match(name)) for name in tensors) < len(sides):
        halves.append("magnitude vectors of DoRA")
    if halves or not sides:
        raise UsageError(f"{folder / WEIGHTS} is incomplete: {', '.join(halves) or 'no LoRA factors in it'}; save the adapter again.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or config.get("rank_pattern"):
        raise UsageError(f"{folder / CONFIG} does not give one rank and one alpha for all modules: only such adapters can be moved.")
    for module, pair in sides.items():
        if {pair["A"][0], pair["B"][1]} != {rank}:
            raise UsageError(f"{folder} says rank {rank}, but its weights at {module} have rank {pair['A'][0]} and {pair['B'][1]}: save it again.")
    return AdapterInfo(
        path=str(folder),
        base=str(config.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        dropout=float(config.get("lora_dropout") or 0.0),
        dora=dora,
        shapes={module: (pair["A"][1], pair["B"][0]) for module, pair in sides.items()},
        parameters=sum(_product(shape) for shape in tensors.values()),
        digest=digest(folder),
    )


def digest(path: str | Path) -> str:
    """sha256 over the adapter's configuration and weights: the same content has the same digest wherever it lies."""
    sha = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        sha.update((Path(path) / name).read_bytes())
    return sha.hexdigest()


def check_fits(info: AdapterInfo, base_name: str, linear_shapes: dict[str, tuple[int, int]]) -> None:
    """Raise `UsageError` unless every module of the adapter exists in the base (`models.linear_shapes`) with its shape."""
    for module, (inputs, outputs) in info.shapes.items():
        if module not in linear_shapes:
            raise UsageError(f"The adapter {info.path} changes the module {module}, which {base_name} does not have: name the base it was trained on.")
        if linear_shapes[module] != (inputs, outputs):
            raise UsageError(
                f"The adapter {info.path} has shape {inputs}x{outputs} at {module}, {base_name} has "
                f"{linear_shapes[module][0]}x{linear_shapes[module][1]}: name the base it was trained on."
            )


def inherit(info: AdapterInfo, lora: Lora) -> Lora:
    """Size of the target adapter: what the recipe says, else what the source adapter has (alpha / rank stays as it is there)."""
    return Lora(
        rank=lora.rank or info.rank,
        alpha=lora.alpha or info.alpha * (lora.rank or info.rank) / info.rank,
        dropout=info.dropout if lora.dropout is None else lora.dropout,
    )


def create(model: Any, rank: int, alpha: float, dropout: float, seed: int) -> Any:
    """A fresh LoRA on every linear layer of `model` but the output embedding, in float32, drawn from `seed`."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def attach(model: Any, path: str, name: str) -> Any:
    """Put the adapter at `path` on `model` (bare, or with other adapters on it) under `name`; returns the peft model."""
    from peft import PeftModel

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
            return model
        return PeftModel.from_pretrained(model, path, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"peft can not put the adapter {path} on its base ({first_line(error)}): correct its {CONFIG}, or save it again.") from None


def prove_live(model: Any, tokenizer: Any, path: str, name: str) -> None:
    """Raise unless as many modules are applied as the file has and the model's logits differ with and without the adapter.

    An adapter whose module names match nothing is otherwise dropped in silence, and the bare base answers in its name.
    """
    import torch

    applied = {module for module, layer in model.get_base_model().named_modules() if name in getattr(layer, "lora_A", {})}
    require_applied(path, applied)
    model.set_adapter(name, inference_mode=True)
    probe = torch.tensor([tokenizer("The quick brown fox").input_ids], device=model.device)
    with torch.inference_mode():
        with_adapter = model(probe, use_cache=False).logits
        with model.disable_adapter():
            without = model(probe, use_cache=False).logits
    require_change(path, bool(with_adapter.isfinite().all()) and not torch.equal(with_adapter, without))


def require_applied(path: str, applied: set[str]) -> None:
    """Raise unless every module of the adapter file is among the modules to which an engine applied it."""
    expected = set(inspect(path).shapes)
    if missing := expected - applied:
        raise RunFailed(f"The adapter {path} is not live: {len(missing)} of {len(expected)} modules were not applied, e.g. {sorted(missing)[0]}.")


def require_change(path: str, changed: bool) -> None:
    """Raise unless answers to a probe differ with and without the adapter."""
    if not changed:
        raise RunFailed(f"The adapter {path} is not live: it changes nothing, or answers with no numbers at all. Check that it was trained.")


def load_weights(model: Any, path: str | Path) -> None:
    """Put saved adapter weights into a model from `create`, to go on training them."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(str(Path(path) / WEIGHTS)))


def save(model: Any, path: str | Path, base_reference: str) -> None:
    """Write the trained adapter as a PEFT directory that names the base by reference, not by a path in a cache."""
    model.peft_config["default"].base_model_name_or_path = base_reference
    model.save_pretrained(str(path), save_embedding_layers=False)
    (Path(path) / "README.md").unlink(missing_ok=True)


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
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{folder / WEIGHTS} is corrupt ({error}): copy it again.") from None


def _product(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
