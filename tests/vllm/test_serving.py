"""The service on vLLM, through `ray.serve.llm`: a local registry, adapters by name, streams, promotion."""

from __future__ import annotations

import time
from pathlib import Path

import openai
import pytest

from tests.serving import chat_base, expected, finished_run, free_port, running
from translora_ray.registry import Registry


def test_adapters_of_a_local_registry_answer_on_vllm(tmp_path: Path) -> None:
    base, registry = chat_base(tmp_path / "base"), Registry(str(tmp_path / "registry"))
    runs = {}
    for name, seed in (("colours", 1), ("numbers", 3)):
        run = finished_run(tmp_path / f"run{seed}", base, name, seed)
        runs[registry.publish(run).id] = run
    registry.promote("colours@1")
    options = ["--port", str(free_port()), "--engine", "vllm", "--set", "cluster.vllm.dtype=float32", "--set", "cluster.vllm.cpu_cache_gib=0.2"]
    with running(str(tmp_path / "registry"), *options) as service:
        client = openai.OpenAI(base_url=f"{service.url(500)}/v1", api_key="none", max_retries=0, timeout=120)

        def says(model: str, stream: bool = False) -> str:
            asked = {"model": model, "prompt": "question 1", "max_tokens": 8, "temperature": 0, "stream": stream}
            answer = client.completions.create(**asked)  # type: ignore[call-overload]
            return "".join(piece.choices[0].text for piece in answer) if stream else str(answer.choices[0].text)

        wanted = {release: expected(base, run, "question 1", 8) for release, run in runs.items()}
        assert wanted["colours@1"] != wanted["numbers@1"]
        assert {release: says(release) for release in runs} == wanted == {release: says(release, stream=True) for release in runs}
        chat = client.chat.completions.create(model="colours", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0)
        assert chat.model == "colours@1" and chat.choices[0].message.content == expected(base, runs["colours@1"], "hi\nA:", 6)
        assert chat.usage and chat.usage.completion_tokens == 6
        with pytest.raises(openai.NotFoundError):
            says("nothing")
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="colours", prompt="x" * 5000, max_tokens=8)

        run = finished_run(tmp_path / "run2", base, "colours", 2)
        release = registry.publish(run).id
        assert says(release) == expected(base, run, "question 1", 8), "published while the service runs"
        registry.promote(release)
        time.sleep(1.5)
        assert says("colours:stable") == says(release) != wanted["colours@1"]
        registry.publish(finished_run(tmp_path / "run9", base, "colours", 9, rank=32))
        with pytest.raises(openai.NotFoundError, match="rank 32"):
            says("colours@3")
