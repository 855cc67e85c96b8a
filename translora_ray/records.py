"""Rows that travel: requests, candidates, examples, their Arrow schemas. Ids and seeds are derived, never drawn.

A pack is the unit of the stream: `pack_size` candidates that are computed together. Candidate `index` of a transfer always has the
same seed and sits in the same pack, whatever runs where.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from translora_ray.errors import UsageError


@dataclass(frozen=True)
class TaskRow:
    """A real row of a task, or a synthetic one. `excess`: its answer's characters' (`Candidate.char_excess`), where a teacher measured it."""

    input: str
    target: str
    excess: tuple[float, ...] = ()


@dataclass
class Candidate:
    """A synthetic prompt on its way. Stages fill it; the first `reason` makes it a reject and later stages leave it alone.

    `verdict` is the discriminator's log p(yes) - log p(no); `target` is the teacher's answer; `excess` is how much likelier each of its tokens is with the
    source adapter than without, in the mean of logarithms; `char_excess` is its sum, spread over the answer's characters (`token_weights.py`).
    """

    index: int
    seed: int
    input: str = ""
    verdict: float | None = None
    target: str | None = None
    reason: str | None = None
    excess: float | None = None
    char_excess: list[float] | None = None

    @property
    def accepted(self) -> bool:
        return self.reason is None

    @property
    def row(self) -> TaskRow:
        """What is learnt from it."""
        return TaskRow(self.input, self.target or "", tuple(self.char_excess or ()))

    def label_of(self, classes: Sequence[str]) -> str:
        """The label that it is written for, where labels are asked for: all take turns."""
        return classes[self.index % len(classes)]


@dataclass
class Pack:
    """Candidates computed together, with what they cost: tokens and seconds per role. `transfer` is the place of theirs among those of the stream;
    `failure` says why their transfer can not go on."""

    number: int
    candidates: list[Candidate]
    transfer: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    def spend(self, role: str, tokens: int, seconds: float) -> None:
        self.tokens[role] = self.tokens.get(role, 0) + tokens
        self.seconds[role] = self.seconds.get(role, 0.0) + seconds

    def reject(self, wrong: Callable[[Candidate], bool], reason: str) -> None:
        """Give `reason` to the open candidates that are `wrong`."""
        for candidate in self.open():
            if wrong(candidate):
                candidate.reason = reason

    def open(self) -> list[Candidate]:
        """The candidates that no stage has rejected so far."""
        return [candidate for candidate in self.candidates if candidate.accepted]


TOO_LONG = "prompt too long"
"""The reason of a candidate that a model can not take whole."""

CANDIDATE = pa.struct(
    [
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("input", pa.string()),
        ("verdict", pa.float64()),
        ("target", pa.string()),
        ("reason", pa.string()),
        ("excess", pa.float64()),
        ("char_excess", pa.list_(pa.float32())),
    ]
)
PACK = pa.schema([("number", pa.int64()), ("candidates", pa.list_(CANDIDATE)), ("transfer", pa.int32()), ("spent", pa.string())])
SHARD = pa.schema(list(CANDIDATE))


@dataclass(frozen=True)
class Step:
    """What a training step reports: its number of all steps, its mean loss per label, and tokens and seconds of the epoch so far."""

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a run seed, a stage and an index: the same parts give the same seed on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]) >> 1


def request_pack(run_seed: int, number: int, size: int, transfer: int = 0) -> Pack:
    """Pack `number` of a transfer before anything is computed: indices and seeds only."""
    first = number * size
    return Pack(number, [Candidate(index, derive_seed(run_seed, "candidate", index)) for index in range(first, first + size)], transfer)


def pack_to_table(pack: Pack) -> pa.Table:
    """One pack as a table of one row: Ray Data must neither split a pack nor wait for a second one."""
    spent = json.dumps({"tokens": pack.tokens, "seconds": pack.seconds, "failure": pack.failure})
    row = {"number": pack.number, "candidates": [asdict(candidate) for candidate in pack.candidates], "transfer": pack.transfer, "spent": spent}
    return pa.Table.from_pylist([row], schema=PACK)


def packs_from_table(table: pa.Table) -> list[Pack]:
    return [
        Pack(row["number"], [Candidate(**candidate) for candidate in row["candidates"]], row["transfer"], **json.loads(row["spent"]))
        for row in table.to_pylist()
    ]


def read_rows(path: str | Path) -> list[TaskRow]:
    """Read a JSONL of {"input", "target"} strings. Raises `UsageError` with file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028
    except OSError as error:
        raise UsageError(f"{path} can not be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: convert it.") from None
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"{path} has no rows in it.")
    return rows


def _row(path: str | Path, number: int, line: str) -> TaskRow:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise UsageError(f"{path}, line {number}: not valid JSON.") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key].strip() for key in ("input", "target")):
        raise UsageError(f'{path}, line {number}: a row needs "input" and "target", both text that is not empty.')
    if any("\ud800" <= character <= "\udfff" for key in ("input", "target") for character in row[key]):
        raise UsageError(f"{path}, line {number}: half a surrogate pair, which is no text; write the row again.")
    return TaskRow(row["input"], row["target"])
