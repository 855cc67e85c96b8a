"""How a directory, or a file, gets onto a local disk whole, and what is said where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from translora_ray.errors import NoRoom, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def commit_folder(source: Path, final: Path, replace: bool = True) -> None:
    """Make `source` appear as `final` at once, replacing what an earlier attempt left there or, without `replace`, refusing to."""
    with room(final), scratch_beside(final) as scratch:
        shutil.copytree(source, scratch / "new")
        for path in (scratch / "new", *(scratch / "new").rglob("*")):
            sync(path)
        if final.exists() and not replace:
            raise UsageError(f"{final} was made by another process meanwhile: choose another --out.")
        if final.exists():
            os.replace(final, scratch / "old")
        _open_to_readers(scratch / "new")
        os.replace(scratch / "new", final)
        sync(final.parent)


@contextlib.contextmanager
def scratch_beside(final: Path) -> Iterator[Path]:
    """A directory on the same disk, for as long as the block runs."""
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def room(final: Path) -> Iterator[None]:
    """Raise `NoRoom` where the disk that `final` is written to is full; what is half-written is removed by whoever wrote it."""
    try:
        yield
    except Exception as error:  # libraries have errors of their own, which tell what the system said
        if getattr(error, "errno", None) not in NO_ROOM and not any(os.strerror(number) in str(error) for number in NO_ROOM):
            raise
        raise NoRoom(
            f"There is no room for {final} on {socket.gethostname()}: make some, and give the same command again; it goes on from what is committed."
        ) from None


def _open_to_readers(folder: Path) -> None:
    """The usual permissions: temporary folders, which the content comes from, are closed to everybody else."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync(path: Path) -> None:
    """What is written of a file, or which names a folder has, survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
