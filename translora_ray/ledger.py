"""Files that are written once and never again: numbers that writers claim, reads that are kept, failures in one sentence. What they mean is not known here.

A number belongs to the writer that claimed it (`RunStore.claim`), whatever others do and however slow they are. On local disk a lock lets one writer in after
the other, too. On an object store, which knows no locks, two writers who meet may both go on to a later number.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from translora_ray.errors import UsageError
from translora_ray.storage import RunStore, reaching

MARKER = "registry.json"
CLAIMS = "claims"
READERS = 16
"""Files that are read from an object store at the same time."""


class Unsound(UsageError):
    """What lies in the registry is not what was published; at `path` in it, where one file is meant."""

    path = ""


Check = Callable[[str, dict[str, Any]], object]
"""Raises LookupError, TypeError or ValueError where the content of the file at a path is not what is written there."""
Skip = Callable[[Unsound], object]
"""Is told of a file that is damaged, which is then left out."""


def refuse(error: Unsound) -> NoReturn:
    """The `Skip` that leaves nothing out."""
    raise error


class Ledger:
    """Write-once files at `uri`. Nothing is read or made before a method is called; safe in several threads."""

    def __init__(self, uri: str) -> None:
        self.store = RunStore(uri)
        self.uri = self.store.uri if "://" in uri else self.store.root
        self._read: dict[str, dict[str, Any]] = {}

    def exists(self) -> bool:
        """Whether anything was ever written."""
        with reaching(self.uri):
            return self.store.exists(MARKER)

    def check(self) -> None:
        """Raise `UsageError` where nothing was."""
        if not self.exists():
            raise UsageError(f"There is no registry at {self.uri}: publish a run to it first, or correct the path.")

    @contextlib.contextmanager
    def writing(self, create: bool = False) -> Iterator[None]:
        """One writer at a time on local disk; it waits for the others. `create`: begin where there is nothing yet."""
        with reaching(self.uri):
            if create:
                self.refuse_other()
            else:
                self.check()
            with self.store.lock(wait=True):
                if not self.store.exists(MARKER):
                    self.store.write_json(MARKER, {"format": 1})
                yield

    def claim(self, place: str, last: int, width: int = 0) -> int:
        """A number above `last` that is this writer's alone. One that is claimed and not used stays unused."""
        for number in itertools.count(last + 1):
            if self.store.claim(f"{CLAIMS}/{place}{number:0{width}d}"):
                return number
            if not self.store.local:
                time.sleep(random.uniform(0.05, 0.5))  # two who met must not meet again
        raise AssertionError

    def load(self, paths: Iterable[str], check: Check, skip: Skip = refuse) -> dict[str, dict[str, Any]]:
        """The JSON files that are there of those at `paths`. Each is read once, because it never changes, but for those that are damaged."""
        wanted = list(paths)
        missing = [path for path in wanted if path not in self._read]
        load = partial(self._load, check=check, skip=skip)
        if self.store.local or len(missing) < 2:
            found: Iterator[dict[str, Any] | None] = map(load, missing)
        else:
            with ThreadPoolExecutor(READERS) as readers:
                found = readers.map(load, missing)
        self._read.update((path, content) for path, content in zip(missing, found, strict=True) if content is not None)
        return {path: self._read[path] for path in wanted if path in self._read}

    def _load(self, path: str, check: Check, skip: Skip) -> dict[str, Any] | None:
        try:
            content = dict(json.loads(self.store.read(path)).items())
            check(path, content)
            return content
        except FileNotFoundError:
            return None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, PermissionError):
            damaged = Unsound(f"{self.uri}/{path} is damaged or may not be read: bring it back from a copy.")
            damaged.path = path
            skip(damaged)
            return None

    def refuse_other(self) -> None:
        """Raise `UsageError` where there is something else."""
        with reaching(self.uri):
            names = self.store.names("")
        if names and MARKER not in names:
            raise UsageError(f"{self.uri} is not empty and not a registry: choose another place.")
