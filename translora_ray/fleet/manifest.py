"""FLEET.yaml: many transfers in one file. What may stand in it, and the transfers that it comes to. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from translora_ray.cluster import Cluster, Config
from translora_ray.config import RELEASE_NAME, Section
from translora_ray.errors import UsageError
from translora_ray.reading import inside, read_yaml, validate
from translora_ray.recipe import Recipe

Targets = Annotated[list[str], BeforeValidator(lambda target: [target] if isinstance(target, str) else target)]
"""One or several."""


class Item(Section):
    """A kit, or the kits that a pattern or a registry leads to, and what is different for them from the rest of the fleet."""

    kit: str | None = None
    """A transfer kit, a finished run or a release, or a pattern (`kits/*`)."""
    releases: str | None = None
    """In place of `kit`: a registry, of which a release of each name that is for `base` moves on, under its name: that of its channel stable, or the newest."""
    base: str | None = None
    name: str | None = Field(None, pattern=f"^{RELEASE_NAME}$")
    """Of the transfer's directory, and of its releases in the registry. None: the directory has the kit's name, releases the task's. Where there are several
    targets both have one name, that of the directory, which ends with the target's."""
    target: Targets = Field(default_factory=list)
    """Target bases in place of the fleet's."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Keys of a recipe that replace the fleet's."""
    priority: float = Field(1.0, gt=0)
    """Share of the engines, against the other transfers that use them: with 2 it gets twice as many packs."""
    evaluate: str | None = None
    """JSONL of real rows on which the finished adapter is compared, as `translora evaluate` does; the machines that compute must see it."""
    train: str | None = None
    """JSONL of the rows that the source adapter learnt from, where they are still there: those of `evaluate` must not be among them."""

    @model_validator(mode="after")
    def _leads_somewhere(self) -> Item:
        if self.train and not self.evaluate:
            raise ValueError("train says what the rows of evaluate must not be among: give evaluate, too")
        if (self.kit is None) == (self.releases is None) or (self.releases is None) != (self.base is None):
            raise ValueError("give kit, or releases and base")
        return self


class Fleet(Section):
    """FLEET.yaml."""

    out: str
    """Directory or URI (s3://, gs://) of the fleet: runs/NAME is each transfer's run directory."""
    kits: list[Item] = Field(min_length=1)
    """Each a path, a pattern, or an item with keys of its own."""
    target: Targets = Field(default_factory=list)
    """One target base or several: each kit moves to each of them."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """As in a recipe file, for all transfers."""
    cluster: Cluster = Cluster()
    registry: str | None = None
    """Directory or URI of a registry: adapters whose verdict is ship are published there."""
    trainings: int = Field(1, ge=1)
    """Most transfers that are trained, and pass the gate, at the same time."""

    @field_validator("kits", mode="before")
    @classmethod
    def _paths(cls, kits: Any) -> Any:
        return [{"kit": kit} if isinstance(kit, str) else kit for kit in kits] if isinstance(kits, list) else kits


@dataclass(frozen=True)
class Wanted:
    """One transfer of a fleet. `name` is its place in the fleet, `release` what its releases are to be called, None as their task, `obstacle` why it can not
    begin, where that is known from the start."""

    name: str
    kit: str
    target: str
    out: str
    config: Config
    priority: float
    data: str | None
    release: str | None
    obstacle: str = ""
    train: str | None = None


def place_of(path: str) -> str:
    """`out` of FLEET.yaml, wherever its kits are."""
    return _located(validate(Fleet, read_yaml(path), path).out, Path(path).resolve().parent, f"{path}: out")


def load_fleet(path: str) -> tuple[Fleet, list[Wanted]]:
    """FLEET.yaml and its transfers in their order. Paths in it are relative to the file; `~` is the home directory."""
    fleet = validate(Fleet, read_yaml(path), path)
    folder = Path(path).resolve().parent
    common = validate(Recipe, fleet.recipe, path, "recipe.")
    out = _located(fleet.out, folder, f"{path}: out")
    wanted = []
    for number, item in enumerate(fleet.kits):
        where = f"kits.{number}"
        recipe = validate(Recipe, _merged(fleet.recipe, item.recipe), path, f"{where}.recipe.") if item.recipe else common
        data, train = (_located(rows, folder, f"{path}: {where}.{key}") if rows else None for key, rows in (("evaluate", item.evaluate), ("train", item.train)))
        targets = item.target or fleet.target
        if not targets:
            raise UsageError(f"{path}: {where} has no target; add it there, or for the whole fleet.")
        kits = _kits(item.kit, folder, f"{path}: {where}.kit") if item.kit else _released(item, folder, f"{path}: {where}.releases")
        for kit, (called, obstacle) in kits.items():
            stem = item.name or called or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(kit).name).lstrip("._-")
            if item.name and len(kits) > 1:
                raise UsageError(f"{path}: {where} names {len(kits)} kits {item.name}; leave the name out, or name each kit.")
            for target in targets:
                name = stem if len(targets) == 1 else f"{stem}-{_short(target)}"
                config, base = Config(recipe=recipe, cluster=fleet.cluster), _reference(target, folder, f"{path}: target")
                release = name if len(targets) > 1 else item.name or called or None  # two bases' releases of one name would be numbered as they happen to end
                wanted.append(Wanted(name, kit, base, inside(out, f"runs/{name}"), config, item.priority, data, release, obstacle, train))
    names = Counter(each.name for each in wanted)
    if (unfit := next((name for name in names if not re.fullmatch(RELEASE_NAME, name)), None)) is not None:
        raise UsageError(f"{path}: a transfer would be called {unfit!r}, which is too long or begins with no letter or digit; give its kit another name.")
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise UsageError(f"{path}: {names[twice]} transfers would be called {twice!r}; give their kits different names (the key name).")
    registry = _located(fleet.registry, folder, f"{path}: registry") if fleet.registry else None
    return fleet.model_copy(update={"out": out, "registry": registry}), wanted


def _kits(pattern: str, folder: Path, where: str) -> dict[str, tuple[str, str]]:
    """The kits that a pattern leads to; their releases are to be called as their tasks, and nothing is known to be wrong with them."""
    place = _located(pattern, folder, where)
    if "://" in place or not glob.has_magic(pattern) or Path(place).exists():
        return {place: ("", "")}
    if not (found := sorted(glob.glob(os.path.normpath(Path(glob.escape(str(folder))) / Path(pattern).expanduser())))):
        raise UsageError(f"{where}: nothing is at {place}; correct it, or make a kit there with `translora prepare`.")
    return dict.fromkeys(found, ("", ""))


def _released(item: Item, folder: Path, where: str) -> dict[str, tuple[str, str]]:
    """The release of each name for the item's base that its channel stable names, or the newest: its name, and what is wrong with it. A newer one that is
    damaged stands for its name, and fails, as an older one in its place would be another adapter; unless its adapter is for another base."""
    from translora_ray.registry import Registry, Unsound
    from translora_ray.releases import STABLE, parse_id

    registry, damaged = Registry(_located(item.releases or "", folder, where)), list[Unsound]()
    registry.check()
    sound = registry.releases(item.base, damaged.append)
    newest = {release.name: (release.version, release.uri, "") for release in sound}
    stable = {change["release"] for channel, change in registry.changes(lambda _: None).items() if channel.endswith(f":{STABLE}")}
    chosen = {release.name: release.uri for release in sound if release.id in stable}
    bases = {item.base, *(release.target_base for release in sound)}
    for error in damaged:
        place = registry.place_of(error.path)
        (name, version), base = parse_id(error.path.split("/")[1]) or ("", 0), _base_in(place)
        if name not in chosen and version > newest.get(name, (0,))[0] and (base in bases or (base is None and name in newest)):
            newest[name] = version, place, str(error)
    if not newest:
        raise UsageError(f"{where}: {registry.uri} has no release for the base {item.base}; `translora inspect {registry.uri}` shows what there is.")
    return {chosen.get(name, uri): (name, obstacle) for name, (_, uri, obstacle) in newest.items()}


def _base_in(release: str) -> str | None:
    """The base that the adapter in a release's folder names, None where that can not be read."""
    from translora_ray.adapters import CONFIG
    from translora_ray.storage import RunStore

    with contextlib.suppress(OSError, UsageError, AttributeError):
        return str(RunStore(release).read_json(CONFIG).get("base_model_name_or_path"))
    return None


def _located(text: str, folder: Path, where: str) -> str:
    """A path or URI that holds everywhere, as far as the cluster's machines see it."""
    if "://" in text:
        return text.rstrip("/")
    path = Path(text).expanduser()
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(f"{where} {text} would lie in the job's temporary working directory: give an absolute path, one from ~, or a URI.")
    return os.path.normpath(folder / path)


def _reference(target: str, folder: Path, where: str) -> str:
    return _located(target, folder, where) if (folder / Path(target).expanduser()).exists() else target


def _short(reference: str) -> str:
    """What a model reference ends with, as a part of a name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", reference.rstrip("/"))[-1])


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(common)
    for key, value in own.items():
        merged[key] = _merged(common[key], value) if isinstance(value, dict) and isinstance(common.get(key), dict) else value
    return merged
