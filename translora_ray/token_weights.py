"""Which tokens of an answer the source adapter matters for, carried from the source's tokenizer to the target's by the characters they stand for.

The excess of a token is log p(source + adapter) - log p(source) (TiTok, arXiv 2510.04682, section 3.1). Excesses of tokens add up to that of the text, so
each is spread evenly over the characters of its token, and a target token has the sum of its characters'. No token is decoded or searched for.

Characters are those of the answer as it follows the prompt, with the blank between them where there is one: the same on every base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from translora_ray.errors import UsageError
from translora_ray.prompts import Prompt, answer_text

Spans = list[tuple[int, int]]
FindSpans = Callable[[Prompt, str], Spans]


def require_offsets(tokenizer: Any) -> None:
    """Raise `UsageError` where a tokenizer can not say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UsageError(f"The tokenizer of {tokenizer.name_or_path} does not say where its tokens stand in a text: set training.token_weights to 0.")


def answer_spans(tokenizer: Any, prompt: Prompt, answer: str) -> Spans:
    """(first character, one after the last) of each token of `answer_ids` but the end token. A token of no characters has the one that it stands before."""
    text = answer_text(prompt, answer)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [(start, end) if end > start else (min(start, len(text) - 1), min(start, len(text) - 1) + 1) for start, end in offsets]


def spread(excess: Sequence[float], spans: Spans) -> list[float]:
    """Excess of each character of a text, and of the end token after it, from that of its tokens and the end token."""
    found = [0.0] * max(end for _, end in spans)
    for (start, end), value in zip(spans, excess[:-1], strict=True):
        for character in range(start, end):
            found[character] += value / (end - start)
    return [*found, excess[-1]]


def weigh(excess: Sequence[float], spans: Spans, share: float) -> tuple[float, ...]:
    """A weight for each token at `spans` and for the end token, 1 in the mean: `share` of it goes by excess, the rest is the same for all.

    Excess below 0, where the adapter disagrees with its own answer, counts as 0. Tokens that share a character (bytes of one) share its excess. All are 1
    where nothing has an excess above 0.
    """
    covered = [0] * len(excess)
    for start, end in spans:
        for character in range(start, min(end, len(excess) - 1)):
            covered[character] += 1
    gains = [sum(max(0.0, excess[i]) / covered[i] for i in range(start, min(end, len(excess) - 1))) for start, end in spans]
    gains.append(max(0.0, excess[-1]))
    mean = sum(gains) / len(gains)
    return tuple(1 - share + share * gain / mean if mean > 0 else 1.0 for gain in gains)
