"""Adapters on a model: made, attached, proved live, saved. What lies in their files is the business of `adapters.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from translora_ray import models
from translora_ray.adapters import ALL, CONFIG, PROMPT, WEIGHTS, AdapterInfo, check_fits, inspect, require_applied, require_change
from translora_ray.config import Adapter
from translora_ray.errors import UsageError, first_line

SETS = ("target_modules", "feedforward_modules", "exclude_modules")
"""Keys of peft's configuration that it writes in another order in each process; sorted, so that the same adapter has the same digest."""


def inspect_for(adapter: str | Path, base: str) -> AdapterInfo:
    """What is in an adapter's directory; raises `UsageError` where it is not one for this base, as far as names and shapes tell."""
    info = inspect(adapter)
    check_fits(info, base, models.linear_shapes(base), models.width(base))
    return info


def create(model: Any, adapter: Adapter, seed: int) -> Any:
    """A fresh adapter on `model`, in float32, drawn from `seed`; returns the peft model. `adapter` must be fully set.

    LoRA goes on linear layers but the output embedding; virtual tokens begin as random tokens of the vocabulary.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(model, _config(adapter))
    except ValueError as error:
        raise UsageError(f"peft can not put this adapter on the base ({first_line(error)}): choose another adapter.type or adapter.modules.") from None


def _config(adapter: Adapter) -> Any:
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    if adapter.type == "prompt_tuning":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB")
    if adapter.type == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    kinds = {"use_dora": adapter.type == "dora", "use_rslora": adapter.type == "rslora"}
    sizes = {"r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout, "target_modules": adapter.modules or ALL}
    return LoraConfig(task_type="CAUSAL_LM", **sizes, **kinds)


def require_family(adapter: Adapter, family: str) -> None:
    """Raise `UsageError` where peft does not say on which modules of a family (transformers' model type) IA3 goes."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if adapter.type == "ia3" and family not in KNOWN:
        raise UsageError(f"peft does not know where IA3 goes in a base of the family {family}: choose another adapter.type.")


def attach(model: Any, path: str, name: str) -> Any:
    """Put the adapter at `path` on `model` (bare, or with other adapters on it) under `name`; returns the peft model.

    Not for prompt tuning, which changes no module: an engine puts its vectors before the prompt (`virtual_tokens`).
    """
    from peft import PeftModel

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
            return model
        return PeftModel.from_pretrained(model, path, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"peft can not put the adapter {path} on its base ({first_line(error)}): correct its {CONFIG}, or save it again.") from None


def virtual_tokens(model: Any, path: str) -> Any:
    """The vectors of a prompt-tuning adapter as (virtual tokens, hidden), in the dtype and on the device of the model's embeddings."""
    from safetensors.torch import load_file

    vectors = load_file(str(Path(path) / WEIGHTS))[PROMPT]
    embedding = model.get_input_embeddings().weight
    require_change(path, bool(vectors.isfinite().all()) and bool(vectors.any()))
    if vectors.shape[1] != embedding.shape[1]:
        raise UsageError(f"The adapter {path} has virtual tokens of width {vectors.shape[1]}, its base embeds in {embedding.shape[1]}: name its own base.")
    return vectors.to(embedding)


def prove_live(model: Any, tokenizer: Any, path: str, name: str) -> None:
    """Raise unless as many modules are applied as the file has and the model's logits differ with and without the adapter."""
    import torch

    def holds(layer: Any) -> bool:
        return any(name in getattr(layer, weights, {}) for weights in ("lora_A", "ia3_l"))

    model.set_adapter(name, inference_mode=True)  # first: the one that was active may be gone
    require_applied(path, {module for module, layer in model.get_base_model().named_modules() if holds(layer)})
    probe = torch.tensor([tokenizer("The quick brown fox").input_ids], device=model.device)
    with torch.inference_mode():
        with_adapter = model(probe, use_cache=False).logits
        with model.disable_adapter():
            without = model(probe, use_cache=False).logits
    require_change(path, bool(with_adapter.isfinite().all()) and not torch.equal(with_adapter, without))


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
    written = Path(path) / CONFIG
    config = json.loads(written.read_text())
    for key in SETS:
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
