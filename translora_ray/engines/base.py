"""What an engine is: one loaded base model that answers requests, each of which may name an adapter. No engine lives here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from translora_ray.prompts import Prompt

KEPT = 64
"""Adapters that an engine keeps in memory: more than the transfers that are streamed at once name. The one that was used longest ago makes way."""


@dataclass(frozen=True)
class AdapterRef:
    """An adapter by name and by the directory it lies in, which the engine's machine can read."""

    name: str
    path: str


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy. `min_p` drops tokens less likely than that share of the likeliest one:
    unlike top-p it needs no sorting of the vocabulary."""

    max_tokens: int
    temperature: float = 0.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generate:
    """Continue `prompt`. The same seed gives the same text in the same batch on the same engine.

    `watch` is told the tokens' text after each of them, stop strings included, and ends the answer by saying False (transformers engine alone).
    """

    prompt: Prompt
    sampling: Sampling
    adapter: AdapterRef | None = None
    seed: int = 0
    watch: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Generation:
    """Text up to a stop string (left out) or the end token; `finished` is false when max_tokens cut it."""

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool


@dataclass(frozen=True)
class Score:
    """Log-probability, after `prompt`, of the first token in which each answer differs from the others (blanks before it are given)."""

    prompt: Prompt
    answers: tuple[str, ...]
    adapter: AdapterRef | None = None


@dataclass(frozen=True)
class Complete:
    """Log-probability of each token of `completion`, and of the end token after it, given `prompt`."""

    prompt: Prompt
    completion: str
    adapter: AdapterRef | None = None


class Engine(Protocol):
    """One base model in memory. Requests of one call may name different adapters; results keep the order of requests."""

    def generate(self, requests: Sequence[Generate]) -> list[Generation]: ...

    def score(self, requests: Sequence[Score]) -> list[tuple[float, ...]]: ...

    def token_logprobs(self, requests: Sequence[Complete]) -> list[tuple[float, ...]]: ...

    def count_tokens(self, text: str) -> int: ...

    def fits(self, prompt: Prompt, new_tokens: int) -> bool:
        """Whether `prompt` and that many new tokens stay within the base's context."""
        ...

    def close(self) -> None: ...


OpenEngine = Callable[[str, Sequence[AdapterRef]], Engine]
"""Base and the adapters that requests will name -> a loaded engine, which the caller closes."""
