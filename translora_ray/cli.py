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

from translora_ray import __version__, releasing
from translora_ray.errors import TransLoraError, UsageError, first_line

if TYPE_CHECKING:
    from translora_ray.config import Cluster, EngineKind
    from translora_ray.engines.base import OpenEngine
    from translora_ray.progress import Display

ENGINES = ("auto", "transformers", "vllm")
REF = "a hub id, a directory, a .gguf file, or packaged:smollm2-135m-instruct, packaged:gemma-3-270m"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`.")


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="translora", description="Move LoRA adapters to a new base model without the data they were trained on.")
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a transfer kit while the task's rows are at hand")
    prepare.add_argument("task", metavar="TASK.yaml")
    prepare.add_argument("--base", required=True, metavar="REF", help=f"source base: {REF}")
    prepare.add_argument("--out", required=True, metavar="KIT", help="directory to make")
    prepare.add_argument("--adapter", metavar="DIR", help="a source adapter that exists, instead of training one")
    prepare.add_argument("--no-discriminator", action="store_true", help="leave the discriminator out")

    transfer = commands.add_parser("transfer", help="move a kit's adapter to another base")
    transfer.add_argument("kit", metavar="KIT", help="a transfer kit, or a finished run whose adapter moves on")
    transfer.add_argument("--target", required=True, metavar="REF", help=f"target base: {REF}")
    transfer.add_argument("--out", required=True, metavar="RUN", help="run directory; an interrupted run goes on")
    transfer.add_argument("--recipe", metavar="R.yaml")
    transfer.add_argument("--set", action="append", default=[], metavar="key=value", help="override a recipe or cluster key, e.g. training.epochs=3")

    evaluate = commands.add_parser("evaluate", help="compare a finished run with its baselines on real rows")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--data", required=True, metavar="test.jsonl")
    evaluate.add_argument("--oracle", metavar="train.jsonl", help="also train an adapter on these real rows, for comparison")
    evaluate.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="also adapters made in other ways: copy, seeds_only, unfiltered, a selection method"
    )
    evaluate.add_argument("--gate", action="store_true", help="exit 1 where the real rows say that the adapter must not ship")
    evaluate.add_argument("--json", metavar="FILE", help="write the result there; - for standard output")

    inspect = commands.add_parser("inspect", help="say what a kit, adapter, run, registry or model is, and whether it is sound")
    inspect.add_argument("path", metavar="PATH", nargs="+", help="one path or model reference; two models are checked as a pair")
    releasing.add_commands(commands)
    for command in (prepare, evaluate):
        command.add_argument("--set", action="append", default=[], metavar="cluster.key=value", help="how engines are loaded, e.g. cluster.vllm.dtype=float32")
    for command in (prepare, transfer, evaluate):
        command.add_argument("--engine", choices=ENGINES, default="auto", help="auto: vllm where it is installed")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a usage or input error, 1 for any other failure."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is installed, and it asks for a kernel that nothing here needs
    try:
        options = parser().parse_args(arguments)
        handlers = {"prepare": _prepare, "transfer": _transfer, "evaluate": _evaluate, "inspect": _inspect, **dict.fromkeys(releasing.COMMANDS, _release)}
        return handlers[options.command](options)
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
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"translora: {reason} (an error nobody foresaw: set TRANSLORA_DEBUG=1 to see where, and report it)", file=sys.stderr)
        return 1


def _reference(reference: str) -> str:
    """A path among the model references as an absolute one: it is stored, and read from other directories."""
    return str(Path(reference).expanduser().resolve()) if Path(reference).expanduser().exists() else reference


def _place(path: str, name: str) -> str:
    """A path that is written, or stored for later, as an absolute one; URIs stay."""
    if "://" in path or Path(path).is_absolute():
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


def _opener(kind: EngineKind, cluster: Cluster, display: Display) -> OpenEngine:
    """Opens engines of the kind that was chosen, or of the one that can serve the adapters."""
    from translora_ray.engines.select import engine_for, open_engine

    return lambda base, used: open_engine(engine_for(kind, used, display.say), base, used, cluster.vllm, cluster.engine_gpus)


def _prepare(options: argparse.Namespace) -> int:
    from translora_ray.reading import load_task

    task, cluster = load_task(options.task), _placement(options.set)
    out = _place(options.out, "--out")
    from translora_ray import kit
    from translora_ray.engines.select import choose_engine
    from translora_ray.evaluation.report import show_facts
    from translora_ray.progress import Display

    engine = choose_engine(options.engine)
    with Display() as display:
        facts = kit.prepare(
            task,
            _reference(options.base),
            out,
            options.adapter,
            not options.no_discriminator,
            _opener(engine, cluster, display),
            display,
        )
    show_facts(f"transfer kit {options.out}", {key: facts[key] for key in ("base", "rows", "discriminator", "seconds", "digest")})
    return 0


def _transfer(options: argparse.Namespace) -> int:
    from translora_ray.reading import load_config

    config = load_config(options.recipe, options.set)
    kit, out = _place(options.kit, "KIT"), _place(options.out, "--out")
    from translora_ray import workflow
    from translora_ray.evaluation.report import show_facts
    from translora_ray.progress import Display

    with Display() as display:
        manifest = workflow.transfer(kit, _reference(options.target), out, config, options.engine, display)
    counts = {f"rejected, {reason}": count for reason, count in manifest["counts"]["rejects"].items()}
    facts = {"adapter": f"{options.out}/adapter", **{name: manifest["counts"][name] for name in ("trained", "held_out", "accepted", "candidates")}, **counts}
    show_facts(f"transfer {options.out}", facts | {"final loss": round(manifest["training"]["loss"], 4), "seconds": manifest["seconds"]})
    return _judged(manifest["gate"], "without real rows")


def _evaluate(options: argparse.Namespace) -> int:
    from translora_ray.engines.select import choose_engine
    from translora_ray.evaluation.compare import evaluate
    from translora_ray.evaluation.report import show_evaluation
    from translora_ray.progress import Display

    if options.json and options.json != "-":
        place = Path(_place(options.json, "--json"))
        if place.is_dir() or not place.parent.is_dir():
            raise UsageError(f"--json {options.json}: this is a directory, or lies in none; name a file in one that exists.")
    engine, cluster = choose_engine(options.engine), _placement(options.set)
    with Display() as display:
        result = evaluate(options.run, options.data, options.oracle, options.arms, _opener(engine, cluster, display), display)
    text = json.dumps(result, indent=2)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n")
    if options.json != "-":
        show_evaluation(result)
    refused = _judged(result["gate"], "on real rows", sys.stderr if options.json == "-" else None)
    return refused if options.gate else 0


def _judged(gate: dict[str, Any] | None, where: str, stream: TextIO | None = None) -> int:
    """Say a verdict; the exit code that it asks for."""
    if gate is None:
        return 0
    print(f"verdict {where}: {gate['verdict']}" + "".join(f"\n  {reason}" for reason in gate["reasons"]), file=stream)
    return int(gate["verdict"] == "refuse")


def _inspect(options: argparse.Namespace) -> int:
    from translora_ray.inspection import inspect

    inspect(options.path)
    return 0


def _release(options: argparse.Namespace) -> int:
    options.registry = _place(options.registry, "REGISTRY")
    return releasing.run(options)


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
