"""Which answers a task may have, by its rows: one of a few labels, or words of the input beside a few others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from translora_ray.config import Task
from translora_ray.errors import UsageError
from translora_ray.records import TaskRow

ROWS_PER_LABEL = 4
ROWS_PER_WORD = 4
COPIED = 0.95
"""Least share of the rows by which a task's answers are copies. Those of the slot tasks that were looked at were all, or none were."""
MOST_WORDS = 200
"""Most words that answers may have beside those of their input: more are a language, not a frame."""
_WORD = re.compile(r"\w+")


def find_answers(task: Task, rows: Sequence[TaskRow]) -> Task:
    """`task` with the labels that its rows have, or `open`, and with the words that its answers have beside their input's, or `any`. Raises `UsageError` where
    rows have others than the task names."""
    return _find_labels(_find_words(task, rows), rows)


def _find_labels(task: Task, rows: Sequence[TaskRow]) -> Task:
    found = sorted({row.target.strip() for row in rows})
    if task.classes:
        check_labels(task, rows, task.train)
        return task
    classes = task.labels == "from_rows" and task.metric in ("exact_match", "choice") and len(rows) >= ROWS_PER_LABEL * len(found) > ROWS_PER_LABEL
    return task.model_copy(update={"labels": found, "answer_words": "any"} if classes else {"labels": "open"})


def check_labels(task: Task, rows: Sequence[TaskRow], where: str) -> None:
    """Raise `UsageError` where targets are none of the task's labels."""
    strange = [row.target.strip() for row in rows if task.classes and row.target.strip() not in task.classes]
    if strange:
        raise UsageError(f"{where}: {len(strange)} rows have a target that is none of the task's labels, {strange[0]!r} first: correct them, or the labels.")


def _find_words(task: Task, rows: Sequence[TaskRow]) -> Task:
    others = [_words(row.target) - _words(row.input) for row in rows]
    if isinstance(task.answer_words, list):
        strange = [each - set(task.answer_words) for each in others if not each <= set(task.answer_words)]
        if len(strange) > (1 - COPIED) * len(rows):
            raise UsageError(
                f"{task.train}: {len(strange)} rows have a target with words that are neither their input's nor in answer_words, {min(strange[0])!r} first: "
                "add them, or say answer_words: any."
            )
        return task
    counted = Counter(word for each in others for word in each)
    words = {word for word, count in counted.items() if count >= ROWS_PER_WORD}
    copies = sum(each <= words for each in others) >= COPIED * len(rows) and len(words) <= MOST_WORDS
    found = task.answer_words == task.labels == "from_rows" and task.metric in ("exact_match", "rouge_l") and copies
    return task.model_copy(update={"answer_words": sorted(words) if found else "any"})


def copied(task: Task, answer: str, text: str) -> bool:
    """Whether the answer to the input `text` says nothing but what the task's answers may: any answer may, where it names no words."""
    return not isinstance(task.answer_words, list) or _words(answer) <= _words(text) | set(task.answer_words)


def _words(text: str) -> set[str]:
    """Its words, as they are written: what is a copy but for a capital is none."""
    return set(_WORD.findall(text))
