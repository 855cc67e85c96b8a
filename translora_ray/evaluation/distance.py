"""How far synthetic prompts lie from real ones: maximum mean discrepancy between what the source base makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy

from translora_ray import models
from translora_ray.progress import Display
from translora_ray.records import Candidate
from translora_ray.stream.collect import NOT_NEEDED
from translora_ray.stream.dedup import COPIES, normal

MOST = 400
"""Prompts of each side, drawn where there are more."""
BATCH = 32


def distances(
    base: str, device: str | None, trained_on: Sequence[str], candidates: Sequence[Candidate], real: Sequence[str], seeds: Sequence[str], display: Display
) -> tuple[dict[str, float], dict[str, Any]]:
    """(MMD of the prompts trained on (`filtered`), and of all that were written and are no copies of seeds (`unfiltered`), to real ones; a map of them).

    Both by the source base's hidden states (paper: table 6).
    """
    candidates = [candidate for candidate in candidates if candidate.input and candidate.reason not in COPIES]
    written = list({normal(candidate.input): candidate.input for candidate in candidates}.values())
    sides = [random.Random(0).sample(texts, min(MOST, len(texts))) for texts in (list(real), list(trained_on), written)]
    hidden = _hidden(base, device, [text for texts in (*sides, seeds) for text in texts], display)
    *parts, of_seeds = numpy.split(hidden, numpy.cumsum(list(map(len, sides))))
    vectors = _unit(numpy.concatenate(parts))  # without the seeds, which are shown and not measured
    true, filtered, unfiltered = numpy.split(vectors, numpy.cumsum(list(map(len, sides)))[:2])
    width = bandwidth(vectors)
    good = {normal(candidate.input) for candidate in candidates if candidate.reason in (None, NOT_NEEDED)}
    rejected = parts[2][numpy.asarray([normal(text) not in good for text in sides[2]], dtype=bool)]
    shown = {"seeds": of_seeds, "real": parts[0], "accepted": parts[1], "rejected": rejected}
    return {"filtered": mmd(true, filtered, width), "unfiltered": mmd(true, unfiltered, width)}, plane(shown)


def plane(groups: dict[str, Any]) -> dict[str, Any]:
    """The groups' vectors on the two directions in which all of them vary most (principal components), and the share of the variance that each shows.

    Points alone: which text a point stands for is not in it.
    """
    vectors = _unit(numpy.concatenate(list(groups.values())))
    _, strength, directions = numpy.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    points = (vectors - vectors.mean(axis=0)) @ directions[:2].T
    parts = numpy.split(points, numpy.cumsum([len(group) for group in groups.values()])[:-1])
    shares = (strength**2 / max(1e-9, float((strength**2).sum())))[:2]
    found = {name: [[round(float(value), 4) for value in point] for point in part] for name, part in zip(groups, parts, strict=True)}
    return {"variance": [round(float(share), 4) for share in shares], "points": found}


def _unit(vectors: Any) -> Any:
    """Centred and scaled to the length of 1."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / numpy.maximum(1e-9, numpy.linalg.norm(vectors, axis=1, keepdims=True))


def _hidden(base: str, device: str | None, texts: Sequence[str], display: Display) -> Any:
    """Mean of the last hidden state over a text's tokens: array (texts, hidden size)."""
    import torch

    tokenizer, model = models.load_tokenizer(base), models.load_base(base, device)
    phase = display.phase("embedding")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch
    found: list[Any] = [None] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            batch = tokenizer([texts[i] for i in part], return_tensors="pt", padding=True, truncation=True, max_length=models.context_of(model)).to(
                model.device
            )
            hidden = model(**batch, output_hidden_states=True, logits_to_keep=1).hidden_states[-1].float()
            mask = batch["attention_mask"][..., None]
            for i, vector in zip(part, ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy(), strict=True):
                found[i] = vector
            phase.update(min(len(order), start + BATCH), len(order))
    del model
    models.release()
    return numpy.stack(found)


def bandwidth(vectors: Any) -> float:
    """The median of the squared distances (Gretton et al., JMLR 2012, section 8)."""
    return float(numpy.median(_squares(vectors, vectors)[numpy.triu_indices(len(vectors), 1)]))


def mmd(ours: Any, theirs: Any, width: float) -> float:
    """Unbiased squared MMD with a Gaussian kernel (Gretton et al., JMLR 2012, lemma 6), 0 in the mean for two draws of the same; below 0 by chance."""

    def kernel(one: Any, other: Any) -> Any:
        return numpy.exp(-_squares(one, other) / max(1e-9, width))

    def within(side: Any) -> float:
        n = len(side)
        return float((kernel(side, side).sum() - n) / max(1, n * (n - 1)))

    return within(ours) + within(theirs) - 2 * float(kernel(ours, theirs).mean())


def _squares(one: Any, other: Any) -> Any:
    return numpy.maximum(0.0, (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T)
