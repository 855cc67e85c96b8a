"""Adapters that are damaged, foreign or not live are told, not used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import lora, save_model
from translora_ray import adapters, adapting, models
from translora_ray.config import Adapter, AdapterType
from translora_ray.engines.base import AdapterRef, Generate, Sampling, Score
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
    adapters.check_fits(info, tiny_llama, models.linear_shapes(tiny_llama), 32)


def test_another_base_is_told_by_shape(adapter: Path, tiny_gemma: str) -> None:
    with pytest.raises(UsageError, match=r"shape 64x32 at model\.layers\.0\.mlp\.down_proj, .* has 64x48"):
        adapters.check_fits(adapters.inspect(adapter), tiny_gemma, models.linear_shapes(tiny_gemma), 48)


def test_unknown_modules_are_named(adapter: Path, tiny_llama: str) -> None:
    rename_modules(adapter, "q_proj", "query")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.query"):
        adapters.check_fits(adapters.inspect(adapter), tiny_llama, models.linear_shapes(tiny_llama), 32)


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
    (adapter / adapters.CONFIG).write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(UsageError, match="is a LOHA adapter: only LoRA"):
        adapters.inspect(adapter)


def test_alphas_of_single_modules_are_not_lost_in_silence(adapter: Path, tiny_llama: str) -> None:
    config = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 64}}))
    info, shapes = adapters.inspect(adapter), models.linear_shapes(tiny_llama)
    with pytest.raises(UsageError, match=r"has an alpha of its own for single modules, .*: set adapter\.alpha"):
        adapters.inherit(info, Adapter(), shapes)
    assert adapters.inherit(info, Adapter(alpha=4.0), shapes).alpha == 4.0


def test_a_configuration_that_peft_can_not_use_is_one_sentence(adapter: Path, tiny_llama: str) -> None:
    config = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"target_modules": ["query"]}))
    with pytest.raises(UsageError, match=r"peft can not put the adapter .* on its base"):
        TransformersEngine(tiny_llama).score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_size_is_inherited_where_the_recipe_is_silent(adapter: Path, tiny_llama: str) -> None:
    info, shapes = adapters.inspect(adapter), models.linear_shapes(tiny_llama)
    assert adapters.inherit(info, Adapter(), shapes) == lora(16, 32.0)
    assert adapters.inherit(info, Adapter(rank=4), shapes) == lora(4, 8.0)
    assert adapters.inherit(info, Adapter(type="prompt_tuning"), shapes) == Adapter(type="prompt_tuning", virtual_tokens=20)


@pytest.mark.parametrize(
    ("given", "family", "expected"),
    [
        (["q_proj", "v_proj"], "gemma", ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], "gpt2", ["c_attn"]),
        (["gate_proj", "up_proj"], "gpt2", ["c_fc"]),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "gpt2", "all-linear"),
        (["something"], "gpt2", "all-linear"),
    ],
)
def test_kinds_of_modules_are_mapped_to_the_targets_names(tmp_path: Path, given: list[str], family: str, expected: object) -> None:
    info = adapters.AdapterInfo("", "", "lora", 0, "", {f"model.layers.0.{name}": (8, 8) for name in given}, 4, 8.0)
    shapes = models.linear_shapes(save_model(tmp_path / family, family))
    assert adapters.inherit(info, Adapter(), shapes).modules == expected


def test_modules_that_match_nothing_are_named_with_those_that_exist(adapter: Path, tiny_llama: str) -> None:
    wanted = Adapter(modules=["q_proj", "c_attn"])
    with pytest.raises(UsageError, match="no linear layer named c_attn; there are down_proj, gate_proj, k_proj"):
        adapters.inherit(adapters.inspect(adapter), wanted, models.linear_shapes(tiny_llama))


def test_an_adapter_that_is_dropped_in_silence_is_found_out(adapter: Path, tiny_llama: str) -> None:
    rename_modules(adapter, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    engine = TransformersEngine(tiny_llama)
    with pytest.raises(RunFailed, match=r"1 of 14 modules were not applied: model\.layers\.7\.mlp\.up_proj"):
        engine.score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_an_adapter_that_changes_nothing_is_found_out(adapter: Path, tiny_llama: str) -> None:
    tensors = load_file(adapter / adapters.WEIGHTS)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, adapter / adapters.WEIGHTS)
    with pytest.raises(RunFailed, match="changes nothing"):
        TransformersEngine(tiny_llama).score([Score(Prompt("Q"), ("a", "b"), AdapterRef("x", str(adapter)))])


def test_another_type_or_rank_keeps_what_the_product_is_multiplied_by(tiny_llama: str) -> None:
    shapes = models.linear_shapes(tiny_llama)

    def alpha(given: AdapterType, wanted: Adapter) -> float | None:
        return adapters.inherit(adapters.AdapterInfo("", "", given, 0, "", {}, 64, 128.0), wanted, shapes).alpha

    assert alpha("lora", Adapter(type="rslora")) == 16.0  # 128 / 64 = 16 / sqrt(64)
    assert alpha("rslora", Adapter(type="lora")) == 1024.0  # 128 / sqrt(64) = 1024 / 64
    assert alpha("rslora", Adapter(rank=16)) == 64.0  # 128 / sqrt(64) = 64 / sqrt(16)
    assert (alpha("lora", Adapter()), alpha("rslora", Adapter()), alpha("lora", Adapter(rank=16))) == (128.0, 128.0, 32.0)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "prompt_tuning", "ia3"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_every_type_is_made_saved_read_and_answers_as_peft_does(kind: AdapterType, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_model(tmp_path / family, family)
    wanted = adapters.inherit(adapters.AdapterInfo("", "", "lora", 0, "", {}), Adapter(type=kind, rank=4, virtual_tokens=6), models.linear_shapes(base))
    model = adapting.create(models.load_base(base).float(), wanted, 1)
    torch.manual_seed(2)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight.data, mean=float(kind == "ia3"), std=0.1)
    adapting.save(model, tmp_path / "adapter", base)
    info = adapters.inspect(tmp_path / "adapter")
    assert (info.type, info.rank, info.virtual_tokens) == (kind, 4 if wanted.rank else 0, wanted.virtual_tokens or 0)
    adapters.check_fits(info, base, models.linear_shapes(base), models.width(base))

    engine = TransformersEngine(base)
    engine.model.float()
    reference = AdapterRef(kind, str(tmp_path / "adapter"))
    prompts = [Prompt("Q"), Prompt("Q: a longer one than the other\nA:")]
    plain = PeftModel.from_pretrained(models.load_base(base).float(), tmp_path / "adapter").eval()
    for prompt, scores, bare in zip(
        prompts, engine.score([Score(p, ("a", "b"), reference) for p in prompts]), engine.score([Score(p, ("a", "b")) for p in prompts]), strict=True
    ):
        ids = engine.tokenizer(prompt.text + " ", return_tensors="pt").input_ids
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float().log_softmax(-1)
        expected = [float(logits[engine.tokenizer.convert_tokens_to_ids(answer)]) for answer in "ab"]
        assert list(scores) == pytest.approx(expected, abs=2e-3)
        assert list(scores) != pytest.approx(list(bare), abs=1e-3)
    written = engine.generate([Generate(prompt, Sampling(6), reference) for prompt in prompts])
    for prompt, answer in zip(prompts, written, strict=True):
        ids = engine.tokenizer(prompt.text, return_tensors="pt").input_ids
        for _ in range(6):
            ids = torch.cat([ids, plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == 2:
                break
        assert answer.text == engine.tokenizer.decode(ids[0, -answer.tokens :], skip_special_tokens=True)


def test_an_adapter_that_changes_its_base_is_refused(adapter: Path) -> None:
    config = json.loads((adapter / adapters.CONFIG).read_text())
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(UsageError, match="init_lora_weights 'pissa', which changes the base's own weights"):
        adapters.inspect(adapter)


def test_ia3_and_families_that_peft_does_not_know() -> None:
    adapting.require_family(Adapter(type="ia3"), "llama")
    with pytest.raises(UsageError, match="does not know where IA3 goes in a base of the family phi3"):
        adapting.require_family(Adapter(type="ia3"), "phi3")


def test_virtual_tokens_of_another_width_are_told(tiny_llama: str, tiny_gemma: str, tmp_path: Path) -> None:
    adapting.save(adapting.create(models.load_base(tiny_llama), Adapter(type="prompt_tuning", virtual_tokens=3), 0), tmp_path / "prompt", tiny_llama)
    with pytest.raises(UsageError, match=r"virtual tokens of width 32, .* embeds in 48"):
        adapters.check_fits(adapters.inspect(tmp_path / "prompt"), tiny_gemma, models.linear_shapes(tiny_gemma), models.width(tiny_gemma))
    with pytest.raises(UsageError, match="its base embeds in 48"):
        TransformersEngine(tiny_gemma).score([Score(Prompt("Q"), ("a", "b"), AdapterRef("prompt", str(tmp_path / "prompt")))])
