"""What people see while they wait: bars on a terminal, plain lines elsewhere. Nothing is computed here."""

from __future__ import annotations

import copy
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from translora_ray.records import Step

LINE_SECONDS = 5.0


class Phase:
    """One bar. `update` says how far it is; `detail` is free text beside it (a loss, a rate)."""

    def __init__(self, display: Display, name: str) -> None:
        self.display, self.name = display, name
        self.began = time.monotonic()
        self._bar: TaskID | None = None
        self._last_line = 0.0
        self._first: float | None = None
        self._step: int | None = None

    def update(self, done: float, total: float, detail: str = "") -> None:
        self._first = done if self._first is None else self._first  # what an earlier attempt did took none of this one's time
        if self.display.bars is not None:
            if self._bar is None:
                self._bar = self.display.bars.add_task(self.name, total=total, detail=detail)
            self.display.bars.update(self._bar, completed=done, total=total, detail=detail)
        elif done >= total or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            spent = time.monotonic() - self.began
            left = f", {spent / (done - self._first) * (total - done):.0f} s left" if self._first < done < total else ""
            self.display.line(f"{self.name}: {done:.0f}/{total:.0f} {detail} ({spent:.0f} s{left})")

    def step(self, step: Step) -> None:
        """A training step. What came before the first, workers' start and steps of earlier attempts, tells nothing of the time that is left; nor does another
        training, which begins anew."""
        if self._step is None or step.step <= self._step:
            self._first, self.began = step.step, time.monotonic()
        self._step = step.step
        self.update(step.step, step.steps, f"loss {step.loss:.3f}, {step.tokens / max(1e-9, step.seconds):.0f} tokens/s")


class Display:
    """A context in which phases are shown on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars: Progress | None = None
        self.name = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[detail]}"), console=self.console)
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def named(self, name: str) -> Display:
        """The same display, for one of several things that go on at once."""
        other = copy.copy(self)
        other.name = name
        return other

    def phase(self, name: str) -> Phase:
        return Phase(self, f"{name}, {self.name}" if self.name else name)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.line(f"{self.name}: {text}" if self.name else text)

    def line(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
