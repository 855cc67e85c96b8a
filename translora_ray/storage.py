"""The run directory: every path in it, and how a thing gets there whole. Local disk or any pyarrow filesystem (s3://, gs://).

Write, fsync, rename, marker last: a reader sees all of a thing or nothing. On object stores a put is atomic by itself, and a
directory's marker file is put last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from translora_ray.disk import commit_folder, room, sync
from translora_ray.errors import RunFailed, UsageError, first_line
from translora_ray.records import SHARD, Candidate

IDENTITY = "run.json"
MANIFEST = "manifest.json"
SHARDS = "shards"
ADAPTER = "adapter"
TRAIN = "train"
EVALUATION = "evaluation"
ANSWERS = f"{EVALUATION}/answers.jsonl"
MAP = f"{EVALUATION}/map.json"
RESULT = f"{EVALUATION}/result.json"
REPORT = "report.html"
RELEASE = "release.json"
"""Of a release in a registry."""
OVERRUN = "Failed to flush response stream"
"""pyarrow tries again what a store refuses, for six seconds, but for reads of a file that is shorter than the refusal: its buffer does not hold that."""
TRIES, PAUSE = 30, 0.2
_SHARD_NAME = re.compile(r"(\d{6})-(\d{6})\.parquet$")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(filesystem, path on it) of a local path or a URI that pyarrow knows."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        found, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{uri} is no place to store a run ({error}): use a directory, s3://... or gs://...") from None
    return found, path


def _is(file: IO[str], path: Path) -> bool:
    """Whether what is open is what stands there now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


class Unreachable(RunFailed):
    """A storage does not answer; it may do so later."""


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Storage's own errors in one sentence."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"{uri} can not be used ({first_line(error)}): correct the path or its permissions.") from None
    except OSError as error:
        raise Unreachable(f"{uri} can not be reached ({first_line(error)}): check the network, its address and the keys.") from None


class RunStore:
    """A run directory. Names are relative to it. Nothing is created before something is committed."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.root = filesystem(self.uri)
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    def __reduce__(self) -> tuple[type[RunStore], tuple[str]]:
        """Opened anew where it is sent to: pyarrow's own way there tries a request three times, where one that is opened tries for six seconds."""
        return RunStore, (self.uri,)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.get_file_info(self.path(name) if name else self.root).type != pafs.FileType.NotFound)

    def check_writable(self) -> None:
        """Raise `UsageError` where the run could not be written, as far as that shows before it is."""
        if not self.local:
            self._check_bucket()
            return
        place = Path(self.root)
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UsageError(f"{place} is a file: choose another place.")
        if not os.access(place, os.W_OK):
            raise UsageError(f"{self.uri} can not be written: choose another place, or change the permissions of {place}.")

    def _check_bucket(self) -> None:
        bucket = self.root.split("/")[0]
        with reaching(self.uri):
            self.exists()
            with contextlib.suppress(OSError):  # keys for a part of a bucket may not ask for the whole
                if self.fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                    raise UsageError(f"There is no bucket {bucket}: make it, or correct {self.uri}.")

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Only one process at a time may write a run; others wait, or raise `UsageError`. On local disk; object stores know no locks."""
        if not self.local:
            yield
            return
        lock, held = Path(self.path(".lock")), False
        while not held:
            with room(lock):
                lock.parent.mkdir(parents=True, exist_ok=True)
                lock.touch()
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise UsageError(f"{self.uri} is being written by another process: wait for it, or stop it.") from None
                if held := _is(file, lock):  # who held it may have removed it
                    yield

    def claim(self, name: str) -> bool:
        """Whether `name` is this caller's alone, for ever; callers ask for it once.

        On local disk exactly one caller gets it, by exclusive creation. On an object store at most one does: each puts a file of its own, then lists; who finds
        no other is alone, because one whose file is put later finds both. That takes lists that show what was put before (S3, GCS, MinIO) and no clocks.
        pyarrow offers no conditional put, with which exactly one would.
        """
        if self.local:
            final = Path(self.path(name))
            with room(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    final.touch(exist_ok=False)
                    return True
            return False
        mine = uuid.uuid4().hex
        self.write(f"{name}/{mine}", b"")
        return self.names(name) == [mine]

    def names(self, folder: str) -> list[str]:
        """Names in a folder of the run, sorted; without unfinished ones. On Google's store folders are made of their files: it lists no others."""
        if self.fs.type_name == "gcs":
            here = f"{self.path(folder).rstrip('/')}/"
            found = {info.path.removeprefix(here).split("/")[0] for info in self.listed(folder, recursive=True)}
        else:
            found = {info.base_name for info in self.listed(folder)}
        return sorted(name for name in found if not name.startswith("."))

    def listed(self, folder: str, recursive: bool = False) -> list[Any]:
        """pyarrow's `FileInfo` of what is in a folder of the run, also inside its folders; nothing where there is none."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        for tries_left in reversed(range(TRIES)):
            try:
                return list(self.fs.get_file_info(selector))
            except FileNotFoundError:  # another writer's unfinished file went while they were listed
                if not tries_left:
                    raise
        raise AssertionError

    def read(self, name: str) -> bytes:
        for tries_left in reversed(range(TRIES)):
            try:
                with self.fs.open_input_stream(self.path(name)) as stream:
                    return bytes(stream.read())
            except OSError as error:
                if OVERRUN not in str(error) or not tries_left:
                    raise
                time.sleep(PAUSE)
        raise AssertionError

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.read(name))
        except ValueError:
            raise UsageError(f"{self.uri}/{name} is damaged: copy the run again, or choose another --out.") from None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Commit one file."""
        if not self.local:
            with self.fs.open_output_stream(self.path(name)) as stream:
                stream.write(content)
            return
        final = Path(self.path(name))
        scratch = final.with_name(f".{final.name}.{os.getpid()}")
        with room(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, final)
            finally:
                scratch.unlink(missing_ok=True)
            sync(final.parent)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def write_folder(self, name: str, source: Path, marker: str) -> None:
        """Commit a directory; `marker` is the file that readers look for, and arrives last."""
        if self.local:
            commit_folder(source, Path(self.path(name)))
            return
        for file in sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.name == marker):
            self.write(f"{name}/{file.relative_to(source)}", file.read_bytes())

    def remove(self, folder: str) -> None:
        """Remove a folder that is no longer needed; fine if it is not there."""
        if self.exists(folder):
            self.fs.delete_dir(self.path(folder))

    def manifest(self, run: str) -> dict[str, Any]:
        """That of the finished run, which users call `run`. Raises `UsageError` where it is not finished."""
        with reaching(self.uri):
            finished = self.exists(MANIFEST)
        if not finished:
            raise UsageError(f"{run} is not a finished run: it has no {MANIFEST}; run `translora transfer` to its end.")
        return self.read_json(MANIFEST)

    def fetch_folder(self, name: str, target: Path) -> Path:
        """The folder as a local directory: itself on local disk, else a copy in `target`."""
        if self.local:
            return Path(self.path(name))
        target.mkdir(parents=True, exist_ok=True)
        for info in self.fs.get_file_info(pafs.FileSelector(self.path(name), recursive=True)):
            if info.is_file:
                file = info.path.removeprefix(f"{self.path(name)}/")
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(self.read(f"{name}/{file}"))
        return target

    def write_shard(self, first: int, last: int, candidates: list[Candidate], facts: dict[str, Any]) -> None:
        """Commit what packs `first` to `last` became, accepted and rejected alike; `facts` go along as file metadata."""
        columns = {name: [getattr(candidate, name) for candidate in candidates] for name in SHARD.names}
        table = pa.Table.from_pydict(columns, schema=SHARD.with_metadata({"facts": json.dumps(facts)}))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write(f"{SHARDS}/{first:06d}-{last:06d}.parquet", sink.getvalue().to_pybytes())

    def shards(self, after: int = 0) -> Iterator[tuple[int, list[Candidate], dict[str, Any]]]:
        """(last pack, candidates, facts) of the committed shards, in the order of packs, without the first `after`, which are not read."""
        expected = 0
        for number, name in enumerate(self.names(SHARDS)):
            match = _SHARD_NAME.search(name)
            if match is None or int(match[1]) != expected:
                raise UsageError(f"{self.uri}/{SHARDS}/{name} does not follow the shards before it: remove the run and start it anew.")
            expected = int(match[2]) + 1
            if number >= after:
                table = pq.ParquetFile(pa.BufferReader(self.read(f"{SHARDS}/{name}")), pre_buffer=False).read(use_threads=False)
                yield int(match[2]), [Candidate(**row) for row in table.to_pylist()], json.loads(table.schema.metadata[b"facts"])

    def answers(self) -> list[dict[str, Any]]:
        """The test rows of the last evaluation, each with every arm's answer and score; none before there was one."""
        lines = self.read(ANSWERS).decode().split("\n") if self.exists(ANSWERS) else []
        return [json.loads(line) for line in lines if line]

    def candidates(self) -> list[Candidate]:
        """Those of all committed shards, in their order."""
        return [candidate for _, candidates, _ in self.shards() for candidate in candidates]
