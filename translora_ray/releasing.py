"""The registry's commands: publish, promote, roll back, retire, and the table that `translora inspect` shows. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from translora_ray.errors import UsageError

if TYPE_CHECKING:
    from translora_ray.registry import Registry, Release

COMMANDS = ("publish", "promote", "roll-back", "retire")


def add_commands(commands: Any) -> None:
    """Add the registry's commands to the parser's."""
    publish = commands.add_parser("publish", help="make a finished run's adapter, or a kit's source adapter, a release in a registry")
    publish.add_argument("run", metavar="RUN", help="a finished run; or a kit, to serve its source adapter on the old base")
    promote = commands.add_parser("promote", help="let a channel name a release, or try the release there first")
    back = commands.add_parser("roll-back", help="end a channel's trial; without one, let it name the release that it named before")
    retire = commands.add_parser("retire", help="take a release that no channel names off the lists")
    for command in (publish, promote, back, retire):
        command.add_argument("registry", metavar="REGISTRY", help="a directory, s3://... or gs://...")
    publish.add_argument("--name", help="of the release; default: the task's")
    publish.add_argument("--reviewed", action="store_true", help="a person looked at it and lets it pass: a run that is for review or had no gate, or a kit")
    publish.add_argument("--channel", metavar="C", help="also promote the release to this channel")
    promote.add_argument("release", metavar="NAME@V")
    promote.add_argument("--share", type=float, metavar="S", help="canary: the release answers this share of the channel's requests, e.g. 0.1")
    promote.add_argument(
        "--shadow", action="store_true", help="the release is asked too (--share of the requests), its agreement is counted, clients see nothing"
    )
    back.add_argument("name", metavar="NAME")
    for command in (promote, back):
        command.add_argument("--channel", metavar="C", default="stable", help="default: stable")
    retire.add_argument("release", metavar="NAME@V")


def run(options: argparse.Namespace) -> int:
    """Run one of `COMMANDS`; prints the release that it made, or that the channel names now."""
    from translora_ray.registry import Registry
    from translora_ray.releases import check_name, trial

    registry = Registry(options.registry)
    if options.command == "publish":
        channel = check_name(options.channel, "channel") if options.channel else None
        release = registry.publish(options.run, options.name, options.reviewed)
        if channel:
            registry.promote(release.id, channel)
        print(release.id)
    elif options.command == "promote":
        registry.check()
        if problem := _problem(registry, registry.release(options.release)):
            raise UsageError(f"{problem} Nothing was changed.")
        tried = ""
        if options.shadow or options.share is not None:
            wanted = trial(options.release, options.share, options.shadow)
            release = registry.try_out(wanted, options.channel)
            tried = f", {replace(wanted, release=release.id)}"
        else:
            release = registry.promote(options.release, options.channel)
        channel = f"{release.name}:{options.channel}"
        print(f"{channel} {registry.release(channel).id}{tried}")
    elif options.command == "roll-back":
        release = registry.roll_back(options.name, options.channel)
        print(f"{release.name}:{options.channel} {release.id}")
    else:
        registry.retire(options.release)
        print(f"{options.release} retired")
    return 0


def show(registry: Registry) -> None:
    """A line for each release that can be read, with its digest checked again. Raises `UsageError` where a release or a channel is not sound."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from translora_ray.registry import Unsound

    table = Table(title=Text(f"registry {registry.uri}"))
    for column in ("release", "channels", "target base", "verdict", "created", "digest", "sound"):
        table.add_column(column, overflow="fold")
    damaged: list[Unsound] = []
    changes, releases = registry.changes(damaged.append), registry.releases(skip=damaged.append)
    wrong = [str(each) for each in damaged]
    for release in releases:
        channels = ", ".join(_roles(release, changes))
        problem = _problem(registry, release)
        wrong += [problem] if problem else []
        verdict = release.verdict + (", reviewed" if release.reviewed else "")
        table.add_row(release.id, channels, release.target_base, verdict, release.created, release.digest[:12], "no" if problem else "yes")
    Console().print(table)
    if wrong:
        raise UsageError(f"{len(wrong)} releases or channels are not sound; the first: {wrong[0]}")


def described(registry: Registry, reference: str) -> tuple[str, dict[str, Any]]:
    """(title, facts) of a release: what it is and where it comes from. Raises `UsageError` where it is not sound."""
    release = registry.release(reference)
    if problem := _problem(registry, release):
        raise UsageError(problem)
    arms = (release.evaluation or {}).get("arms", {})
    accuracy = {name: round(arms[name]["accuracy"], 3) for name in ("source_adapter", "transferred") if name in arms}
    return f"release {release.id}, sound", {
        "target base": release.target_base,
        "source base": release.source_base,
        "task": release.task["name"],
        "adapter": ", ".join(f"{key} {value}" for key, value in release.adapter.items()),
        "kit": release.kit,
        "adapters before it": ", ".join(release.lineage) or "none",
        "recipe": release.recipe_hash or "none: a kit's source adapter",
        "published from": release.run or "unknown",
        "gate": "; ".join([release.gate["verdict"], *release.gate["reasons"]]),
        "accuracy on real rows": accuracy or "not evaluated",
        "verdict": release.verdict + (", reviewed" if release.reviewed else ""),
        "channels": ", ".join(_roles(release, registry.changes(name=release.name))) or "none",
        "created": release.created,
        "digest": release.digest,
    }


def _roles(release: Release, changes: dict[str, Any]) -> list[str]:
    """The channels that name the release, and those on which it is tried, with how."""
    from translora_ray.registry import trial_in

    found = []
    for name, change in changes.items():
        channel, trial = name.partition(":")[2], trial_in(change)
        found += [channel] if change["release"] == release.id else []
        found += [f"{channel} ({'shadow' if trial.shadow else 'canary'} {trial.share:g})"] if trial and trial.release == release.id else []
    return found


def _problem(registry: Registry, release: Release) -> str | None:
    from translora_ray.registry import Unsound

    with tempfile.TemporaryDirectory() as scratch:
        try:
            registry.fetch(release, Path(scratch))
        except Unsound as error:
            return str(error)
    return None
