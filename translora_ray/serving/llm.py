"""The deployment on vLLM: `ray.serve.llm`'s LLMServer, with adapters from our registry.

`ray.serve.llm` finds adapters by listing s3://, gs://, abfss:// or azure:// prefixes and takes no local path; it checks no digest, and its cache
on disk knows neither base nor version. LLMServer takes a `model_downloader`, so the smallest change is one class: `Downloader` fetches an
immutable release through the registry, wherever that lies. The rest (routing to replicas that hold the adapter, vLLM's own LoRA modules, their
eviction, autoscaling, health) is Ray's and vLLM's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from translora_ray import adapters
from translora_ray.cluster import Vllm
from translora_ray.engines.vllm import OWNER, engine_arguments
from translora_ray.errors import RunFailed
from translora_ray.serving.loading import Held, Loader
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.prompting import Prompter
from translora_ray.serving.protocol import Asked, Piece, ServiceError

logger = logging.getLogger("ray.serve")
PROOFS = 10
"""Times that an adapter is loaded to be looked at, before the others are too many."""


class Downloader:
    """What LLMServer asks for an adapter that its replica does not hold (in place of `LoraModelLoader`)."""

    def __init__(self, loader: Loader, **_: Any) -> None:
        self.loader, self.measures = loader, loader.measures

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> _Held:
        path = await self.loader.load(lora_model_id)
        self.measures.loaded(lora_model_id)
        return _Held(lambda: self.measures.evicted(lora_model_id), lora_model_id, str(path))


@dataclass
class _Held(Held):
    """As LLMServer reads it; vLLM forgets adapters by itself."""

    model_id: str
    local_path: str


class VllmBackend(LLMServer):  # type: ignore[misc]
    """Answers `Asked` in `Piece`s, as `TransformersBackend` does, through LLMServer's own chat and completions."""

    async def __init__(self, llm_config: LLMConfig, base: str, fingerprint: str, registry: str) -> None:  # type: ignore[misc]
        os.environ[OWNER] = str(os.getpid())  # vLLM's processes end with this one
        self._proved: set[str] = set()
        self._proving = asyncio.Lock()
        self._loader = await asyncio.to_thread(Loader, registry, base, fingerprint, EngineMeasures())
        await super().__init__(llm_config, model_downloader=partial(Downloader, self._loader))
        self._prompter = Prompter(base, self.engine._engine_client.model_config.max_model_len)

    async def answer(self, asked: Asked) -> AsyncIterator[Piece]:
        """In pieces where they are asked for: each costs time on its way.

        vLLM would cut what is over its context in silence, or refuse it in words of its own.
        """
        _, max_tokens = await self._prompter.read(asked)
        asked = replace(asked, max_tokens=max_tokens)
        await self._loader.load(asked.release)  # one that can not be had must not make another leave memory
        await self._hold(asked.release)
        answers = await (self.chat(_chat(asked)) if asked.chat else self.completions(_completion(asked)))
        piece = Piece("")
        async for piece in self._while_it_lives(_read(answers)):
            yield piece
        if not piece.finish:
            raise _error("vLLM ended an answer without a word", 500)

    async def __del__(self) -> None:
        """Serve calls it when the replica ends."""
        if loader := getattr(self, "_loader", None):  # none where it could not be made
            loader.close()
        await super().__del__()

    async def _while_it_lives(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """The pieces, or an error: a request that arrives while vLLM's process is dying would never be answered."""
        while True:
            step = asyncio.ensure_future(_next(pieces))
            try:
                while not (await asyncio.wait([step], timeout=1.0))[0]:
                    if self.engine._engine_client.errored:
                        raise _error("vLLM's process ended", 500)
            finally:
                step.cancel()  # nothing, where it is done
            if (piece := step.result()) is None:
                return
            yield piece

    async def _hold(self, release: str) -> None:
        """Have vLLM load the adapter, and prove once that it applied every module: it drops what it does not know in silence.

        One new adapter at a time: of two first requests for one, the second would find it half loaded, and of several new ones each would take another's place.
        """
        try:
            async with contextlib.nullcontext() if release in self._proved else self._proving:
                await self._maybe_resolve_lora_from_multiplex()
                if release not in self._proved:
                    lora = self.engine._oai_models.lora_requests[release]
                    for applied in await self._applied(lora):
                        adapters.require_applied(lora.lora_path, set(applied))
                    self._proved.add(release)
        except (ValueError, RunFailed) as error:
            logger.error(f"loading {release}: {error}")
            raise self._loader.give_up(release) from None

    async def _applied(self, lora: Any) -> list[list[str]]:
        """What each of vLLM's workers applied of an adapter. It is loaded again where one that answers meanwhile took its place before the question came."""
        for tries_left in reversed(range(PROOFS)):
            try:
                return list(await self.collective_rpc("applied_modules", args=(lora.lora_int_id,)))
            except Exception as error:  # vLLM's processes send on the words alone
                if not tries_left:
                    logger.error(f"others take the place of {lora.lora_name} again and again ({error}): serve more at once (--adapters)")
                    raise ServiceError(503, "engine_unavailable", "Too many adapters are asked for at once: try again.", 2) from None
                await self.engine._engine_client.add_lora(lora)
        raise AssertionError


def deployment(name: str, base: str, fingerprint: str, registry: str, vllm: Vllm, gpus: float, options: dict[str, Any]) -> Any:
    """The deployment, bound to its arguments. `vllm` says the largest rank and how many adapters; `gpus` is 0 where vLLM computes on CPUs."""
    # Sampling is what a request says, not what the base's files suggest, as on the transformers engine.
    arguments = engine_arguments(base, (), vllm, gpus) | {"generation_config": "vllm"}
    folder = arguments.pop("model")
    arguments.pop("distributed_executor_backend")  # ray.serve.llm's business
    cpus = options["ray_actor_options"].pop("num_cpus")
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": folder},
        "engine_kwargs": arguments,
        "lora_config": {"max_num_adapters_per_replica": vllm.adapters},
        "deployment_config": {key: value for key, value in options.items() if key in ("num_replicas", "autoscaling_config")},
        "log_engine_metrics": False,
        "experimental_configs": {"stream_batching_interval_ms": 0},
    }
    if not gpus:
        # vLLM's process works in the replica's place: the place's CPUs are the replica's, after which Ray sets the number of threads.
        config |= {"accelerator_config": {"kind": "cpu"}, "placement_group_config": {"bundles": [{"CPU": 0}]}}
        config["deployment_config"]["ray_actor_options"] = {"num_cpus": cpus}
        config["runtime_env"] = {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}}
    elif gpus < 1:
        config["placement_group_config"] = {"bundles": [{"CPU": cpus, "GPU": gpus}]}
    others = {key: value for key, value in options.items() if key not in ("num_replicas", "autoscaling_config", "ray_actor_options")}
    return build_llm_deployment(
        LLMConfig(**config),
        bind_kwargs={"base": base, "fingerprint": fingerprint, "registry": registry},
        override_serve_options=others | {"name": name},
        deployment_cls=VllmBackend,
    )


def _shared(asked: Asked) -> dict[str, Any]:
    return {
        "model": asked.release,
        "temperature": asked.temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "min_p": asked.min_p,
        "stop": list(asked.stop) or None,
        "seed": asked.seed,
        "stream": asked.stream,
        "stream_options": {"include_usage": True} if asked.stream else None,
    }


def _chat(asked: Asked) -> Any:
    messages = [{"role": role, "content": text} for role, text in asked.messages]
    return ChatCompletionRequest(messages=messages, max_completion_tokens=asked.max_tokens, **_shared(asked))


def _completion(asked: Asked) -> Any:
    return CompletionRequest(prompt=asked.messages[0][1], max_tokens=asked.max_tokens, **_shared(asked))


async def _read(answers: Any) -> AsyncIterator[Piece]:
    """vLLM's server-sent events, or its whole answer, as pieces. The one that ends the text waits for the counts, which come after it."""
    finish, text = None, ""
    async for answer in answers:
        for event in answer if isinstance(answer, list) else [answer]:
            if hasattr(event, "error"):  # an error's answer, of a class that ray.serve.llm does not export
                raise _error(event.error.message, int(event.error.code or 500))
            if not isinstance(event, str):
                (choice,), usage = event.choices, event.usage
                whole = choice.text if hasattr(choice, "text") else choice.message.content or ""
                yield Piece(whole, _finish(choice.finish_reason), usage.prompt_tokens, usage.completion_tokens)
                return
            for line in event.split("\n"):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                content = json.loads(line[6:])
                if "error" in content:
                    raise _error(content["error"]["message"], int(content["error"].get("code") or 500))
                for choice in content["choices"]:
                    text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                    finish = finish or choice["finish_reason"]
                if content.get("usage") and finish:
                    yield Piece(text, _finish(finish), content["usage"]["prompt_tokens"], content["usage"]["completion_tokens"])
                    return
                if text and not finish:
                    yield Piece(text)
                    text = ""


def _finish(reason: str) -> Literal["stop", "length"]:
    """Why an answer ended, where it is whole: vLLM has other reasons for one that it gave up."""
    if reason not in ("stop", "length"):
        raise _error(f"vLLM ended an answer with {reason}", 500)
    return "stop" if reason == "stop" else "length"


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


def _error(message: str, status: int) -> ServiceError:
    if 400 <= status < 500:
        return ServiceError(400, "invalid_request", message)
    return ServiceError(503, "engine_failed", "The engine failed on this request: try again.", 1)
