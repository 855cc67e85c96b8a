"""What serving costs: many adapters against one, a cold adapter, a large registry, and our service against a bare `ray.serve.llm` app.

    python benchmarks/serving.py                                   (all parts)
    python benchmarks/serving.py adapters cold --engine transformers

Adapters are random LoRAs of rank 16: what they say does not matter. Each service is `translora serve` in a process of its own.
`bare` needs vLLM, and starts an object store for the app that it compares with. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import results
from load import TOKENS, Round, first_token, listing, round_of
from rounds import SOURCE, TARGET, alternate

sys.path.insert(0, str(results.ROOT))

from tests.conftest import free_port
from tests.serving import finished_run, running
from translora_ray.references import resolve
from translora_ray.registry import Registry

ADAPTERS = 8
CLIENTS = 16
MANY = 500
Sides = dict[str, Callable[[int], Round]]


def published(folder: Path, base: str, count: int) -> tuple[Registry, list[str]]:
    """A registry of so many adapters."""
    registry = Registry(str(folder / "registry"))
    names = []
    for seed in range(count):
        run = finished_run(folder / f"run{seed}", base, f"adapter{seed}", seed, rank=16)
        names.append(registry.publish(run).id)
    return registry, names


@contextmanager
def service(registry: Registry, engine: str) -> Iterator[str]:
    """The address of the service on a registry."""
    settings = ["--set", "cluster.vllm.cpu_cache_gib=1.0"] if engine == "vllm" else []
    with running(registry.uri, "--engine", engine, "--adapters", str(ADAPTERS), "--port", str(free_port()), *settings) as process:
        yield process.url(900)


def table(measured: dict[str, list[Round]], against: str) -> list[str]:
    lines = ["| | tokens/s | tokens/s, ratio | seconds a request |", "|---|---|---|---|"]
    for name, rounds in measured.items():
        ratios = [ours.throughput / other.throughput for ours, other in zip(rounds, measured[against], strict=True)]
        throughput, latency = ([getattr(each, what) for each in rounds] for what in ("throughput", "latency"))
        lines.append(f"| {name} | {results.spread(throughput, 0)} | {results.spread(ratios)} | {results.spread(latency)} |")
    return lines


def adapters(folder: Path, base: str, engine: str, rounds: int, requests: int) -> list[str]:
    registry, names = published(folder, base, ADAPTERS)
    with service(registry, engine) as url:
        sides: Sides = {
            "one adapter": lambda turn: round_of(url, names[:1], requests, CLIENTS, turn),
            f"{ADAPTERS} adapters in turn": lambda turn: round_of(url, names, requests, CLIENTS, turn + 1000),
        }
        measured = alternate(sides, rounds)
    return [f"### {ADAPTERS} adapters against one, {CLIENTS} clients", "", *table(measured, "one adapter")]


def cold(folder: Path, base: str, engine: str, rounds: int, _: int) -> list[str]:
    registry, names = published(folder, base, rounds + 1)
    with service(registry, engine) as url:
        found = [(first_token(url, name), first_token(url, name)) for name in names][1:]  # the first one warms up
    rows = [f"| {name} | {results.spread(times)} |" for name, times in zip(("never asked before", "asked before"), zip(*found, strict=True), strict=True)]
    return ["### The first token of an adapter", "", "| | seconds |", "|---|---|", *rows]


def registry(folder: Path, base: str, engine: str, rounds: int, _: int) -> list[str]:
    where, names = published(folder, base, 1)
    first = Path(where.release(names[0]).uri)
    for number in range(MANY - 1):
        place = first.with_name(f"copy{number:03d}@1")
        place.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(first / file, place / file)
        facts = json.loads((first / "release.json").read_text()) | {"name": f"copy{number:03d}", "version": 1}
        (place / "release.json").write_text(json.dumps(facts))
    with service(where, engine) as url:
        first_token(url, names[0])
        listed = [listing(url) for _ in range(rounds + 1)][1:]
        asked = [first_token(url, f"copy{number:03d}@1") for number in range(rounds)]
        runs = [finished_run(folder / f"new{number}", base, f"new{number}", number, rank=16) for number in range(rounds)]
        new = [first_token(url, where.publish(run).id) for run in runs]
    times = {"`/v1/models`": [seconds for seconds, _ in listed], "first token of a release": asked, "first token of one that was published just now": new}
    rows = [f"| {name} | {results.spread(seconds)} |" for name, seconds in times.items()]
    return [f"### A registry of {listed[0][1]} releases", "", "| | seconds |", "|---|---|", *rows]


@contextmanager
def bare_app(folder: Path, base: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """(address, models) of the app without us. Its adapters have names of this run's own: its cache on disk outlives it and knows nothing else."""
    from moto.server import ThreadedMotoServer

    from translora_ray.storage import RunStore

    store, port, mark = ThreadedMotoServer("127.0.0.1", 0, verbose=False), free_port(), uuid.uuid4().hex[:8]
    store.start()
    host, store_port = store.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{store_port}", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true"}
    bucket = RunStore("s3://bench?allow_bucket_creation=true")
    bucket.fs.create_dir(bucket.root)
    for number in range(count):
        for file in ("adapter_model.safetensors", "adapter_config.json"):  # the last one makes it visible
            bucket.write(f"adapters/{mark}-{number}/{file}", (folder / f"run{number}" / "adapter" / file).read_bytes())
    command = [sys.executable, str(Path(__file__).with_name("bare_llm.py")), base, "s3://bench/adapters", str(port)]
    process = subprocess.Popen(command, cwd=results.ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(results.ROOT)})
    try:
        assert process.stdout
        if not any(line.startswith("ready") for line in process.stdout):
            raise SystemExit("the bare app did not start")
        yield f"http://127.0.0.1:{port}", [f"base:{mark}-{number}" for number in range(count)]
    finally:
        process.terminate()
        process.wait(120)
        store.stop()


def bare(folder: Path, base: str, _: str, rounds: int, requests: int) -> list[str]:
    registry, names = published(folder, base, ADAPTERS)
    lines = []
    with service(registry, "vllm") as url, bare_app(folder, base, ADAPTERS) as (other, models):
        for title, clients, count in (("One client", 1, max(1, requests // 4)), (f"{CLIENTS} clients", CLIENTS, requests)):
            sides: Sides = {
                "ray.serve.llm": lambda turn, clients=clients, count=count: round_of(other, models, count, clients, turn + 100 * clients),  # type: ignore[misc]
                "translora serve": lambda turn, clients=clients, count=count: round_of(url, names, count, clients, turn + 100 * clients),  # type: ignore[misc]
            }
            measured = alternate(sides, rounds)
            added = [1000 * (ours.latency - theirs.latency) for theirs, ours in zip(*measured.values(), strict=True)]
            lines += [f"### {title}", "", *table(measured, "ray.serve.llm"), "", f"Added to a request: {median(added):.1f} ms (median of rounds).", ""]
    return [*lines, f"Wanted: at most 5 ms more for one client, at least 0.97 of the tokens for {CLIENTS}."]


PARTS = {"adapters": adapters, "cold": cold, "registry": registry, "bare": bare}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=128, help="a round")
    options.add_argument("--base", choices=[SOURCE, TARGET], default=SOURCE)
    options.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    chosen = options.parse_args()
    for name in chosen.parts or PARTS:
        about = f"{chosen.rounds} rounds (least to most), {chosen.requests} requests of {TOKENS} tokens each, {chosen.base}, engine {chosen.engine}."
        with tempfile.TemporaryDirectory() as scratch:
            found = PARTS[name](Path(scratch), resolve(chosen.base), chosen.engine, chosen.rounds, chosen.requests)
        text = "\n".join([f"Commit {results.commit()}; medians of {about}", "", *found])
        results.replace(f"serving-{name} {chosen.engine}", text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
