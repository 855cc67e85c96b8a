"""What users write in YAML: the recipe of a transfer.

Identity is not placement: the recipe is hashed and makes a run what it is, the cluster section (`cluster.py`) never is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from translora_ray.config import EPOCHS, Adapter, Section, Training

GeneratorKind = Literal["source", "target", "adapter"]
Method = Literal["auto", "discriminator", "importance", "excess", "both", "none"]
JUDGING: set[Method] = {"discriminator", "importance", "both"}
"""Methods that ask the discriminator."""
CUTTING: set[Method] = {"discriminator", "both"}
"""Methods that reject what is not above its threshold."""
BY_EXCESS: set[Method] = {"excess", "both"}
"""Methods that ask how much more the adapter says than its base."""
CHOOSING: set[Method] = {"importance", "excess", "both"}
"""Methods that choose when all candidates are answered."""
FEW_LABELS = 5
"""Most labels that a list of seeds covers: as many as it shows by default."""


class Synthesis(Section):
    """How candidates are written."""

    generator: tuple[GeneratorKind, ...] = Field(("source",), min_length=1, strict=False)
    """Who writes candidates. `source`: the source base continues the seeds, on the engine of discriminator and teacher. `target`: the target base does, as in
    the paper. `adapter`: the kit's generator adapter, which is shown no seeds. Of several, as a list, each writes a pack in turn."""
    shots: int = Field(5, ge=1)
    """Most seeds shown in one request (paper: 5), drawn anew for each; by label for each pack, and in it for each label, so that an engine reads them once."""
    fewest_shots: int | None = Field(None, ge=1)
    """Fewest seeds shown in one request of a list, for which a number between this and `shots` is drawn. None: 1 where answers are open, else `shots`. After
    many seeds a base writes what is commonest, after one what is like that one, rare kinds too (`make bench-selection`)."""
    by_label: bool | None = None
    """Whether each request asks for an input of one of the task's labels, all of them in turn: seeds stand after the name of their label, and the name alone
    is to be continued. Few seeds can not cover many classes; their names can. None: where the task has more than FEW_LABELS, as the generator adapter does
    where there are any. A list covers a few by itself, and asks for no label that the base can not compute."""
    temperature: float | None = Field(None, gt=0)
    """Of the generator. None: 1 by label, where half of the candidates at 0.7 repeat others, and for the generator adapter, whose inputs are spread as it has
    learnt them; else 0.7, above which small bases drift off the task."""
    fill: bool | None = None
    """Whether a base's other packs, which take turns, are seeds' inputs whose copied words, such as the values of slots, are exchanged for others of the kind,
    which the base writes (`stream/fill.py`). None: where answers are copies (the task's `answer_words`), prompts a list, and no cut is made, which would
    leave hardly any but these."""
    high_temperature: float | None = Field(None, gt=0)
    """That of the other packs. None: `temperature`, but where that is left open, too, 1.5 by label: at 1 a base begins nearly all inputs of a label in one way,
    and what is off the label at 1.5 the teacher tells; and 1 for values (`make bench-selection`)."""
    min_p: float = Field(0.05, ge=0, lt=1)
    """Drops tokens less likely than this share of the likeliest. Needs no sorting of the vocabulary, unlike top-p, which halves the speed on 262,144 tokens;
    by label up to 1.7 times as many candidates are trusted as with temperature alone (`benchmarks/generation.py choices`)."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest candidate in tokens, or value in one; a longer one is a reject. None: 8 more than twice the longest of the seeds, or of their values."""
    pack_size: int = Field(64, ge=1)
    """Requests that travel, and are computed, together."""

    @field_validator("generator", mode="before")
    @classmethod
    def _one_generator(cls, generators: Any) -> Any:
        return (generators,) if isinstance(generators, str) else generators

    @field_validator("generator")
    @classmethod
    def _each_once(cls, generators: tuple[GeneratorKind, ...]) -> tuple[GeneratorKind, ...]:
        if len(set(generators)) < len(generators):
            raise ValueError("name each generator once")
        return generators

    @model_validator(mode="after")
    def _ordered(self) -> Synthesis:
        if self.fewest_shots and self.fewest_shots > self.shots:
            raise ValueError("fewest_shots must not be higher than shots")
        return self

    @field_serializer("generator")
    def _one_as_a_name(self, generators: tuple[GeneratorKind, ...]) -> str | list[str]:
        return generators[0] if len(generators) == 1 else list(generators)

    def writer(self, pack: int) -> GeneratorKind:
        """Whose turn it is to write pack number `pack`."""
        return self.generator[pack % len(self.generator)]

    def _other(self, pack: int) -> bool:
        return pack // len(self.generator) % 2 == 1

    def fills(self, pack: int) -> bool:
        """Of settled settings, whether pack number `pack` is one of seeds with other values: every other one of each writer's may be."""
        return self._other(pack) and bool(self.fill)

    def warmer(self, pack: int) -> bool:
        """Of settled settings, whether pack number `pack` is written at a temperature above the others': every other one of each writer's may be."""
        return self._other(pack) and (self.high_temperature or 0.0) > (self.temperature or 0.0)

    def asks(self, classes: Sequence[str]) -> bool:
        """`by_label`, decided for a task with such labels."""
        return len(classes) > FEW_LABELS if self.by_label is None else self.by_label

    def asks_all(self, classes: Sequence[str]) -> bool:
        """Whether each candidate is written for a label, whoever writes it."""
        return all(self.settled(classes, generator).by_label for generator in self.generator)

    def settled(self, classes: Sequence[str], generator: GeneratorKind = "source", copies: bool = False) -> Synthesis:
        """These settings with all that may be left open decided, for such a generator and a task with such labels, or whose answers are `copies`."""
        learnt = generator == "adapter"
        by_label = bool(classes) if learnt else self.asks(classes)
        fill = not learnt and (copies and not by_label if self.fill is None else self.fill)
        temperature = self.temperature or (1.0 if by_label or learnt else 0.7)
        others = temperature if self.temperature else 1.5 if by_label else 1.0 if fill else temperature
        high = temperature if learnt else self.high_temperature or others
        decided = {"by_label": by_label, "fill": fill, "temperature": temperature, "high_temperature": high, "fewest_shots": self.fewest(classes)}
        return self.model_copy(update=decided)

    def fewest(self, classes: Sequence[str]) -> int:
        """`fewest_shots`, decided for a task with such labels."""
        return self.fewest_shots or (self.shots if classes else 1)


TAKEN_FOR_A_ROW, CHOSEN_FOR_A_ROW = 4, 2
"""Examples for each row where all that are answered are taken, and where they are chosen, by default of twice as many. Written prompts are less varied than
real ones, so more of them do more for a new adapter than more epochs (`make bench-amount`)."""


class Selection(Section):
    """Which candidates become examples, and which of the teacher's answers are trusted."""

    method: Method = "auto"
    """`discriminator`: verdicts above `threshold` (paper). `importance`: examples are drawn by the discriminator's calibrated odds, so that they are spread as
    the real prompts are. `excess`: those on which the adapter says most beyond its base, log p(source + adapter) - log p(source) of the answer per token
    (TiTok, arXiv 2510.04682); it needs no discriminator. `both`: excess among verdicts above the threshold. `none`: all. `auto`: importance, but none where
    each answer is checked against the label asked for (`as_asked`), which tells as much as a verdict and leaves several times as many candidates, and where the
    kit has no discriminator: excess takes examples of few labels, or with short answers, and makes worse adapters than none on three tasks of three (`make
    bench-selection`). The cut, which may leave 3 % of the candidates, is for `overlap`, and for kits that were made before discriminators were calibrated."""
    quota: int | None = Field(None, ge=1)
    """Examples to train on. None: for each row that the kit was made from `TAKEN_FOR_A_ROW` where all that are answered are taken (`none`), else
    `CHOSEN_FOR_A_ROW`; the paper takes one."""
    threshold: float = 0.0
    """Least log p(yes) - log p(no) of the discriminator; 0 is the paper's p(yes) > p(no)."""
    surplus: float = Field(2.0, ge=1)
    """Answered candidates per example wanted, of which `importance`, `excess` and `both` choose (TiTok: 2)."""
    balance: float | None = Field(None, ge=1)
    """Most examples of one of the task's labels, in even shares; the others are rejects. None: as they come."""
    votes: int = Field(1, ge=1)
    """Answers of the teacher to each prompt, of which the most frequent counts (self-consistency, arXiv 2203.11171). 1: one answer, the likeliest."""
    vote_temperature: float = Field(0.7, gt=0)
    """At which the votes are drawn."""
    margin: float = Field(0.4, ge=0, le=1)
    """Least share of the votes by which the most frequent answer leads the next; else the candidate is a reject."""
    as_asked: bool | None = None
    """Whether the teacher's answer must be the label that the candidate was written for. None: where all generators write by label (`by_label`). Where the
    two differ, the prompt lies between labels, or on none of them."""
    near_duplicate: float = Field(0.95, gt=0, le=1)
    """Similarity (1 - normalised edit distance) from which a candidate repeats a seed or an accepted prompt."""
    seed_overlap: float = Field(0.8, gt=0, le=1)
    """Share of the runs of five words of a seed, or of the candidate, that are in the other, from which the candidate is a copy of it."""
    max_candidates: int = Field(30, ge=1)
    """Candidates per example wanted, after which a run that is not full stops with an error."""


class Gate(Section):
    """What a transferred adapter has to show, without real rows, before it ships (`evaluation/gate.py`)."""

    held_out: float = Field(0.1, ge=0, le=0.5)
    """Examples made beside the quota, as a share of it, which are not trained on: the adapter answers them, and agrees with the teacher or not. 0: no gate."""
    ship: float = Field(0.9, ge=0, le=1)
    """Least agreement, and least accuracy on the seeds, with which an adapter ships. Agreement below it with its whole 95 % interval is refused: what differs
    from the teacher that often loses more than `loss` on real rows, where the teacher is mostly right. Between them a person reviews."""
    refuse: float = Field(0.5, ge=0, le=1)
    """Accuracy on the seeds below which an adapter is refused, where it lies there with its whole 95 % interval. Nothing ships whose interval, or that of its
    agreement, reaches below it: three answers are too few to ship by, whatever they are."""
    acceptance: float = Field(0.02, ge=0, le=1)
    """Least share of candidates that became examples; below it a person reviews."""
    likeness: float = Field(0.25, ge=0, le=0.5)
    """Least chance that the discriminator finds an example more like the task than a real prompt that it was not trained on; 0.5 where it can not tell
    them apart. Below it, and below what chance allows for as few real prompts as there were, a person reviews. Not for kits without a discriminator."""
    loss: float = Field(0.05, ge=0, le=1)
    """On real rows (`translora evaluate`): accuracy that may be lost to the source adapter or the bare target, whichever is better."""

    @model_validator(mode="after")
    def _ordered(self) -> Gate:
        if self.refuse > self.ship:
            raise ValueError("refuse must not be higher than ship")
        return self


class Recipe(Section):
    """Everything that decides what a transfer produces, given the kit and the target base."""

    seed: int = 0
    synthesis: Synthesis = Synthesis()
    selection: Selection = Selection()
    gate: Gate = Gate()
    training: Training = Training()
    adapter: Adapter = Adapter()
    """Type and size of the target adapter; None inherits from the source adapter."""
    overlap: bool = False
    """Training begins with the first examples that are committed, and takes the others as they come: the first epoch has their order. The workers hold their
    resources beside the engines."""

    @model_validator(mode="after")
    def _knows_its_rows(self) -> Recipe:
        if self.overlap and self.training.held_out:
            raise ValueError("rows held out are drawn from all of them, before training begins: leave overlap or training.held_out out")
        if self.overlap and self.selection.method in CHOOSING:
            raise ValueError(f"{self.selection.method} chooses among all examples, before training begins: leave overlap out, or selection.method")
        return self

    def selects(self, classes: Sequence[str], discriminator: dict[str, Any] | None) -> Selection:
        """`selection` with `as_asked` and `auto` decided, for a task with such labels and a kit with such a discriminator."""
        as_asked = self.synthesis.asks_all(classes) if self.selection.as_asked is None else self.selection.as_asked
        cuts = self.overlap or "calibration" not in (discriminator or {})
        auto: Method = "none" if as_asked or discriminator is None else "discriminator" if cuts else "importance"
        return self.selection.model_copy(update={"as_asked": as_asked, "method": auto if self.selection.method == "auto" else self.selection.method})

    def decided(self, classes: Sequence[str], rows: int, discriminator: dict[str, Any] | None, copies: bool = False) -> Recipe:
        """With what is left to a kit's labels, its number of rows, its discriminator and whether answers are copies decided: what a run writes down, so that it
        stays what it is when a default changes."""
        method = self.selects(classes, discriminator).method
        quota = self.selection.quota or (TAKEN_FOR_A_ROW if method == "none" else CHOSEN_FOR_A_ROW) * rows
        selection = self.selection.model_copy(update={"quota": quota, "method": method})
        epochs = self.training.epochs or max(1, min(EPOCHS, round(EPOCHS * CHOSEN_FOR_A_ROW * rows / quota)))
        training = self.training.model_copy(update={"epochs": epochs})
        written = any(generator != "adapter" for generator in self.synthesis.generator)
        settled = self.synthesis.settled(classes, copies=copies and written and method not in CUTTING)
        synthesis = self.synthesis.model_copy(update={key: getattr(settled, key) for key in ("by_label", "fill", "high_temperature", "fewest_shots")})
        return self.model_copy(update={"synthesis": synthesis, "selection": selection, "training": training})

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]
