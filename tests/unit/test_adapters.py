"""Adapters that are damaged, foreign or not live are told, not used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from translora_ray import adapters, models
from translora_ray.config import Lora
from translora_ray.engines.base import AdapterRef, Score
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import RunFailed, UsageError
from translora_ray.prompts import Prompt


@pytest.fixture
def adapter(tiny_kit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_kit / "adapter", tmp_path / "adapter"))


def rename_modules(adapter: Path, old: str, new: str) -> None:
    tensors = load_file(adapter / adapters.WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, adapter / adapters.WEIGHTS)


def test_a_sound_adapter_fits_its_base(adapter: Path, tiny_llama: str) -> None:
    info = adapters.inspect(adapter)
    assert (info.rank, info.alpha, len(info.shapes)) == (16, 32.0, 14)
    adapters.check_fits(info, tiny_llama, models.linear_shapes(tiny_llama))


def test_another_base_is_told_by_shape(adapter: Path, tiny_gemma: str) -> None:
    with pytest.raises(UsageError, match=r"shape 64x32 at model\.layers\.0\.mlp\.down_proj, .* has 64x48"):
        adapters.check_fits(adapters.inspect(adapter), tiny_gemma, models.linear_shapes(tiny_gemma))


def test_unknown_modules_are_named(adapter: Path, tiny_llama: str) -> None:
    rename_modules(adapter, "q_proj", "query")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.query"):
        adapters.check_fits(adapters.inspect(adapter), tiny_llama, models.linear_shapes(tiny_llama))


def test_corrupt_pickled_and_missing_weights(adapter: Path) -> None:
    weights = adapter / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="corrupt"):
        adapters.inspect(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UsageError, match="pickled"):
        adapters.inspect(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        adapters.inspect(adapter)
    (adapter / adapters.CONFIG).write_text("[]")
    with pytest.raises(UsageError, match="not an adapter"):
        adapters.inspect(adapter)
    with pytest.raises(UsageError, match="not an adapter"):
        adapters.inspect(adapter / adapters.CONFIG)


def test_another_kind_of_adapter_is_refused(adapter: Path) -> None:
    (adapter / adapters.CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UsageError, match="is a IA3 adapter: only LoRA"):
        adapters.inspect(adapter)


def test_a_configuration_that_peft_can_not_use_is_one_sentence(adapter: Path, tiny_llama: str) -> None:
    config = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"target_modules": ["query"]}))
    with pytest.raises(UsageError, match=r"peft can not put the adapter .* on its base"):
        TransformersEngine(tiny_llama).score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_size_is_inherited_where_the_recipe_is_silent(adapter: Path) -> None:
    info = adapters.inspect(adapter)
    assert adapters.inherit(info, Lora()) == Lora(rank=16, alpha=32.0, dropout=0.0)
    assert adapters.inherit(info, Lora(rank=4)) == Lora(rank=4, alpha=8.0, dropout=0.0)


def test_an_adapter_that_is_dropped_in_silence_is_found_out(adapter: Path, tiny_llama: str) -> None:
    rename_modules(adapter, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    engine = TransformersEngine(tiny_llama)
    with pytest.raises(RunFailed, match=r"1 of 14 modules were not applied, e\.g\. model\.layers\.7\.mlp\.up_proj"):
        engine.score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_an_adapter_that_changes_nothing_is_found_out(adapter: Path, tiny_llama: str) -> None:
    tensors = load_file(adapter / adapters.WEIGHTS)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, adapter / adapters.WEIGHTS)
    with pytest.raises(RunFailed, match="changes nothing"):
        TransformersEngine(tiny_llama).score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_a_dora_serves_as_source_adapter(tiny_llama: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        models.load_base(tiny_llama, "cpu"), LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    adapters.save(model, tmp_path / "dora", tiny_llama)
    info = adapters.inspect(tmp_path / "dora")
    assert info.dora and len(info.shapes) == 14
    reference = AdapterRef("dora", str(tmp_path / "dora"))
    engine = TransformersEngine(tiny_llama)
    assert engine.score([Score(Prompt("Q"), ("a", "b"), reference)]) != engine.score([Score(Prompt("Q"), ("a", "b"))])
