"""The transformers engine against plain transformers, on tiny models."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.serving import finished_run
from translora_ray import adapting, models
from translora_ray.cluster import Vllm
from translora_ray.config import Adapter
from translora_ray.engines import vllm
from translora_ray.engines.base import AdapterRef, Complete, Generate, Sampling, Score
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.prompts import Prompt, answer_ids, prompt_ids

PROMPTS = [Prompt(f"Q: {text}\nA:") for text in ("red", "blue and green", "b", "what is black and white?")]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    engine = TransformersEngine(request.getfixturevalue(f"tiny_{request.param}"), batch_size=3)
    engine.model.float()  # exact comparisons
    return engine


def plain_greedy(engine: TransformersEngine, prompt: str, tokens: int) -> str:
    ids = engine.tokenizer(prompt, return_tensors="pt").input_ids
    output = engine.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(engine.tokenizer.decode(output, skip_special_tokens=True))


def test_greedy_batches_equal_single_plain_generation(engine: TransformersEngine) -> None:
    found = engine.generate([Generate(prompt, Sampling(12)) for prompt in PROMPTS])
    assert [generation.text for generation in found] == [plain_greedy(engine, prompt.text, 12) for prompt in PROMPTS]


def test_lora_and_ia3_take_turns_on_one_base(tiny_llama: str, tmp_path: Path) -> None:
    """Which peft can not put beside each other."""
    ia3 = adapting.create(models.load_base(tiny_llama), Adapter(type="ia3", rank=1, alpha=1.0, dropout=0.0, modules="all-linear"), 0)
    with torch.no_grad():
        for weight in ia3.parameters():
            weight.mul_(1 + 2 * weight.requires_grad)
    adapting.save(ia3, tmp_path / "ia3", tiny_llama)
    loras = [f"{finished_run(tmp_path / str(seed), tiny_llama, 'x', seed)}/adapter" for seed in (1, 2)]
    used = [AdapterRef(path, path) for path in (str(tmp_path / "ia3"), *loras)]
    requests = [Generate(PROMPTS[3], Sampling(8), adapter) for adapter in (*used, None)]
    alone = [TransformersEngine(tiny_llama, device="cpu").generate([request])[0] for request in requests]
    assert len({found.text for found in alone}) == len(alone)
    engine = TransformersEngine(tiny_llama, device="cpu")
    for turn in ((0, 1, 2, 3), (1, 0, 3, 1), (3, 2, 0, 0)):
        assert engine.generate([requests[i] for i in turn]) == [alone[i] for i in turn]


def test_a_shared_beginning_changes_nothing(engine: TransformersEngine) -> None:
    prompts = [Prompt("a long beginning that all of them share, and then " + ending) for ending in ("one", "number two", "3")]
    found = engine.generate([Generate(prompt, Sampling(10)) for prompt in prompts])
    assert [generation.text for generation in found] == [plain_greedy(engine, prompt.text, 10) for prompt in prompts]


def test_sampling_depends_on_the_seed_alone(engine: TransformersEngine) -> None:
    sampling = Sampling(20, temperature=1.0)
    seeds = [3, 4, 3]
    first = engine.generate([Generate(PROMPTS[0], sampling, seed=seed) for seed in seeds])
    assert first[0] == first[2] != first[1]
    assert engine.generate([Generate(PROMPTS[0], sampling, seed=4), Generate(PROMPTS[0], sampling, seed=3)]) == [first[1], first[0]]


def test_sampling_follows_the_distribution(engine: TransformersEngine) -> None:
    """The first token of 600 draws, against the model's own probabilities (total variation of such a sample is below 0.2)."""
    draws = engine.generate([Generate(PROMPTS[0], Sampling(1, temperature=1.0), seed=seed) for seed in range(600)])
    ids = engine.tokenizer(PROMPTS[0].text, return_tensors="pt").input_ids
    expected = engine.model(ids).logits[0, -1].softmax(-1)
    counts = torch.zeros_like(expected)
    for draw in draws:
        counts[engine.tokenizer(draw.text).input_ids[0] if draw.text else 2] += 1
    visible = [i for i in range(len(expected)) if i not in (0, 1, 2, 3)]
    assert 0.5 * float((counts[visible] / 600 - expected[visible]).abs().sum()) < 0.2


def test_stop_strings_end_a_row_and_are_left_out(engine: TransformersEngine) -> None:
    free = engine.generate([Generate(prompt, Sampling(12)) for prompt in PROMPTS])
    long = next(i for i, generation in enumerate(free) if len(generation.text) > 5)
    stop = free[long].text[4]
    cut = engine.generate([Generate(prompt, Sampling(12, stop=(stop,))) for prompt in PROMPTS])
    assert [generation.text for generation in cut] == [generation.text.split(stop)[0] for generation in free]
    assert cut[long].finished and cut[long].tokens <= 5


def test_scores_are_log_probabilities_of_the_first_answer_token(engine: TransformersEngine) -> None:
    engine.tokenizer.add_bos_token = False
    found = engine.score([Score(Prompt(prompt.text + " "), ("a", "b"), None) for prompt in PROMPTS])
    for prompt, scores in zip(PROMPTS, found, strict=True):
        logits = engine.model(engine.tokenizer(prompt.text + " ", return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1)
        tokens = [engine.tokenizer(answer).input_ids[0] for answer in "ab"]
        torch.testing.assert_close(torch.tensor(scores), logits[tokens].detach(), rtol=1e-4, atol=1e-5)


def test_token_log_probabilities_are_those_of_the_plain_forward(engine: TransformersEngine) -> None:
    answers = ("red", "a longer one", "b")
    found = engine.token_logprobs([Complete(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=False)])
    for prompt, answer, logprobs in zip(PROMPTS, answers, found, strict=False):
        asked, learnt = prompt_ids(engine.tokenizer, prompt), answer_ids(engine.tokenizer, prompt, answer)
        plain = engine.model(torch.tensor([asked + learnt])).logits[0].log_softmax(-1)[len(asked) - 1 : -1]
        torch.testing.assert_close(torch.tensor(logprobs), plain[range(len(learnt)), learnt].detach(), rtol=1e-4, atol=1e-4)


def test_answers_that_begin_alike_are_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UsageError, match="can not be told apart"):
        engine.score([Score(Prompt("Q "), ("ab", "abc"), None)])


def test_a_prompt_over_the_context_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(UsageError, match="exceed the context of 2048"):
        engine.generate([Generate(Prompt("a" * 2040), Sampling(20))])


def test_mixed_adapters_in_one_call_each_answer_for_themselves(tiny_llama: str, tiny_kit: Path) -> None:
    engine = TransformersEngine(tiny_llama, batch_size=2)
    teacher = AdapterRef("teacher", str(tiny_kit / "adapter"))
    judge = AdapterRef("judge", str(tiny_kit / "discriminator"))
    mixed = engine.score([Score(prompt, ("a", "b"), adapter) for prompt in PROMPTS for adapter in (None, teacher, judge)])
    for i, adapter in enumerate((None, "adapter", "discriminator")):
        alone = TransformersEngine(tiny_llama, batch_size=2)
        if adapter:
            alone.model = PeftModel.from_pretrained(alone.model, tiny_kit / adapter)
            alone._activate = lambda _: None  # type: ignore[method-assign]
        expected = alone.score([Score(prompt, ("a", "b")) for prompt in PROMPTS])
        torch.testing.assert_close(torch.tensor(mixed[i::3]), torch.tensor(expected), rtol=2e-2, atol=2e-2)


def test_adapters_come_and_go_between_answers_of_the_bare_base(tiny_llama: str, tmp_path: Path) -> None:
    engine = TransformersEngine(tiny_llama)
    first, second = (AdapterRef(str(seed), f"{finished_run(tmp_path / str(seed), tiny_llama, 'x', seed)}/adapter") for seed in (1, 2))

    def says(adapter: AdapterRef | None) -> str:
        return engine.generate([Generate(PROMPTS[0], Sampling(8), adapter)])[0].text

    bare, one = says(None), says(first)
    assert says(None) == bare and (two := says(second)) not in (bare, one), "one is read while the other rests"
    engine.drop(second.path)
    assert (says(None), says(first)) == (bare, one), "and the one that spoke last is gone"
    engine.drop(first.path)
    assert (says(None), says(second), says(None)) == (bare, two, bare)


def test_of_many_adapters_some_stay_in_memory(tiny_llama: str, tmp_path: Path) -> None:
    paths = [f"{finished_run(tmp_path / str(seed), tiny_llama, 'x', seed)}/adapter" for seed in (1, 2, 3)]
    requests = [Generate(PROMPTS[3], Sampling(8), AdapterRef(path, path)) for path in paths]
    alone = [TransformersEngine(tiny_llama, device="cpu").generate([request])[0] for request in requests]
    assert len({found.text for found in alone}) == 3
    engine = TransformersEngine(tiny_llama, device="cpu", kept=2)
    for turn in (0, 1, 0, 2, 1, 1, 0):
        assert engine.generate([requests[turn]]) == [alone[turn]]
        assert len(engine._names) <= 2 and len(engine._adapted.peft_config) <= 2
    assert [*engine._names] == [paths[1], paths[0]]


def test_vllm_on_gpus_gets_its_share_of_one_or_spreads_over_several(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as arguments go: nothing here computes on a GPU."""
    monkeypatch.setattr(vllm, "_on_cpu", lambda: False)
    shared = vllm.engine_arguments(tiny_llama, [], Vllm(), 0.5)
    assert (shared["gpu_memory_utilization"], shared["distributed_executor_backend"], shared["dtype"]) == (0.45, None, "auto")
    assert not {"enforce_eager", "block_size", "kv_cache_memory_bytes"} & shared.keys()
    spread = vllm.engine_arguments(tiny_llama, [], Vllm(tensor_parallel_size=2, memory_share=0.7, context=512), 2)
    assert (spread["gpu_memory_utilization"], spread["distributed_executor_backend"], spread["max_model_len"]) == (0.7, "mp", 512)
    with pytest.raises(UsageError, match=r"computes on GPUs and the engine has none: set cluster\.engine_gpus"):
        vllm.engine_arguments(tiny_llama, [], Vllm(), 0)
