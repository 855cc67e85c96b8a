"""Who may ask the service for what: API keys, the adapters each may use, its limits. No Ray and no HTTP here.

A key is 32 random bytes that we draw ourselves, so its file holds plain sha256 digests: there is no weak password that a slow hash would
protect, and a slow one would cost every request. A key is shown once, when it is made.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from translora_ray.errors import UsageError, first_line

PREFIX = "tl-"


class Key(BaseModel):
    """One tenant: `sha256` is the digest of its key, `adapters` are globs over adapters' names (without version or channel)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    adapters: tuple[str, ...] = Field(min_length=1)
    requests_per_minute: int = Field(default=600, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=1 << 20, ge=1)

    def may_use(self, adapter: str) -> bool:
        return any(fnmatch.fnmatchcase(adapter, glob) for glob in self.adapters)


class KeyFile(BaseModel):
    """The file of keys, in YAML or JSON."""

    model_config = ConfigDict(extra="forbid")
    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        for what, values in (("name", [key.name for key in keys]), ("sha256", [key.sha256 for key in keys])):
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}")
        return keys


OPEN = Key(name="anyone", sha256="0" * 64, adapters=("*",), requests_per_minute=1 << 30)
"""What everyone may do where there are no keys, which is for this machine alone."""


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: str | Path) -> tuple[Key, ...]:
    """The keys in a file. Raises `UsageError` where it is missing or says something that is not understood."""
    try:
        return KeyFile.model_validate(yaml.safe_load(Path(path).read_text()) or {}).keys
    except OSError as error:
        raise UsageError(f"The keys in {path} can not be read ({error.strerror}): make the file with `translora keys {path} --add NAME`.") from None
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"])) or "the file"
        raise UsageError(f"{path} is not a file of keys: {place}: {found['msg']}.") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, or bytes that are no text, are ValueErrors
        raise UsageError(f"{path} is neither YAML nor JSON ({first_line(error)}): correct it.") from None


def add_key(path: str | Path, name: str, adapters: tuple[str, ...], **limits: int) -> str:
    """Add a key to the file, which is made if need be, readable by its owner alone; returns the key, which is stored nowhere."""
    file = Path(path)
    if strange := next((glob for glob in adapters if set(glob) & set("@:")), None):
        raise UsageError(f"--adapters {strange}: a key is for names, without version or channel, so this is no name's; leave that out.")
    try:
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else of two who add at the same time one would lose its key
            return _add(file, name, adapters, limits)
    except OSError as error:
        raise UsageError(f"{path} can not be written ({error.strerror}): choose another place.") from None


def _add(file: Path, name: str, adapters: tuple[str, ...], limits: dict[str, int]) -> str:
    keys = read_keys(file) if file.exists() and file.stat().st_size else ()
    if any(key.name == name for key in keys):
        raise UsageError(f"{file} has a key named {name} already: choose another name, or remove that one first.")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        new = Key(name=name, sha256=digest(secret), adapters=adapters, **limits)
    except ValidationError as error:
        found = error.errors()[0]
        raise UsageError(f"The key can not be made: {'.'.join(map(str, found['loc']))}: {found['msg']}.") from None
    text = yaml.safe_dump({"keys": [key.model_dump(mode="json") for key in (*keys, new)]}, sort_keys=False)
    scratch = file.with_name(f".{file.name}.new")
    scratch.touch(mode=0o600)
    if file.exists():
        scratch.chmod(file.stat().st_mode)  # the service may run as another user
    scratch.write_text(text)
    scratch.replace(file)
    return secret


class Limiter:
    """Requests per minute as a bucket that fills steadily and holds a minute's worth at most. One per replica of the ingress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, key: Key) -> float:
        """0 and the request is counted, or the seconds until one would be let through."""
        now, rate = self.clock(), key.requests_per_minute / 60
        left, then = self._buckets.get(key.sha256, (float(key.requests_per_minute), now))
        left = min(float(key.requests_per_minute), left + (now - then) * rate)
        allowed = left >= 1
        self._buckets[key.sha256] = (left - allowed, now)
        return 0.0 if allowed else (1 - left) / rate


class Keyring:
    """The keys of a file, read again when it changes; without a file, `OPEN` for everyone.

    A file that is broken by an edit, or empty, leaves the keys as they were and says so through `complain`: a slip must lock nobody out.
    """

    def __init__(self, path: str | None, complain: Callable[[str], None], check_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.complain, self.check_seconds, self.clock = path, complain, check_seconds, clock
        self._stamp, self._checked = self._changed(), clock()
        self._keys: tuple[Key, ...] = read_keys(path) if path else ()
        self._complaint: str | None = None

    def find(self, presented: str | None) -> Key | None:
        """The key that was presented, or None. Every stored digest is compared, each in constant time, whatever was presented."""
        if self.path is None:
            return OPEN
        self._reload()
        if presented is None:
            return None
        given, found = digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found

    def _changed(self) -> tuple[int, int] | None:
        try:
            status = Path(self.path).stat() if self.path else None
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino) if status else None

    def _reload(self) -> None:
        if self.path is None or self.clock() - self._checked < self.check_seconds:
            return
        self._checked = self.clock()
        if (stamp := self._changed()) == self._stamp:
            return
        try:
            self._keys, self._stamp, self._complaint = read_keys(self.path), stamp, None
        except UsageError as error:  # tried again in a moment, and said once
            if str(error) != self._complaint:
                self.complain(f"keys stay as they were: {error}")
            self._complaint = str(error)
