"""An engine that takes no time and no model: prompts follow from seeds, answers from prompts. For what costs something besides engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from translora_ray.engines.base import Complete, Generate, Generation, Score

COLOURS = ("red", "blue", "green")
"""One for each answer of the tests' task, which follows from a prompt's first letter."""


class Scripted:
    """Takes every prompt for a real one."""

    def generate(self, requests: Sequence[Generate]) -> list[Generation]:
        texts = [_answer(request) if request.adapter else f" {COLOURS[place % 3]} {request.seed}" for place, request in enumerate(requests)]
        return [Generation(text, len(text), len(request.prompt.text), True) for text, request in zip(texts, requests, strict=True)]

    def score(self, requests: Sequence[Score]) -> list[tuple[float, ...]]:
        return [tuple(float(-place) for place in range(len(request.answers))) for request in requests]

    def token_logprobs(self, requests: Sequence[Complete]) -> list[tuple[float, ...]]:
        return [(0.0,) * (len(request.completion) + 1) for request in requests]

    def count_tokens(self, text: str) -> int:
        return len(text)

    def fits(self, prompt: object, new_tokens: int) -> bool:
        return True

    def close(self) -> None:
        pass


def _answer(request: Generate) -> str:
    question = request.prompt.text.removeprefix("Q: ")
    return " " + "abc"["rbgwp".index(question[0]) % 3]


def install() -> None:
    """In a worker process, before anything else is imported there: every engine that it opens is scripted."""
    from translora_ray.engines import select

    select.open_engine = lambda *_arguments, **_settings: Scripted()


def train(*_anything: Any) -> None:
    """What a training without a model takes: the way to its worker and back."""
