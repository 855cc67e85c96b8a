"""From the transfers that are wanted to groups that share a stream and its engines. What is wrong with one of them stays its own."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from translora_ray import kit
from translora_ray.config import EngineKind, Task
from translora_ray.errors import NoRoom, TransLoraError, UsageError, reason
from translora_ray.evaluation.compare import check_rows, compared
from translora_ray.fleet.manifest import Wanted
from translora_ray.placement import Resources, check_resources
from translora_ray.progress import Display
from translora_ray.records import read_rows
from translora_ray.storage import MANIFEST, RunStore
from translora_ray.stream.plan import Plan
from translora_ray.workflow import Checked, check, planned


@dataclass(frozen=True)
class Transfer:
    """A transfer that can begin."""

    wanted: Wanted
    checked: Checked
    plan: Plan
    worker: Resources

    @property
    def name(self) -> str:
        return self.wanted.name


Failures = dict[str, str]
"""Reasons of transfers that can not begin, by name."""


def check_all(
    wanted: Sequence[Wanted], engine: EngineKind, display: Display, go_on: Callable[[], None] = lambda: None
) -> tuple[list[tuple[Wanted, Checked]], Failures]:
    """The transfers whose kit, base, recipe and real rows go together, and why the others do not. Raises `Stopped` where `go_on` does."""
    sound, failures = [], {}
    phase = display.phase("checks")
    for number, each in enumerate(wanted, 1):
        go_on()
        try:
            sound.append((each, _checked(each, engine, display)))
        except NoRoom:
            raise
        except Exception as failure:
            failures[each.name] = _why(each, failure)
        phase.update(number, len(wanted))
    return sound, failures


def _checked(wanted: Wanted, engine: EngineKind, display: Display) -> Checked:
    if wanted.obstacle:
        raise UsageError(wanted.obstacle)
    checked = check(wanted.kit, wanted.target, wanted.out, wanted.config, engine, display.named(wanted.name))
    if wanted.data and not compared(checked.store, wanted.data):
        check_rows(checked.kit, read_rows(wanted.data), wanted.data, {"those of train": read_rows(wanted.train) if wanted.train else []})
    return checked


def lacks_its_kit_alone(wanted: Wanted) -> bool:
    """Whether the transfer is finished, by the same recipe, and evaluated, and lacks nothing but its kit, which it needs no more."""
    store = RunStore(wanted.out)
    with contextlib.suppress(Exception):  # whatever is wrong there, it lacks that, too
        if kit.is_gone(wanted.kit):
            manifest = store.read_json(MANIFEST)
            classes, rows = Task.model_validate(manifest["task"]).classes, manifest["kit_rows"]
            of_kits: list[dict[str, Any] | None] = [{"calibration": []}, {}, None]
            found = [(classes, rows, discriminator, copies) for discriminator in of_kits for copies in (False, True)]
            recipes = [wanted.config.recipe.decided(*each) for each in found]
            return manifest["recipe_hash"] in [recipe.digest() for recipe in recipes] and (wanted.data is None or compared(store, wanted.data))
    return False


def _why(wanted: Wanted, failure: Exception) -> str:
    """What is no error of ours comes of a kit, a base or a run that is damaged in some way that nobody foresaw."""
    if isinstance(failure, TransLoraError):
        return str(failure)
    return f"{wanted.kit}, its bases or its run can not be read ({reason(failure)}): bring back what is damaged."


def grouped(sound: Sequence[tuple[Wanted, Checked]], local: bool) -> tuple[list[list[Transfer]], Failures]:
    """The transfers in groups of like engines, the most urgent first, and why the others have no room. Raises `UsageError` where the cluster has for none."""
    groups: dict[object, list[Transfer]] = defaultdict(list)
    failures = {}
    for wanted, checked in sound:
        try:
            transfer = Transfer(wanted, checked, *planned(checked, local))
        except Exception as failure:
            failures[wanted.name] = _why(wanted, failure)
        else:
            plan = transfer.plan
            groups[tuple(plan.pools()), plan.engine_cpus, plan.engine_gpus].append(transfer)
    found, lacking = list[list[Transfer]](), ""
    for group in sorted(groups.values(), key=lambda group: -max(transfer.wanted.priority for transfer in group)):
        try:
            check_resources(group[0].plan, group[0].worker)
        except UsageError as failure:
            lacking = str(failure)
            failures |= dict.fromkeys((transfer.name for transfer in group), lacking)
        else:
            found.append(group)
    if lacking and not found:
        raise UsageError(lacking)
    return found, failures
