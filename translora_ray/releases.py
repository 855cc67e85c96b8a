"""What a release is, how releases are referred to, and what a finished run says for one. `registry.py` keeps them; nothing is written here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translora_ray import adapters
from translora_ray.config import RELEASE_NAME
from translora_ray.errors import UsageError
from translora_ray.evaluation.gate import REFUSE, REVIEW
from translora_ray.kit import load as load_kit
from translora_ray.storage import ADAPTER, MANIFEST, RESULT, RunStore

STABLE = "stable"
_NAME = re.compile(RELEASE_NAME)
_ID = re.compile(rf"({_NAME.pattern})@([1-9][0-9]{{0,8}})")
UNGATED = {"verdict": REVIEW, "reasons": ["the recipe held nothing out for a gate"], "checks": []}


class NotFound(UsageError):
    """There is no such release. The message names what there is: a service decides itself whether to repeat it."""


@dataclass(frozen=True)
class Release:
    """An immutable adapter in a registry. `digest` is `adapters.digest` of the folder at `uri`.

    `kit` and `recipe_hash` are the run's, `lineage` digests of the adapters before this one (the source adapter of a kit has neither hash nor lineage), `gate`
    the verdict without real rows, `evaluation` the result of `translora evaluate` without single rows, None where there was none; `adapter` has `type`, `rank`
    and `modules`, the endings of the modules' names; `reviewed` says that a person let a verdict of review pass; `created` is a time in UTC, in ISO format;
    `run` is the path or URI that it was published from, empty where an older version wrote it.
    """

    name: str
    version: int
    digest: str
    target_base: str
    base_fingerprint: str
    source_base: str
    kit: str
    lineage: tuple[str, ...]
    recipe_hash: str
    gate: dict[str, Any] = field(hash=False)
    evaluation: dict[str, Any] | None = field(hash=False)
    task: dict[str, Any] = field(hash=False)
    adapter: dict[str, Any] = field(hash=False)
    reviewed: bool
    created: str
    uri: str
    run: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def verdict(self) -> str:
        return verdict(self.gate, self.evaluation)


@dataclass(frozen=True)
class Trial:
    """A release that is tried on a channel, beside the one that the channel names.

    A canary answers a `share` of the channel's requests. A shadow is asked that share too, and nobody gets its answers.
    """

    release: str
    share: float
    shadow: bool

    def __str__(self) -> str:
        return f"{'shadow' if self.shadow else 'canary'} {self.release} {self.share:g}"


def trial(release: str, share: float | None, shadow: bool) -> Trial:
    """What is asked for, where it makes sense. A shadow is asked everything unless a share is given."""
    if shadow and share is None:
        share = 1.0
    if share is None or not (0 < share < 1 or (shadow and share == 1)):
        raise UsageError(f"--share {share}: take a number over 0 and below 1 (with --shadow up to 1); to let the channel name the release, leave it out.")
    return Trial(release, share, shadow)


def verdict(gate: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Refuse where one of the two says so; else real rows have the last word."""
    found: list[str] = [each["verdict"] for each in ((evaluation or {}).get("gate"), gate) if each]
    return REFUSE if REFUSE in found else found[0]


def check_name(name: str, what: str = "name of a release") -> str:
    """`name`, where it can be one of a release or a channel; names become parts of paths and of models' names in requests."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no {what}: take up to 100 letters, digits, dots, dashes and underscores, a letter or digit first.")
    return name


def parse_id(reference: str) -> tuple[str, int] | None:
    """(name, version) of `name@version`, None for anything else."""
    found = _ID.fullmatch(reference)
    return (found[1], int(found[2])) if found else None


def parse_channel(reference: str) -> tuple[str, str] | None:
    """(name, channel) of `name:channel`, or of `name`, which stands for its channel `stable`; None for anything else."""
    name, colon, channel = reference.partition(":")
    channel = channel if colon else STABLE
    return (name, channel) if _NAME.fullmatch(name) and _NAME.fullmatch(channel) else None


def some(words: Iterable[str], most: int = 10) -> str:
    """The first of them in a sentence."""
    found = sorted(words)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def of_kit(kit: str, reviewed: bool, scratch: Path) -> tuple[dict[str, Any], Path]:
    """What the release of a kit's source adapter says, and a copy of the adapter in `scratch`: what a migration moves away from, to serve both side by side."""
    found = load_kit(kit)
    if not reviewed:
        raise UsageError(f"{kit} is a kit, whose source adapter passed no gate: add --reviewed when a person has let it pass.")
    copy = Path(shutil.copytree(found.adapter.path, scratch / ADAPTER))
    facts: dict[str, Any] = {
        "target_base": found.base,
        "base_fingerprint": found.base_fingerprint,
        "source_base": found.base,
        "kit": found.digest,
        "lineage": [],
        "recipe_hash": "",
        "task": found.task.model_dump(mode="json"),
        "evaluation": None,
        "gate": {"verdict": REVIEW, "reasons": ["the source adapter of a kit passes no gate"], "checks": []},
        "reviewed": True,
        "run": found.path,
    }
    return facts | _about(adapters.inspect(copy)), copy


def _about(info: adapters.AdapterInfo) -> dict[str, Any]:
    modules = sorted({module.rpartition(".")[2] for module in info.shapes})
    return {"digest": info.digest, "adapter": {"type": info.type, "rank": info.rank, "modules": modules}}


def of_run(run: str, reviewed: bool, scratch: Path) -> tuple[dict[str, Any], Path]:
    """What a finished run's release says of it, and a copy of its adapter in `scratch`.

    Raises `UsageError` where the run is not finished or may not ship, or a person has to look at it first and `reviewed` does not say that one did.
    """
    store = RunStore(run)
    manifest = store.manifest(run)
    evaluation = {key: value for key, value in store.read_json(RESULT).items() if key != "verdicts"} if store.exists(RESULT) else None
    gate = manifest.get("gate") or UNGATED
    reasons = "; ".join([*gate["reasons"], *(evaluation or {}).get("gate", {}).get("reasons", [])])
    found = verdict(gate, evaluation)
    if found == REFUSE:
        raise UsageError(f"{run} may not ship, its verdict is refuse ({reasons}): transfer again with another recipe or kit.")
    if found == REVIEW and not reviewed:
        raise UsageError(f"{run} must be looked at, its verdict is review ({reasons}): add --reviewed when a person has let it pass.")
    folder = store.fetch_folder(ADAPTER, scratch / "run")
    adapters.inspect(folder)
    copy = Path(shutil.copytree(folder, scratch / ADAPTER))  # what is published is what was checked, whatever happens to the run meanwhile
    try:
        info = adapters.require(copy, manifest["adapter_digest"], run)
        facts = {name: manifest[name] for name in ("target_base", "source_base", "kit", "lineage", "recipe_hash", "task")}
        base = manifest["target"]
    except KeyError as missing:
        raise UsageError(f"{run}/{MANIFEST} has no {missing.args[0]}: it is damaged, or an older version wrote it; transfer again.") from None
    facts |= {"base_fingerprint": base, "gate": gate, "evaluation": evaluation, "reviewed": found == REVIEW}
    facts["run"] = store.root if store.local else store.uri
    return facts | _about(info), copy
