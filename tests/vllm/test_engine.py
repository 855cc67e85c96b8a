"""The vLLM engine against the transformers engine, on a tiny model in float32, and what it does with adapters it can not serve."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conftest import lora
from tests.unit.test_adapters import rename_modules
from translora_ray import adapters, adapting, models
from translora_ray.cluster import Vllm
from translora_ray.engines.base import AdapterRef, Complete, Generate, Sampling, Score
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.engines.vllm import VllmEngine
from translora_ray.engines.vllm_worker import GroupedLora, groups_of
from translora_ray.errors import EngineDied, RunFailed, UsageError
from translora_ray.prompts import Prompt

pytestmark = pytest.mark.vllm
PROMPTS = [Prompt(f"Q: {text}\nA:") for text in ("red", "blue and green", "b", "what is black and white?")]
SMALL = {"dtype": "float32", "cpu_cache_gib": 0.1}


@pytest.fixture(scope="module")
def roles(tiny_kit: Path) -> list[AdapterRef | None]:
    return [None, AdapterRef("teacher", str(tiny_kit / "adapter")), AdapterRef("judge", str(tiny_kit / "discriminator"))]


@pytest.fixture(scope="module")
def engine(tiny_llama: str, roles: list[AdapterRef | None]) -> Iterator[VllmEngine]:
    engine = VllmEngine(tiny_llama, [role for role in roles if role], Vllm(**SMALL))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(tiny_llama: str) -> TransformersEngine:
    engine = TransformersEngine(tiny_llama)
    engine.model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return engine


@pytest.fixture
def adapter(tiny_kit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_kit / "adapter", tmp_path / "adapter"))


def configure(adapter: Path, **keys: object) -> None:
    path = adapter / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_verdicts_of_mixed_adapters_are_those_of_the_other_engine(engine: VllmEngine, plain: TransformersEngine, roles: list[AdapterRef | None]) -> None:
    requests = [Score(prompt, ("a", "b"), role) for prompt in PROMPTS for role in roles]
    torch.testing.assert_close(torch.tensor(engine.score(requests)), torch.tensor(plain.score(requests)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", [[-1, 3, 0, 3, 3, 1, -1, 3, 3, 3, 2], [1, 1, 1], [-1, -1], [0, 1, 2, 3]])
def test_many_adapters_in_a_batch_change_each_its_own_tokens(named: list[int]) -> None:
    rank, inputs, widths = 2, 6, (4, 3)
    x, y = torch.randn(len(named), inputs), torch.randn(len(named), sum(widths))
    a, b = (tuple(torch.randn(4, 1, *shape(width)) for width in widths) for shape in (lambda _: (rank, inputs), lambda width: (width, rank)))
    changes = [torch.cat([2.0 * part[slot, 0] @ whole[slot, 0] @ row for whole, part in zip(a, b, strict=True)]) for slot, row in zip(named, x, strict=True)]
    expected = [old if slot < 0 else old + change for slot, old, change in zip(named, y, changes, strict=True)]
    worker = SimpleNamespace(**dict(zip(("groups", "position"), groups_of(torch.tensor(named)), strict=True)))
    GroupedLora.add_lora_linear(worker, y, x, a, b, 2.0, widths)
    torch.testing.assert_close(y, torch.stack(expected))


def test_token_log_probabilities_are_those_of_the_other_engine(engine: VllmEngine, plain: TransformersEngine, roles: list[AdapterRef | None]) -> None:
    requests = [Complete(prompt, answer, role) for prompt, answer in zip(PROMPTS, ("red", "a longer one", "b", "?"), strict=True) for role in roles]
    for ours, theirs in zip(engine.token_logprobs(requests), plain.token_logprobs(requests), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


def test_greedy_answers_are_those_of_the_other_engine(engine: VllmEngine, plain: TransformersEngine, roles: list[AdapterRef | None]) -> None:
    requests = [Generate(prompt, Sampling(8, stop=("e",)), roles[1]) for prompt in PROMPTS]
    ours, theirs = engine.generate(requests), plain.generate(requests)
    assert [(one.text, one.prompt_tokens, one.finished) for one in ours] == [(one.text, one.prompt_tokens, one.finished) for one in theirs]


def test_the_same_call_draws_the_same_texts_and_another_seed_others(engine: VllmEngine) -> None:
    requests = [Generate(PROMPTS[0], Sampling(20, temperature=1.0, min_p=0.02), seed=seed) for seed in (3, 4, 3, 5)]
    first = engine.generate(requests)
    assert engine.generate(requests) == first
    assert first[0].text == first[2].text
    assert len({one.text for one in first}) == 3


def test_what_a_request_draws_does_not_depend_on_what_else_is_in_the_batch(engine: VllmEngine, roles: list[AdapterRef | None]) -> None:
    """In float32, whose rounding is too small to change a choice."""
    drawn = Sampling(24, temperature=1.0, min_p=0.02)
    calls = [[Generate(prompt, drawn, role, seed=7 * i) for i, prompt in enumerate(PROMPTS)] for role in roles]
    alone = [engine.generate([request])[0].text for call in calls for request in call]
    with ThreadPoolExecutor(len(calls)) as threads:
        together = [one.text for call in threads.map(engine.generate, calls) for one in call]
    assert together == alone


@contextlib.contextmanager
def most_requests_at_once(engine: VllmEngine) -> Iterator[list[int]]:
    """How many requests were under way together."""
    ask, under_way, most = engine._answer, 0, [0]

    async def counted(*arguments: Any) -> Any:
        nonlocal under_way
        under_way += 1
        most[0] = max(most[0], under_way)
        try:
            return await ask(*arguments)
        finally:
            under_way -= 1

    engine._answer = counted  # type: ignore[method-assign]
    yield most
    engine._answer = ask  # type: ignore[method-assign]


def test_calls_from_several_threads_meet_in_one_batch_and_each_gets_its_own(engine: VllmEngine, roles: list[AdapterRef | None]) -> None:
    calls = [[Generate(prompt, Sampling(12), role) for prompt in PROMPTS] for role in roles for _ in range(3)]
    with ThreadPoolExecutor(len(calls)) as threads, most_requests_at_once(engine) as most:
        together = list(threads.map(engine.generate, calls))
    assert most[0] > len(PROMPTS)
    assert [[one.text for one in call] for call in together] == [[one.text for one in engine.generate(call)] for call in calls]


def test_what_vllm_does_not_take_is_told(engine: VllmEngine) -> None:
    with pytest.raises(UsageError, match=r"temperature must be in \[0, 2\]"):
        engine.generate([Generate(PROMPTS[0], Sampling(4, temperature=3.0))])


def test_a_prompt_over_the_context_is_refused(engine: VllmEngine) -> None:
    assert engine.context == 2048
    assert engine.fits(Prompt("a" * 2000), 48) and not engine.fits(Prompt("a" * 2000), 49)
    with pytest.raises(UsageError, match="exceed the context of 2048"):
        engine.generate([Generate(Prompt("a" * 2040), Sampling(20))])


def test_a_rank_over_the_largest_is_refused(engine: VllmEngine, tiny_llama: str, tmp_path: Path) -> None:
    adapting.save(adapting.create(models.load_base(tiny_llama), lora(32, 32.0), 0), tmp_path / "large", tiny_llama)
    with pytest.raises(UsageError, match=r"has rank 32, the engine takes 16 at most: raise cluster\.vllm\.rank"):
        engine.score([Score(PROMPTS[0], ("a", "b"), AdapterRef("large", str(tmp_path / "large")))])


def test_modules_that_vllm_would_drop_in_silence_are_named(engine: VllmEngine, adapter: Path) -> None:
    rename_modules(adapter, "layers.1.", "layers.9.")
    with pytest.raises(RunFailed, match=r"not live: 7 of 14 modules were not applied: model\.layers\.9\.mlp\.down_proj, .*, \.\.\."):
        engine.score([Score(PROMPTS[0], ("a", "b"), AdapterRef("renamed", str(adapter)))])


def test_an_adapter_that_changes_nothing_is_refused(engine: VllmEngine, adapter: Path) -> None:
    weights = load_file(adapter / adapters.WEIGHTS)
    save_file({name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights.items()}, adapter / adapters.WEIGHTS)
    with pytest.raises(RunFailed, match="changes nothing"):
        engine.score([Score(PROMPTS[0], ("a", "b"), AdapterRef("nothing", str(adapter)))])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, "incomplete: magnitude vectors of DoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"modules_to_save": ["lm_head"]}, r"vLLM can not load .*modules_to_save.*: use --engine transformers"),
    ],
)
def test_what_vllm_does_not_know_is_told(engine: VllmEngine, adapter: Path, keys: dict[str, object], message: str) -> None:
    configure(adapter, **keys)
    with pytest.raises(UsageError, match=message):
        engine.score([Score(PROMPTS[0], ("a", "b"), AdapterRef("foreign", str(adapter)))])


def test_an_adapter_with_a_vocabulary_of_its_own_is_refused(engine: VllmEngine, adapter: Path) -> None:
    weights = load_file(adapter / adapters.WEIGHTS)
    save_file(weights | {"base_model.model.model.embed_tokens.weight": torch.zeros(70, 32)}, adapter / adapters.WEIGHTS)
    with pytest.raises(UsageError, match=r"holds the tensor base_model\.model\.model\.embed_tokens\.weight, which is no part of such an adapter"):
        engine.score([Score(PROMPTS[0], ("a", "b"), AdapterRef("vocabulary", str(adapter)))])


def test_a_start_that_fails_says_why(tiny_llama: str) -> None:
    with pytest.raises(RunFailed, match=r"vLLM did not start with .* \(ValueError: Available memory .* is less than requested .*: change cluster\.vllm"):
        VllmEngine(tiny_llama, settings=Vllm(dtype="float32", cpu_cache_gib=1000))


def test_a_configuration_that_vllm_refuses_says_why(tiny_llama: str) -> None:
    with pytest.raises(RunFailed, match=r"did not start with .*max_model_len.*2048"):
        VllmEngine(tiny_llama, settings=Vllm(dtype="float32", cpu_cache_gib=0.1, context=10**6))


def test_an_adapter_that_is_not_live_fails_those_that_name_it_and_no_others(tiny_llama: str, tiny_kit: Path, adapter: Path) -> None:
    rename_modules(adapter, "layers.1.", "layers.9.")
    renamed, sound = AdapterRef("renamed", str(adapter)), AdapterRef("sound", str(tiny_kit / "adapter"))
    mixed = VllmEngine(tiny_llama, [renamed, sound], Vllm(**SMALL))
    assert len(mixed.score([Score(PROMPTS[0], ("a", "b"), sound)])) == 1
    for _ in range(2):
        with pytest.raises(RunFailed, match="not live"):
            mixed.score([Score(PROMPTS[0], ("a", "b"), renamed)])
    mixed.close()


def test_a_beginning_that_was_read_is_not_read_again(engine: VllmEngine) -> None:
    from vllm import SamplingParams

    ids = list(range(5, 45)) * 4
    asked = [([*ids, last], SamplingParams(max_tokens=1, temperature=0), None) for last in (5, 6)]
    (first,), (second,) = (engine._all([one]) for one in asked)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 128


def test_a_dead_process_is_an_error_and_no_endless_wait(engine: VllmEngine) -> None:
    """Last: nothing answers after it."""
    children = [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/stat") if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid()]
    (core,) = [child for child in children if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes()]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(engine.generate, [Generate(PROMPTS[0], Sampling(1500, temperature=2.0), seed=seed) for seed in range(200)])
        time.sleep(1)
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineDied, match="ended while it was working"):
            waiting.result(timeout=60)
    with pytest.raises(EngineDied):
        engine.generate([Generate(PROMPTS[0], Sampling(4))])
