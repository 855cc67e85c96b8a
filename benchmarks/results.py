"""How benchmarks write their parts of RESULTS.md."""

from __future__ import annotations

import functools
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


@functools.cache
def commit() -> str:
    """The commit that is measured, said to be changed where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "translora_ray", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def replace(part: str, text: str) -> None:
    """Put `text` in place of what stands between the marks of `part` in RESULTS.md."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    path = ROOT / "benchmarks" / "RESULTS.md"
    before, found, rest = path.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{path} has no {begin}: add it where the table belongs.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def interval(value: float, low: float, high: float, *, digits: int = 3) -> str:
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
