"""The command line: each command's arguments. What the commands do is in `cli.py`."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from translora_ray import __version__, releasing
from translora_ray.errors import UsageError

ENGINES = ("auto", "transformers", "vllm")
REF = "a hub id, a directory, a .gguf file, or packaged:smollm2-135m-instruct, packaged:gemma-3-270m"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`.")


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="translora", description="Move LoRA adapters to a new base model without the data they were trained on.")
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare, transfer, evaluate = _one_adapter(commands)
    fleet = _fleets(commands)
    inspect = _inspection(commands)
    releasing.add_commands(commands)
    serve = _service(commands)
    for command in (prepare, evaluate, inspect, serve):
        command.add_argument("--set", action="append", default=[], metavar="cluster.key=value", help="how engines are loaded, e.g. cluster.vllm.dtype=float32")
    for command in (prepare, transfer, evaluate, inspect, fleet, serve):
        auto = "transformers" if command is serve else "vllm where it is installed"
        command.add_argument("--engine", choices=ENGINES, default="auto", help=f"auto: {auto}")
    return root


def _one_adapter(commands: Commands) -> tuple[_Parser, _Parser, _Parser]:
    prepare = commands.add_parser("prepare", help="make a transfer kit while the task's rows are at hand")
    prepare.add_argument("task", metavar="TASK.yaml")
    prepare.add_argument("--base", required=True, metavar="REF", help=f"source base: {REF}")
    prepare.add_argument("--out", required=True, metavar="KIT", help="directory to make")
    prepare.add_argument("--adapter", metavar="DIR", help="a source adapter that exists, instead of training one")
    prepare.add_argument("--no-discriminator", action="store_true", help="leave the discriminator out")

    transfer = commands.add_parser("transfer", help="move a kit's adapter to another base")
    transfer.add_argument("kit", metavar="KIT", help="a transfer kit, or a finished run or a release whose adapter moves on")
    transfer.add_argument("--target", required=True, metavar="REF", help=f"target base: {REF}")
    transfer.add_argument("--out", required=True, metavar="RUN", help="run directory; an interrupted run goes on")
    transfer.add_argument("--recipe", metavar="R.yaml")
    transfer.add_argument("--set", action="append", default=[], metavar="key=value", help="override a recipe or cluster key, e.g. training.epochs=3")

    evaluate = commands.add_parser("evaluate", help="compare a finished run with its baselines on real rows")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--data", required=True, metavar="test.jsonl")
    evaluate.add_argument("--train", metavar="train.jsonl", help="rows that the source adapter learnt from: none of the test rows may be among them")
    evaluate.add_argument("--oracle", metavar="train.jsonl", help="also train an adapter on these real rows, for comparison")
    evaluate.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="also adapters made in other ways: copy, seeds_only, unfiltered, a selection method"
    )
    evaluate.add_argument("--trainings", type=int, default=1, metavar="N", help="train transferred adapter and oracle N times in all, to see what is chance")
    evaluate.add_argument("--gate", action="store_true", help="exit 1 where a verdict, on real rows or without, is refuse")
    evaluate.add_argument("--json", metavar="FILE", help="write the result there; - for standard output")
    return prepare, transfer, evaluate


def _fleets(commands: Commands) -> _Parser:
    fleet = commands.add_parser("fleet", help="move many kits' adapters, with shared engines")
    fleet.add_argument("fleet", metavar="FLEET.yaml")
    fleet.add_argument("--resume", action="store_true", help="go on with a fleet that is there; begin where there is none")
    fleet.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    fleet.add_argument("--pace", metavar="RUN", help="with --dry-run: a finished run, by whose pace hours are told until transfers of the fleet are finished")

    status = commands.add_parser("status", help="how far a fleet is")
    status.add_argument("out", metavar="FLEET", help="FLEET.yaml, or the directory or URI that it names as out")
    status.add_argument("--watch", action="store_true", help="show it anew until the fleet ends")
    return fleet


def _inspection(commands: Commands) -> _Parser:
    inspect = commands.add_parser("inspect", help="say what a kit, adapter, run, registry, release or model is, and whether it is sound")
    inspect.add_argument("path", metavar="PATH", nargs="+", help="one path or model reference; two models are checked as a pair")
    inspect.add_argument("--audit", action="store_true", help="membership tests on what a kit's adapters and a run's synthetic prompts give away")
    inspect.add_argument("--data", metavar="train.jsonl", help="of --audit: the rows that the kit was made from")
    inspect.add_argument("--holdout", metavar="test.jsonl", help="of --audit: rows of the same task that were not learnt from")
    inspect.add_argument("--pairs", action="store_true", help="of --audit: show the synthetic prompts that are nearest to rows, and the rows")
    inspect.add_argument("--json", metavar="FILE", help="of --audit: write the result there; - for standard output")
    return inspect


def _service(commands: Commands) -> _Parser:
    serve = commands.add_parser("serve", help="answer OpenAI requests with the adapters of a registry")
    serve.add_argument("registry", metavar="REGISTRY")
    serve.add_argument(
        "--base", action="append", default=[], metavar="REF", help="base to load (more than once: an engine each); default: the one of all releases"
    )
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", help="address to listen at; default: 127.0.0.1, with --keys all addresses")
    serve.add_argument("--keys", metavar="FILE", help="file of API keys, see `translora keys`; default: no keys")
    serve.add_argument("--replicas", type=int, default=1, metavar="N", help="engines of each base")
    serve.add_argument("--adapters", type=int, default=8, metavar="N", help="adapters in an engine's memory; more of them take turns")

    keys = commands.add_parser("keys", help="add an API key to a file of keys, and show it once")
    keys.add_argument("file", metavar="FILE")
    keys.add_argument("--add", required=True, metavar="NAME", help="whose key it is")
    keys.add_argument("--adapters", nargs="+", required=True, metavar="GLOB", help="names of adapters that the key may use, e.g. 'support-*'")
    keys.add_argument("--requests-per-minute", type=int, default=600, metavar="N")
    keys.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="most tokens of an answer")
    return serve
