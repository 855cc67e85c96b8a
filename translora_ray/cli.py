"""The commands. Configuration is read and checked before torch, ray or vllm is imported, so help and usage errors are quick."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from translora_ray import releasing
from translora_ray.disk import room
from translora_ray.errors import TransLoraError, UsageError, reason
from translora_ray.options import parser

if TYPE_CHECKING:
    from translora_ray.cluster import Cluster


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a usage or input error, 1 for any other failure."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is installed, and it asks for a kernel that nothing here needs
    try:
        options = parser().parse_args(arguments)
        commands = {"prepare": _prepare, "transfer": _transfer, "evaluate": _evaluate, "fleet": _fleet, "status": _status, "inspect": _inspect}
        commands |= {"serve": _serve, "keys": _keys, **dict.fromkeys(releasing.COMMANDS, _release)}
        return commands[options.command](options)
    except UsageError as error:
        print(f"translora: {error}", file=sys.stderr)
        return 2
    except TransLoraError as error:
        print(f"translora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("translora: interrupted; a transfer goes on from what it committed when the same command is given again.", file=sys.stderr)
        return 1
    except Exception as error:
        if "TRANSLORA_DEBUG" in os.environ:
            raise
        print(f"translora: {reason(error)} (an error nobody foresaw: set TRANSLORA_DEBUG=1 to see where, and report it)", file=sys.stderr)
        return 1


def _reference(reference: str, name: str) -> str:
    """A path among the model references as an absolute one: it is stored, and read from other directories."""
    path = Path(reference).expanduser()
    return str(Path(_place(str(path), name)).resolve()) if path.exists() else reference


def _place(path: str, name: str) -> str:
    """A path that is written, or stored for later, as an absolute one; URIs stay."""
    if "://" in path or Path(path).is_absolute():  # as it was given: what a link leads to may change
        return path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(f"{name} {path} would lie in the job's temporary working directory: give an absolute path or a URI.")
    return str(Path(path).resolve())


def _placement(overrides: Sequence[str]) -> Cluster:
    """The cluster section that `--set` describes, for commands that work on this machine alone."""
    from translora_ray.reading import load_config

    if strange := [override for override in overrides if not override.startswith(("cluster.vllm.", "cluster.engine_gpus="))]:
        raise UsageError(f"--set {strange[0]}: this command takes cluster.vllm.* and cluster.engine_gpus alone.")
    return load_config(None, list(overrides)).cluster


def _prepare(options: argparse.Namespace) -> int:
    from translora_ray.reading import load_task

    task, cluster = load_task(options.task), _placement(options.set)
    out = _place(options.out, "--out")
    from translora_ray import preparing
    from translora_ray.engines.select import choose_engine, opener
    from translora_ray.evaluation.report import show_facts
    from translora_ray.progress import Display

    engine = choose_engine(options.engine)
    with Display() as display:
        facts = preparing.prepare(
            task,
            _reference(options.base, "--base"),
            out,
            options.adapter,
            not options.no_discriminator,
            opener(engine, cluster.vllm, cluster.engine_gpus, display.say),
            display,
        )
    show_facts(f"transfer kit {options.out}", {key: facts[key] for key in ("base", "rows", "discriminator", "generator", "seconds", "digest")})
    return 0


def _transfer(options: argparse.Namespace) -> int:
    from translora_ray.reading import load_config

    config = load_config(options.recipe, options.set)
    kit, out = _place(options.kit, "KIT"), _place(options.out, "--out")
    from translora_ray import workflow
    from translora_ray.evaluation.report import show_facts
    from translora_ray.progress import Display
    from translora_ray.storage import REPORT

    with Display() as display:
        manifest = workflow.transfer(kit, _reference(options.target, "--target"), out, config, options.engine, display)
    counts = {f"rejected, {reason}": count for reason, count in manifest["counts"]["rejects"].items()}
    facts = {
        "adapter": f"{options.out}/adapter",
        "report": f"{options.out}/{REPORT}",
        **{name: manifest["counts"][name] for name in ("trained", "held_out", "accepted", "candidates")},
        **counts,
    }
    show_facts(f"transfer {options.out}", facts | {"final loss": round(manifest["training"]["loss"], 4), "seconds": manifest["seconds"]})
    return _judged(manifest["gate"], "without real rows")


def _fleet(options: argparse.Namespace) -> int:
    from translora_ray.fleet.manifest import load_fleet

    if options.pace and not options.dry_run:
        raise UsageError("--pace belongs to --dry-run: add it, or leave --pace out.")
    fleet, wanted = load_fleet(options.fleet)
    from translora_ray.fleet import driver, forecast, state, status
    from translora_ray.progress import Display

    with Display() as display:
        if options.dry_run:
            return forecast.show_plan(fleet, wanted, options.engine, display, options.pace)
        ended = driver.run_fleet(fleet, wanted, options.resume, options.engine, display)
    print(f"fleet {ended.store.uri}: {status.counts_line(list(ended.records.values()))}")
    return int(bool({state.FAILED, state.REFUSED} & ended.counts.keys()))


def _status(options: argparse.Namespace) -> int:
    from translora_ray.fleet.manifest import place_of
    from translora_ray.fleet.status import show_status

    show_status(place_of(options.out) if Path(options.out).is_file() else options.out, options.watch)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from translora_ray.engines.select import choose_engine, opener
    from translora_ray.evaluation.compare import evaluate
    from translora_ray.evaluation.report import show_evaluation
    from translora_ray.progress import Display
    from translora_ray.storage import RunStore

    _check_json(options.json)
    if options.trainings < 1:
        raise UsageError(f"--trainings {options.trainings}: give 1 or more.")
    engine, cluster = choose_engine(options.engine), _placement(options.set)
    with Display() as display:
        engines = opener(engine, cluster.vllm, cluster.engine_gpus, display.say)
        device = "cpu" if cluster.engine_gpus == 0 else None
        result = evaluate(options.run, options.data, options.oracle, options.arms, engines, display, options.train, options.trainings, device)
    _write_json(options.json, result)
    if options.json != "-":
        show_evaluation(result)
    stream = sys.stderr if options.json == "-" else None
    refusals = _judged(result["gate"], "on real rows", stream)
    if (before := RunStore(options.run).manifest(options.run).get("gate")) and before["verdict"] == "refuse":
        refusals += _judged(before, "without real rows, which counts as much", stream)
    return min(1, refusals) if options.gate else 0


def _judged(gate: dict[str, Any] | None, where: str, stream: TextIO | None = None) -> int:
    """Say a verdict; the exit code that it asks for."""
    if gate is None:
        return 0
    print(f"verdict {where}: {gate['verdict']}" + "".join(f"\n  {reason}" for reason in gate["reasons"]), file=stream)
    return int(gate["verdict"] == "refuse")


def _check_json(name: str | None) -> None:
    """Raise `UsageError` where `--json` could not be written: found before anything is computed."""
    if name and name != "-":
        place = Path(_place(name, "--json"))
        if place.is_dir() or not place.parent.is_dir():
            raise UsageError(f"--json {name}: this is a directory, or lies in none; name a file in one that exists.")
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            raise UsageError(f"--json {name} can not be written: name another file, or change the permissions.")


def _write_json(name: str | None, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2)
    if name == "-":
        print(text)
    elif name:
        with room(Path(name)):
            Path(name).write_text(text + "\n")


def _audit(options: argparse.Namespace) -> int:
    if len(options.path) > 1 or not (options.data and options.holdout):
        raise UsageError("inspect --audit takes one kit or run, --data with the rows that it was made from, and --holdout with others of the same task.")
    _check_json(options.json)
    from translora_ray.engines.select import choose_engine, opener
    from translora_ray.evaluation.audit import audit
    from translora_ray.evaluation.report import show_audit
    from translora_ray.progress import Display

    engine, cluster = choose_engine(options.engine), _placement(options.set)
    with Display() as display:
        result = audit(options.path[0], options.data, options.holdout, options.pairs, opener(engine, cluster.vllm, cluster.engine_gpus, display.say), display)
    _write_json(options.json, result)
    if options.json != "-":
        show_audit(result)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.audit:
        return _audit(options)
    if options.data or options.holdout or options.pairs or options.json:
        raise UsageError("--data, --holdout, --pairs and --json belong to inspect --audit: add it, or leave them out.")
    from translora_ray.inspection import inspect

    inspect(options.path)
    return 0


def _serve(options: argparse.Namespace) -> int:
    cluster = _placement(options.set)
    from translora_ray.serving.app import service
    from translora_ray.serving.run import run

    arguments = {
        "registry": _place(options.registry, "REGISTRY"),
        "bases": [_reference(base, "--base") for base in options.base],
        "engine": options.engine,
        "keys": options.keys and _place(options.keys, "--keys"),
        "replicas": options.replicas,
        "adapters": options.adapters,
        "gpus": cluster.engine_gpus,
        "vllm": cluster.vllm,
    }
    run(service({key: value for key, value in arguments.items() if value is not None}), options.host, options.port, lambda line: print(line, flush=True))
    return 0


def _keys(options: argparse.Namespace) -> int:
    from translora_ray.serving.auth import add_key

    key = add_key(options.file, options.add, tuple(options.adapters), requests_per_minute=options.requests_per_minute, max_tokens=options.max_tokens)
    print(f"{key}\n(shown once: {options.file} holds its digest)")
    return 0


def _release(options: argparse.Namespace) -> int:
    options.registry = _place(options.registry, "REGISTRY")
    return releasing.run(options)


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
