"""The deployment on vLLM: `ray.serve.llm`'s LLMServer, with adapters from our registry.

`ray.serve.llm` finds adapters by listing s3://, gs://, abfss:// or azure:// prefixes and takes no local path; it checks no digest, and its cache
on disk knows neither base nor version. LLMServer takes a `model_downloader`, so the smallest change is one class: `Downloader` fetches an
immutable release through the registry, wherever that lies. The rest (routing to replicas that hold the adapter, vLLM's own LoRA modules, their
eviction, autoscaling, health) is Ray's and vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, ErrorResponse

from translora_ray import adapters
from translora_ray.config import Vllm
from translora_ray.engines.vllm import OWNER, engine_arguments
from translora_ray.errors import RunFailed
from translora_ray.serving.loading import Loader, unusable
from translora_ray.serving.measures import EngineMeasures
from translora_ray.serving.protocol import Asked, Piece, ServiceError


class Downloader:
    """What LLMServer asks for an adapter that its replica does not hold (in place of `LoraModelLoader`)."""

    def __init__(self, loader: Loader, measures: EngineMeasures, **_: Any) -> None:
        self.loader, self.measures = loader, measures

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> Any:
        with self.measures.load(lora_model_id):
            path = await asyncio.to_thread(self.loader.load, lora_model_id)
        return _Held(self.measures, model_id=lora_model_id, max_total_tokens=None, local_path=str(path), lora_assigned_int_id=0)
