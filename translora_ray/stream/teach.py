"""The teacher's stage: source base and source adapter answer the prompts that were accepted, and no others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from translora_ray.adapters import inspect
from translora_ray.answers import copied
from translora_ray.config import Task
from translora_ray.engines.base import AdapterRef, Complete, Engine, Generate, Generation, Sampling
from translora_ray.evaluation.metrics import reading, says, well_formed
from translora_ray.prompts import Prompt, clean_answer, task_prompt
from translora_ray.recipe import Selection
from translora_ray.records import TOO_LONG, Candidate, Pack, derive_seed
from translora_ray.token_weights import FindSpans, spread

ROLE = "teacher"
UNSURE = "teacher unsure"
ILL_FORMED = "answer ill-formed"
NOT_COPIED = "answer not from its prompt"
OTHER_LABEL = "other label than asked"
GREEDY = Selection()


class Teacher:
    """Answers as hard text labels, so the tokenizers of source and target may differ (Trans-LoRA, section 3.3). Greedy, or the first of several that says what
    most of them say, as the task's metric reads them."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        adapter: AdapterRef,
        learnable: Callable[[Prompt, str], bool] = lambda prompt, answer: True,
        selection: Selection = GREEDY,
        by_excess: bool = False,
        spans: FindSpans | None = None,
        stops: tuple[str, ...] = (),
    ) -> None:
        """`learnable` says whether the target base can take a prompt and its answer whole; `by_excess` measures what the adapter adds to each answer, and
        `spans`, where the engine's tokens stand in an answer, what it adds to each character. An answer ends at one of `stops`, as those of the target's
        adapter will (`Kit.answer_stops`)."""
        self.engine, self.task, self.adapter, self.learnable = engine, task, adapter, learnable
        self.selection, self.by_excess, self.spans, self.stops = selection, by_excess, spans, stops
        self.virtual_tokens = inspect(adapter.path).virtual_tokens

    def _prompt(self, candidate: Candidate) -> Prompt:
        return task_prompt(self.task.prompt, candidate.input, self.task.format)

    def process(self, pack: Pack) -> Pack:
        began = time.perf_counter()
        pack.reject(lambda candidate: not self.engine.fits(self._prompt(candidate), self.task.max_new_tokens + self.virtual_tokens), TOO_LONG)
        candidates = pack.open()
        answers = self._answers(candidates)
        for candidate, votes in zip(candidates, answers, strict=True):
            self._decide(candidate, votes)
        tokens = sum(answer.tokens for votes in answers for answer in votes)
        if self.by_excess or self.spans:
            self._measure(pack.open())
        pack.spend(ROLE, tokens, time.perf_counter() - began)
        return pack

    def _answers(self, candidates: Sequence[Candidate]) -> list[list[Generation]]:
        """All votes on each candidate."""
        votes = self.selection.votes
        sampling = Sampling(self.task.max_new_tokens, self.selection.vote_temperature if votes > 1 else 0.0, stop=self.stops)
        asked = [
            Generate(self._prompt(candidate), sampling, self.adapter, seed=derive_seed(candidate.seed, "vote", vote))
            for candidate in candidates
            for vote in range(votes)
        ]
        given = self.engine.generate(asked)
        return [given[start : start + votes] for start in range(0, len(given), votes)]

    def _decide(self, candidate: Candidate, votes: list[Generation]) -> None:
        given = [clean_answer(vote.text) for vote in votes if vote.finished]
        counted = Counter(reading(self.task, text) for text in given).most_common(2)
        if not counted:
            candidate.target, candidate.reason = clean_answer(votes[0].text), "answer too long"
            return
        candidate.target = next(text for text in given if reading(self.task, text) == counted[0][0])
        lead = counted[0][1] - (counted[1][1] if len(counted) > 1 else 0)
        if lead < self.selection.margin * len(votes):
            candidate.reason = UNSURE
        elif not candidate.target:
            candidate.reason = "empty answer"
        elif not well_formed(self.task, candidate.target):
            candidate.reason = ILL_FORMED
        elif not copied(self.task, candidate.target, candidate.input):
            candidate.reason = NOT_COPIED
        elif self.selection.as_asked and not says(self.task, candidate.target, candidate.label_of(self.task.classes)):
            candidate.reason = OTHER_LABEL
        elif not self.learnable(self._prompt(candidate), candidate.target):
            candidate.reason = TOO_LONG

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """TiTok's excess of each answer (arXiv 2510.04682, section 3.2), end token included."""
        asked = [Complete(self._prompt(candidate), candidate.target or "", adapter) for candidate in candidates for adapter in (self.adapter, None)]
        found = self.engine.token_logprobs(asked)
        for candidate, ours, bare in zip(candidates, found[::2], found[1::2], strict=True):
            candidate.excess = (sum(ours) - sum(bare)) / len(ours)
            if self.spans:
                excess = [with_adapter - without for with_adapter, without in zip(ours, bare, strict=True)]
                candidate.char_excess = spread(excess, self.spans(self._prompt(candidate), candidate.target or ""))
