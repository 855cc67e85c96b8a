"""What a transfer is compared with beyond its own parts: adapters made in other ways from the same kit, and from the candidates of the same run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from translora_ray import adapting, models
from translora_ray.answers import copied
from translora_ray.cluster import Cluster
from translora_ray.config import EPOCHS, Adapter, Training
from translora_ray.engines.base import AdapterRef, Engine
from translora_ray.errors import UsageError
from translora_ray.evaluation.metrics import says, well_formed
from translora_ray.kit import Kit
from translora_ray.progress import Display
from translora_ray.recipe import BY_EXCESS, CUTTING, Method, Recipe
from translora_ray.records import Candidate, Pack, TaskRow, derive_seed
from translora_ray.storage import RunStore
from translora_ray.stream.choose import choose
from translora_ray.stream.collect import LABEL_FULL, NOT_NEEDED
from translora_ray.stream.dedup import Seen
from translora_ray.stream.discriminate import OFF_TASK
from translora_ray.stream.plan import Plan
from translora_ray.stream.teach import ILL_FORMED, NOT_COPIED, OTHER_LABEL, UNSURE, Teacher
from translora_ray.token_weights import answer_spans
from translora_ray.training.task import task_pairs, train_adapter

SELECTED: tuple[Method, ...] = ("none", "discriminator", "importance", "excess", "both")
EXTRA: dict[str, str] = {
    "copy": "source adapter as it is on the target",
    "seeds_only": "target, trained on the seeds",
    "unfiltered": "target, trained on candidates that are no copies, as they come",
    **{str(method): f"target, trained on candidates by {method}" for method in SELECTED},
    "none": "target, trained on candidates with a trusted answer, as they come",
}
"""Arms that are made when they are asked for, and their titles."""
WRITTEN = {None, OFF_TASK, UNSURE, ILL_FORMED, NOT_COPIED, OTHER_LABEL, LABEL_FULL, NOT_NEEDED}
"""Reasons of candidates that are well written and no copies: what an arm may choose from."""


@dataclass
class Arms:
    """Makes arms for one run. Every adapter is trained on the target as the transferred one was, on as many rows where there are so many.

    A run by `discriminator` stops when that has taken enough, so `both` chooses among hardly more prompts than it is to find.
    """

    kit: Kit
    manifest: dict[str, Any]
    recipe: Recipe
    store: RunStore
    scratch: Path
    display: Display

    def check(self, names: Sequence[str]) -> None:
        """Raise `UsageError` for an arm that can not be made."""
        own = self._plan(self.manifest["selection"])
        for name in names:
            if name not in EXTRA:
                raise UsageError(f"--arms {name}: there is no such arm; there are {', '.join(EXTRA)}.")
            if name in SELECTED:
                wanted = self._plan(name)
                wanted.check()
                if wanted.judges and not own.judges:
                    raise UsageError(f"--arms {name}: the run's candidates were selected by {own.method}, without asking the discriminator.")
        if "copy" in names:
            target = self.manifest["target_base"]
            try:
                adapting.inspect_for(self.kit.adapter.path, target)
            except UsageError as error:
                raise UsageError(f"--arms copy: {error}") from None

    def sets(self, names: Sequence[str], engine: Engine) -> dict[str, Sequence[TaskRow]]:
        """The rows that each arm trains on. `engine` holds the teacher."""
        found: dict[str, Sequence[TaskRow]] = {"seeds_only": self.kit.seeds} if "seeds_only" in names else {}
        wanted = [name for name in names if name == "unfiltered" or name in SELECTED]
        plain, pool = self._answered(engine, wanted) if wanted else ([], [])
        for name in wanted:
            rows = self._selected(pool if name in CUTTING else plain, name) if name in SELECTED else _rows(plain[: self.manifest["counts"]["quota"]])
            if not rows:
                raise UsageError(f"--arms {name}: no candidate of the run is left to train on; leave this arm out.")
            found[name] = rows
        return found

    def trained(self, names: Sequence[str], sets: dict[str, Sequence[TaskRow]], again: int = 0) -> dict[str, AdapterRef]:
        """An adapter for each set of rows, and the copy. `again`: with other random numbers, the same ones for the same number."""
        found = {"copy": self.kit.adapter} if "copy" in names else {}
        seed, after = (derive_seed(self.recipe.seed, f"training {again}"), f", once more ({again})") if again else (self.recipe.seed, "")
        chosen = {"learning_rate": self.manifest["training"]["learning_rate"], "learning_rates": None}
        adapter = Adapter.model_validate(self.manifest["training"]["adapter"])
        for name, rows in sets.items():
            out = self.scratch / (f"{name}-{again}" if again else name)
            shown = self.display.phase(f"{name.replace('_', ' ')} training{after}").step
            settings = Training.model_validate(self.recipe.training.model_dump() | chosen | self._epochs(name, len(rows)))
            train_adapter(self.manifest["target_base"], task_pairs(self.kit.task, rows), adapter, settings, seed, out, shown)
            found[name] = AdapterRef(out.name, str(out))
        return found

    def _epochs(self, name: str, rows: int) -> dict[str, int]:
        """As many as the run's adapter had; of real rows, which are fewer than its examples, so many that there are as many steps, but up to `EPOCHS`."""
        epochs, quota = self.recipe.training.passes, self.manifest["counts"]["quota"]
        return {"epochs": max(epochs, min(EPOCHS, round(epochs * quota / rows))) if name in ("oracle", "seeds_only") else epochs}

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All of the run."""
        return self.store.candidates()

    @cached_property
    def trained_on(self) -> list[TaskRow]:
        """What the run's own adapter learnt from: by the manifest, as the recipe of an older run may leave the method to a default of then."""
        return _rows(choose(self._plan(self.manifest["selection"]), self.candidates)[0])

    @cached_property
    def _most(self) -> int:
        """Candidates that a method without a cut chooses from."""
        quota: int = self.manifest["counts"]["quota"]
        return math.ceil((quota + self._plan("none").held_out) * self.recipe.selection.surplus)

    @cached_property
    def _as_asked(self) -> bool:
        return self._plan("none").as_asked

    def _plan(self, method: Method) -> Plan:
        selection = self.recipe.selection.model_copy(update={"method": method})
        recipe = self.recipe.model_copy(update={"selection": selection, "overlap": self.recipe.overlap and method == self.manifest["selection"]})
        return Plan(self.kit, self.manifest["target_base"], recipe, Cluster(), "transformers", 1.0, 0.0)

    def _answered(self, engine: Engine, names: Sequence[str]) -> tuple[list[Candidate], list[Candidate]]:
        """(candidates as they come, until at least as many can be learnt from as a method chooses from; these and, where one of the arms cuts, all others that
        the discriminator takes), without repetitions, each with the teacher's answer, whatever that is. Methods without a cut choose from the former."""
        cut = self.recipe.selection.threshold if CUTTING.intersection(names) else math.inf
        weighed = self.recipe.training.token_weights > 0
        spans = partial(answer_spans, models.load_tokenizer(self.manifest["source_base"])) if weighed else None
        selection = self.recipe.selection.model_copy(update={"as_asked": False})  # each arm looks itself
        kit, by_excess = self.kit, bool(BY_EXCESS.intersection(names))
        teacher = Teacher(engine, kit.task, kit.adapter, selection=selection, by_excess=by_excess, spans=spans, stops=kit.answer_stops)
        seen, waiting = Seen(self.recipe.selection.near_duplicate), iter([each for each in self.candidates if each.reason in WRITTEN])
        phase, size = self.display.phase("answers for the arms"), self.recipe.synthesis.pack_size

        def fresh(above: float) -> Iterator[Candidate]:
            for candidate in waiting:
                if not seen.repeats(candidate.input) and (above == -math.inf or (candidate.verdict is not None and candidate.verdict > above)):
                    seen.add(candidate.input)
                    yield replace(candidate, reason=None)

        def answered(above: float, enough: float = math.inf) -> list[Candidate]:
            found: list[Candidate] = []
            while enough > 0 and (pack := list(islice(fresh(above), size))):
                teacher.process(Pack(0, pack))
                found += [each for each in pack if each.target]
                enough -= sum(map(self._suits, pack))
                phase.update(len(found), len(self.candidates))
            return found

        plain = answered(-math.inf, self._most)
        return plain, [*plain, *(answered(cut) if cut < math.inf else [])]

    def _suits(self, candidate: Candidate) -> bool:
        """Whether the teacher's answer to the candidate is one to learn from."""
        task, answer = self.kit.task, candidate.target or ""
        as_asked = not self._as_asked or says(task, answer, candidate.label_of(task.classes))
        return candidate.accepted and as_asked and well_formed(task, answer) and copied(task, answer, candidate.input)

    def _selected(self, pool: Sequence[Candidate], method: Method) -> list[TaskRow]:
        plan = self._plan(method)
        cut = plan.threshold

        def taken(candidate: Candidate) -> bool:
            judged = not plan.judges or (candidate.verdict is not None and candidate.verdict > cut)
            return judged and self._suits(candidate)

        suitable = [candidate for candidate in pool if taken(candidate)]
        return _rows(choose(plan, suitable if method in CUTTING else suitable[: self._most])[0])


def _rows(candidates: Sequence[Candidate]) -> list[TaskRow]:
    return [candidate.row for candidate in candidates]
