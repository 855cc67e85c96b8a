"""Is an answer right? One function per metric of a task; each takes (answer, target) and gives a score from 0 to 1."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

from translora_ray.config import Task

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CHOICE = re.compile(r"\(?\b([A-Z])\b\)?")
_ANY = re.compile(r"\S")
CODE_SECONDS = 10


def exact_match(answer: str, target: str) -> float:
    """Equal but for blanks at the ends."""
    return float(answer.strip() == target.strip())


def choice(answer: str, target: str) -> float:
    """The first stand-alone capital letter, `(B)` or `B`, is the target's."""
    given, wanted = _CHOICE.search(answer), _CHOICE.search(target)
    return float(bool(given and wanted and given[1] == wanted[1]))


def number(answer: str, target: str) -> float:
    """The last number of each is the same (GSM8K's convention); thousands commas do not count."""
    given, wanted = _NUMBER.findall(answer), _NUMBER.findall(target)
    return float(bool(given and wanted) and float(given[-1].replace(",", "")) == float(wanted[-1].replace(",", "")))


def rouge_l(answer: str, target: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower-cased, without stemming."""
    given, wanted = answer.lower().split(), target.lower().split()
    row = [0] * (len(wanted) + 1)
    for word in given:
        diagonal = 0
        for j, other in enumerate(wanted, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(given) + len(wanted)) if row[-1] else 0.0


def code(answer: str, target: str) -> float:
    """The answer followed by the target's assertions runs as Python without error in `CODE_SECONDS` (MBPP's convention).

    It runs model-written code: in a process of its own, isolated from the environment and in an empty folder, but not sandboxed.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{answer}\n{target}\n"], cwd=folder, env={}, timeout=CODE_SECONDS, capture_output=True, check=False
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # the latter two of text that no command can have: a NUL, or too much
            return 0.0
    return float(done.returncode == 0)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "choice": choice,
    "number": number,
    "rouge_l": rouge_l,
    "code": code,
}


def reading(task: Task, answer: str) -> str:
    """What the task's metric reads in an answer: answers of one reading say the same. A label where the task has some; the text where nothing is read."""
    if label := next((label for label in task.classes if says(task, answer, label)), None):
        return label
    if task.metric == "number" and (found := _NUMBER.findall(answer)):
        return str(float(found[-1].replace(",", "")))
    if task.metric == "choice" and (letter := _CHOICE.search(answer)):
        return letter[1]
    return answer


def agreement(task: Task, answer: str, other: str) -> float:
    """How far two models' answers agree, from 0 to 1: by the task's metric, but for code, whose metric wants assertions on one side."""
    return exact_match(answer, other) if task.metric == "code" else METRICS[task.metric](answer, other)


def says(task: Task, answer: str, label: str) -> bool:
    """Whether the answer is that label of the task's, as its metric reads both."""
    return METRICS[task.metric](answer, label) == 1


def well_formed(task: Task, answer: str) -> bool:
    """Whether the answer could be right at all: one of the task's labels where it has some, else something that its metric can read."""
    if task.classes:
        return any(says(task, answer, label) for label in task.classes)
    if task.metric == "code":
        try:
            ast.parse(answer)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the latter two of deep nesting
            return False
        return True
    return bool({"number": _NUMBER, "choice": _CHOICE}.get(task.metric, _ANY).search(answer))
