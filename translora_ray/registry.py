"""The registry: immutable releases and the channels that name them, in a directory or an object store.

```
REGISTRY/registry.json                         says that this is one
REGISTRY/releases/NAME@V/adapter_config.json, adapter_model.safetensors, release.json (last: it makes the release visible)
REGISTRY/channels/NAME/CHANNEL/000001.json     every change of a channel (what it names, what is tried beside it); the one with the highest number counts
REGISTRY/retired/NAME@V                        releases that are no longer listed
REGISTRY/claims/...                            numbers that writers have claimed
```
A file of a release is written once and never again (`ledger.py`), so readers may keep what they read. On local disk versions follow each other, also after a
writer that was killed, and a run that is published twice at once is one release. On an object store versions may be skipped where writers meet; a run published
twice at the very same time may become two releases with the same digest; of two changes of a channel at the same time the one with the higher number
counts, and the other is in its history.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from translora_ray import adapters
from translora_ray.errors import UsageError
from translora_ray.kit import FACTS
from translora_ray.ledger import Ledger, Skip, Unsound, refuse
from translora_ray.reading import inside
from translora_ray.releases import STABLE, NotFound, Release, Trial, check_name, of_kit, of_run, parse_channel, parse_id, some
from translora_ray.storage import MANIFEST, RELEASE, RunStore, Unreachable, reaching

__all__ = ["NotFound", "Registry", "Release", "Trial", "Unreachable", "Unsound"]

RELEASES, CHANNELS, RETIRED = "releases", "channels", "retired"
FILES = (adapters.CONFIG, adapters.WEIGHTS)
"""The files of a release: those that its digest covers, nothing else."""
_CHANGE = re.compile(r"[0-9]{6}\.json")
_RELEASE = TypeAdapter(Release)
Change = dict[str, Any]
"""A change of a channel: `change`, `release`, `earlier`, `time`, and `trial` where a release is tried beside the one it names."""


class Registry:
    """Releases and channels at `uri`: a directory, s3://... or gs://... Nothing is read or made before a method is called; safe in several threads."""

    def __init__(self, uri: str) -> None:
        self._ledger = Ledger(uri)
        self.uri, self._store = self._ledger.uri, self._ledger.store

    def exists(self) -> bool:
        return self._ledger.exists()

    def check(self) -> None:
        """Raise `UsageError` where there is no registry."""
        self._ledger.check()

    def check_writable(self) -> None:
        """Raise `UsageError` where nothing could be published, as far as that shows before it is."""
        self._store.check_writable()
        self._ledger.refuse_other()

    def publish(self, run: str, name: str | None = None, reviewed: bool = False) -> Release:
        """The release of a finished run, or of a kit's source adapter, by default under its task's name: the one there is, or one with the next version."""
        with tempfile.TemporaryDirectory() as scratch:
            facts, folder = (of_kit if _is_kit(run) else of_run)(run, reviewed, Path(scratch))
            name = check_name(name or facts["task"]["name"])
            with self._ledger.writing(create=True):
                there = {found[1]: each for each in self._store.names(RELEASES) if (found := parse_id(each)) and found[0] == name}
                for release in self._releases(there.values()):
                    if (release.digest, release.recipe_hash) == (facts["digest"], facts["recipe_hash"]):
                        return release
                version = max(there, default=0)
                if not (there and self._store.local and not self._store.exists(f"{RELEASES}/{there[version]}/{RELEASE}")):
                    version = self._ledger.claim(f"{RELEASES}/{name}@", version)  # else who made this one held the lock, and was killed
                place = f"{RELEASES}/{name}@{version}"
                for file in FILES:
                    self._store.write(f"{place}/{file}", (folder / file).read_bytes())
                self._store.write_json(f"{place}/{RELEASE}", {**facts, "name": name, "version": version, "created": _now()})
                return self.release(f"{name}@{version}")

    def release(self, reference: str) -> Release:
        """The release behind `name@version`, `name:channel` or `name` (its channel `stable`). Raises `NotFound`, which says what there is."""
        with reaching(self.uri):
            channel = parse_channel(reference)
            now = self._current(*channel) if channel else None
            wanted = now["release"] if now else reference
            for release in self._releases([wanted]):
                return release
            raise NotFound(f"{self.uri} has no release {reference!r}: {self._there(reference)}.")

    def holds(self, release: str, digest: str) -> bool:
        """Whether `name@version` was published here with that digest, retired or not."""
        with reaching(self.uri), contextlib.suppress(FileNotFoundError, UsageError):
            return bool(self._store.read_json(f"{RELEASES}/{release}/{RELEASE}").get("digest") == digest)
        return False

    def releases(self, base: str | None = None, skip: Skip = refuse) -> list[Release]:
        """Releases that are not retired, by name and version; those for one `base`, a target base's reference or fingerprint, where it is given."""
        with reaching(self.uri):
            found = self._releases(self._store.names(RELEASES), skip)
        return [release for release in found if base is None or base in (release.target_base, release.base_fingerprint)]

    def place_of(self, path: str) -> str:
        """The URI of the release whose release.json lies at `path` in the registry."""
        return inside(self.uri, path.removesuffix(f"/{RELEASE}"))

    def changes(self, skip: Skip = refuse, name: str = "") -> dict[str, Change]:
        """The change that counts of each channel, {"name:channel": change}, sorted; of one name's, where it is given. `trial_in` reads a trial from it."""
        with reaching(self.uri):
            found = self._store.listed(f"{CHANNELS}/{name}".rstrip("/"), recursive=True)
            paths = sorted(info.path.removeprefix(f"{self._store.root}/") for info in found if info.is_file)
            latest = {path[:-12]: path for path in paths if _CHANGE.fullmatch(path[-11:])}
            named = self._ledger.load(latest.values(), _check_change, skip)
        return {":".join(path.split("/")[1:3]): change for path, change in named.items()}

    def history(self, name: str, channel: str = STABLE) -> list[dict[str, Any]]:
        """Every change of a channel, the first one first: `change` (promote, try or roll back), `release`, the releases `earlier` on it, `trial`, `time`."""
        with reaching(self.uri):
            return list(self._ledger.load(self._changes(check_name(name), check_name(channel, "channel")), _check_change).values())

    def promote(self, reference: str, channel: str = STABLE) -> Release:
        """Let the channel of the release's name name it, which ends a trial there; nothing changes where it does already."""

        def onto(release: Release, now: Change | None) -> Change | None:
            if now and now["release"] == release.id:
                return {"change": "promote", "release": release.id, "earlier": now["earlier"]} if now.get("trial") else None
            return {"change": "promote", "release": release.id, "earlier": [*now["earlier"], now["release"]] if now else []}

        return self._name(reference, channel, onto)

    def try_out(self, wanted: Trial, channel: str = STABLE) -> Release:
        """Try a release on the channel of its name, in place of one that is tried there; what the channel names stays."""

        def beside(release: Release, now: Change | None) -> Change | None:
            if now is None:
                raise UsageError(f"{release.name}:{channel} names nothing yet that {release.id} could be tried beside: promote a release there first.")
            if now["release"] == release.id:
                raise UsageError(f"{release.name}:{channel} names {release.id} already: there is nothing to try.")
            trial = asdict(replace(wanted, release=release.id))
            change = {"change": "try", "release": now["release"], "earlier": now["earlier"], "trial": trial}
            return None if trial == now.get("trial") else change

        return self._name(wanted.release, channel, beside)

    def roll_back(self, name: str, channel: str = STABLE) -> Release:
        """End the trial on a channel; without one, let it name what it named before its release was promoted; done again, the one before that."""

        def down(now: Change | None) -> Change:
            if now and now.get("trial"):
                return {"change": "roll back", "release": now["release"], "earlier": now["earlier"]}
            if not now or not now["earlier"]:
                there = f"it named nothing before {now['release']}" if now else "there is no such channel"
                raise UsageError(f"{name}:{channel} can not be rolled back: {there}; promote another release.")
            *earlier, before = now["earlier"]
            if not self._visible(before):
                raise UsageError(f"{name}:{channel} can not be rolled back: {before}, which it named before, is retired; promote another release.")
            return {"change": "roll back", "release": before, "earlier": earlier}

        check_name(name)
        check_name(channel, "channel")
        with self._ledger.writing():
            self._change(name, channel, down)
            if now := self._current(name, channel):
                self._unretire(now["release"])  # as in `_name`
            return self.release(f"{name}:{channel}")

    def retire(self, reference: str) -> None:
        """Take `name@version` off the lists; its files stay. Refused while a channel names it, which also wins where both happen at once."""
        with self._ledger.writing():
            if not parse_id(reference) or not self._visible(reference):
                raise NotFound(f"{self.uri} has no release {reference!r} to retire: {self._there(reference)}.")
            self._refuse_named(reference)
            self._store.write_json(f"{RETIRED}/{reference}", {"time": _now()})
            try:
                self._refuse_named(reference)
            except UsageError:
                self._unretire(reference)
                raise

    def fetch(self, release: Release, folder: Path) -> Path:
        """`folder`/NAME@V, a PEFT directory with the release's digest, copied unless it is there. Raises `Unsound` where the registry holds something else."""
        final = folder / release.id
        if _digest(final) == release.digest:
            return final
        content = {}
        with reaching(self.uri), contextlib.suppress(FileNotFoundError):
            content = {file: self._store.read(f"{RELEASES}/{release.id}/{file}") for file in FILES}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{release.id}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            for file, read in content.items():
                (new / file).write_bytes(read)
            found = _digest(new)
            if found != release.digest:
                wrong = f"its digest is {found}" if found else "a file is missing"
                raise Unsound(f"{release.id} in {self.uri} is not what was published: {wrong}, expected {release.digest}; retire it and publish the run again.")
            with contextlib.suppress(OSError):  # another thread or process may have been faster
                os.rename(new, final)
            if _digest(final) != release.digest:
                os.rename(final, Path(scratch) / "old")
                os.rename(new, final)
        return final

    def _changes(self, name: str, channel: str) -> list[str]:
        """Paths of the channel's changes, the first one first."""
        place = f"{CHANNELS}/{name}/{channel}"
        return [f"{place}/{file}" for file in self._store.names(place) if _CHANGE.fullmatch(file)]

    def _current(self, name: str, channel: str) -> Change | None:
        return next(iter(self._ledger.load(self._changes(name, channel)[-1:], _check_change).values()), None)

    def _change(self, name: str, channel: str, make: Callable[[Change | None], Change | None]) -> None:
        """Commit what `make` makes of the channel's last change, unless that is None."""
        if make(self._current(name, channel)) is None:
            return
        last = self._changes(name, channel)[-1:]
        number = self._ledger.claim(f"{CHANNELS}/{name}/{channel}/", int(last[0][-11:-5]) if last else 0, width=6)
        if new := make(self._current(name, channel)):  # another change may have come before the claim
            self._store.write_json(f"{CHANNELS}/{name}/{channel}/{number:06d}.json", {**new, "time": _now()})

    def _name(self, reference: str, channel: str, make: Callable[[Release, Change | None], Change | None]) -> Release:
        """Change the channel of a release's name so that it names the release, in whatever way; the release stays listed."""
        check_name(channel, "channel")
        with self._ledger.writing():
            release = self.release(reference)
            self._change(release.name, channel, partial(make, release))
            self._unretire(release.id)  # without a lock another may have retired it meanwhile; who retires looks at channels afterwards
            return release

    def _visible(self, release: str) -> bool:
        return self._store.exists(f"{RELEASES}/{release}/{RELEASE}") and not self._store.exists(f"{RETIRED}/{release}")

    def _unretire(self, release: str) -> None:
        if self._store.exists(f"{RETIRED}/{release}"):
            with contextlib.suppress(FileNotFoundError):
                self._store.fs.delete_file(self._store.path(f"{RETIRED}/{release}"))

    def _refuse_named(self, release: str) -> None:
        changes = self.changes(name=release.partition("@")[0]).items()
        if named := [channel for channel, now in changes if release in (now["release"], (now.get("trial") or {}).get("release"))]:
            raise UsageError(f"{release} can not be retired while {some(named)} names it: promote another release there first.")

    def _releases(self, ids: Iterable[str], skip: Skip = refuse) -> list[Release]:
        """Those of the releases that are visible, in order."""
        retired = set(self._store.names(RETIRED))
        wanted = {f"{RELEASES}/{each}/{RELEASE}": each for each in ids if parse_id(each) and each not in retired}
        found = [self._as_release(path, facts) for path, facts in self._ledger.load(wanted, self._as_release, skip).items()]
        return sorted(found, key=lambda release: (release.name, release.version))

    def _as_release(self, path: str, facts: dict[str, Any]) -> Release:
        """Raises LookupError, TypeError or ValueError where the facts are no release's, or those of another than the folder's."""
        release = _RELEASE.validate_python({**facts, "uri": self.place_of(path)})
        if path != f"{RELEASES}/{release.id}/{RELEASE}" or not isinstance(release.adapter["rank"], int):
            raise ValueError
        _ = release.adapter["type"], release.verdict, datetime.fromisoformat(release.created).timestamp()  # what readers rely on
        return release

    def _there(self, reference: str) -> str:
        """What there is instead, for messages."""
        if not parse_id(reference) and not parse_channel(reference):
            return "write name@version, name:channel, or name for its channel stable"
        if parse_id(reference) and self._store.exists(f"{RETIRED}/{reference}"):
            return "it is retired"
        name, releases = re.split("[@:]", reference)[0], self.releases(skip=_leave_out)
        mine = [release.id for release in releases if release.name == name]
        mine += [channel for channel in self.changes(_leave_out) if mine and channel.split(":")[0] == name]
        return f"there are {some(mine or {release.name for release in releases})}" if releases else "it has none"


def trial_in(change: Change) -> Trial | None:
    """The trial that a change began."""
    found = change.get("trial")
    return Trial(str(found["release"]), float(found["share"]), bool(found["shadow"])) if found else None


def _check_change(path: str, change: Change) -> None:
    """Raises LookupError, TypeError or ValueError where the change is none, or names a release of another name than its channel's."""
    _, name, _, _ = path.split("/")
    named = [change["release"], *change["earlier"], *([trial.release] if (trial := trial_in(change)) else [])]
    if not all(parse_id(release) and release.startswith(f"{name}@") for release in named):
        raise ValueError


def _leave_out(_: Unsound) -> None:
    """The `Skip` where it does not matter."""


def _is_kit(path: str) -> bool:
    store = RunStore(path)
    return store.exists(FACTS) and not store.exists(MANIFEST)


def _digest(folder: Path) -> str | None:
    """The digest of an adapter directory; None where a file of it is missing."""
    return adapters.digest(folder) if all((folder / file).is_file() for file in FILES) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
