"""Which answers a task may have, by its rows: one of a few labels, or words of the input beside a few others; and which words an answer has from there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from translora_ray.config import Task
from translora_ray.errors import UsageError
from translora_ray.records import TaskRow

ROWS_PER_LABEL = 4
ROWS_PER_WORD = 4
COPIED = 0.95
"""Least share of the rows by which a task's answers are copies: of the slot tasks that were looked at all rows are."""
MOST_WORDS = 200
"""Most words that answers may have beside those of their input: more are a language, not a frame."""
_WORD = re.compile(r"\w+")


def find_answers(task: Task, rows: Sequence[TaskRow]) -> Task:
    """`task` with the labels that its rows have, or `open`, and with the words that its answers have beside their input's, or `any`. Raises `UsageError` where
    rows have others than the task names. No words are looked for where rows are to be private: a single one can be what makes a word frequent."""
    labels = _labels(task, rows)
    looked_for = task.labels == "from_rows" and labels == "open" and task.metric in ("exact_match", "rouge_l") and task.generator_privacy is None
    if task.answer_words != "from_rows":
        _check_words(task, rows)
        return task.model_copy(update={"labels": labels})
    return task.model_copy(update={"labels": labels, "answer_words": _words_beside(rows) if looked_for else "any"})


def _labels(task: Task, rows: Sequence[TaskRow]) -> list[str] | Literal["open"]:
    found = sorted({row.target.strip() for row in rows})
    if task.classes:
        check_labels(task, rows, task.train)
        return task.classes
    classes = task.labels == "from_rows" and task.metric in ("exact_match", "choice") and len(rows) >= ROWS_PER_LABEL * len(found) > ROWS_PER_LABEL
    return found if classes else "open"


def _words_beside(rows: Sequence[TaskRow]) -> list[str] | Literal["any"]:
    """The words that at least `ROWS_PER_WORD` targets have and their inputs do not, where nearly all targets are these and at least one of their input's."""
    pairs = [(_words(row.target), _words(row.input)) for row in rows]
    counted = Counter(word for target, given in pairs for word in target - given)
    beside = {word for word, count in counted.items() if count >= ROWS_PER_WORD}
    copies = sum(target - given <= beside and bool(target - beside) for target, given in pairs)
    return sorted(beside) if copies >= COPIED * len(rows) and len(beside) <= MOST_WORDS else "any"


def check_labels(task: Task, rows: Sequence[TaskRow], where: str) -> None:
    """Raise `UsageError` where targets are none of the task's labels."""
    strange = [row.target.strip() for row in rows if task.classes and row.target.strip() not in task.classes]
    if strange:
        raise UsageError(f"{where}: {len(strange)} rows have a target that is none of the task's labels, {strange[0]!r} first: correct them, or the labels.")


def _check_words(task: Task, rows: Sequence[TaskRow]) -> None:
    """Raise `UsageError` where more targets than a few are no copies, by the words that the task names."""
    strange = [_words(row.target) - _words(row.input) - set(task.answer_words) for row in rows if not copied(task, row.target, row.input)]
    if len(strange) > (1 - COPIED) * len(rows):
        raise UsageError(
            f"{task.train}: {len(strange)} rows have a target with words that are neither their input's nor in answer_words, {min(strange[0])!r} first: "
            "add them, or say answer_words: any."
        )


def copied(task: Task, answer: str, text: str) -> bool:
    """Whether the answer to the input `text` says nothing but what the task's answers may: any answer may, where it names no words."""
    return not isinstance(task.answer_words, list) or _words(answer) <= _words(text) | set(task.answer_words)


@dataclass(frozen=True)
class Value:
    """A run of words that an answer copies from its input, from character `start` to `end` there. `kind`: the answer's words before it, as a slot's name; of
    a further one after the same name, that."""

    kind: str
    start: int
    end: int


def values(row: TaskRow, frame: Collection[str]) -> list[Value]:
    """What the row's answer copies from its input, in the order of that: the longest runs of words first, each with a place of its own, and none that begins
    with a word of the `frame`, as `answer_words` are."""
    words = list(_WORD.finditer(row.target))
    free, found = [word.group() not in frame for word in words], dict[int, tuple[int, tuple[int, int]]]()
    for size in range(len(words), 0, -1):
        for first in range(len(words) - size + 1):
            last = first + size
            run = row.target[words[first].start() : words[last - 1].end()]
            taken = any(begin < last and first < end for begin, (end, _) in found.items())
            if free[first] and not taken and run in row.input:
                places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(run)}(?!\w)", row.input)]
                if place := next((one for one in places if all(one[1] <= start or end <= one[0] for _, (start, end) in found.values())), None):
                    found[first] = (last, place)
    kind, after, named = "", 0, list[Value]()
    for first, (last, place) in sorted(found.items()):
        kind = " ".join(word.group() for word in words[after:first]) or kind
        named.append(Value(kind, *place))
        after = last
    return sorted(named, key=lambda value: value.start)


def _words(text: str) -> set[str]:
    """Its words, as they are written: what is a copy but for a capital is none."""
    return set(_WORD.findall(text))
