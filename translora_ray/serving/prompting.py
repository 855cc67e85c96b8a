"""What an engine makes of a request before it computes: the prompt in the base's words, and how many tokens may follow it. No Ray here."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from jinja2 import TemplateError

from translora_ray.errors import UsageError
from translora_ray.models import load_tokenizer
from translora_ray.prompts import Prompt, prompt_ids
from translora_ray.serving.protocol import Asked, ServiceError


class Prompter:
    """A base's tokenizer, in a thread of its own, and its context: both engines refuse the same requests with the same words."""

    def __init__(self, base: str, context: int) -> None:
        self.tokenizer, self.context = load_tokenizer(base), context
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def read(self, asked: Asked, virtual_tokens: int = 0) -> tuple[Prompt, int]:
        """The prompt, and how many tokens may follow it. Raises `ServiceError` 400."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, asked, virtual_tokens)

    def _read(self, asked: Asked, virtual_tokens: int) -> tuple[Prompt, int]:
        if asked.chat and asked.messages[-1][0] != "user":
            raise ServiceError(400, "invalid_request", "messages: the last one must be the user's.")
        prompt = Prompt(asked.messages[-1][1], "chat", asked.messages[:-1]) if asked.chat else Prompt(asked.messages[0][1])
        try:
            tokens = len(prompt_ids(self.tokenizer, prompt)) + virtual_tokens
        except UsageError:
            raise ServiceError(400, "invalid_request", "This model's base has no chat template: use /v1/completions.") from None
        except TemplateError as error:
            raise ServiceError(400, "invalid_request", f"messages: the base's chat template does not take them ({error}).") from None
        room = self.context - tokens
        if tokens == virtual_tokens or room < (asked.max_tokens or 1):
            message = f"The prompt has {tokens} tokens and {asked.max_tokens or 1} are to follow, the context has {self.context}."
            raise ServiceError(400, "context_length_exceeded", message if tokens > virtual_tokens else "The prompt has no tokens.")
        return prompt, asked.max_tokens or min(asked.most, room)
