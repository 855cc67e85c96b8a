"""From YAML files and `--set` to checked sections: whatever is wrong ends in one line that names the file and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from translora_ray.cluster import Cluster, Config
from translora_ray.config import RELEASE_NAME, Section, Task
from translora_ray.errors import UsageError
from translora_ray.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))

_S = TypeVar("_S", bound=Section)


def inside(place: str, name: str) -> str:
    """A path in a directory or URI; what a URI says after `?` (an endpoint, a region) stays at its end."""
    head, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def load_task(path: str | Path) -> Task:
    """Read TASK.yaml; `train` comes back as an absolute path."""
    task = validate(Task, read_yaml(path), str(path))
    if "{input}" not in task.prompt:
        raise UsageError(f"{path}: prompt has no {{input}} in it, so no row could be shown to a model; add it.")
    if not re.fullmatch(RELEASE_NAME, task.name):
        raise UsageError(f"{path}: name has {len(task.name)} characters, and releases are called by it; take up to 100.")
    return task.model_copy(update={"train": str((Path(path).parent / task.train).resolve())})


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """RECIPE.yaml with `--set` overrides (`training.epochs=3`, `cluster.workers=2`). Recipe sections stand at the top level."""
    tree = read_yaml(path) if path else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write key=value, e.g. training.epochs=3.")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {override}: {parent} is a value, not a section.")
        try:
            node[leaf] = yaml.load(value, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            raise UsageError(f"--set {override}: {value} is not a YAML value.") from None
    where = str(path) if path else "--set"
    cluster = validate(Cluster, tree.pop("cluster", None) or {}, where, "cluster.")
    return Config(recipe=validate(Recipe, tree, where), cluster=cluster)


def differing_field(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str | None:
    """The first field in which two nested dictionaries differ, as `training.epochs is 6 there and 3 here`; None if none."""
    for key in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            if found := differing_field(there, here, f"{prefix}{key}."):
                return found
        elif there != here:
            return f"{prefix}{key} is {there} there and {here} here"
    return None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises `UsageError` where there is none."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{path} can not be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise UsageError(f"{path} is not valid YAML{'' if line is None else f' at line {line + 1}'}: correct it.") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must be a YAML mapping of keys to values.")
    return tree


def validate(section: type[_S], tree: dict[str, Any], where: str, prefix: str = "") -> _S:
    """`tree` as a section. Raises `UsageError` that names the file or option, `where`, and the key, after `prefix`."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UsageError(f"{where}: unknown key {key}; remove it or correct its spelling.") from None
        if first["type"] == "missing":
            raise UsageError(f"{where}: the key {key} is missing; add it.") from None
        if first["type"] == "value_error":
            raise UsageError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}.") from None
        raise UsageError(f"{where}: {key}: {first['msg']}, not {first['input']!r}.") from None
