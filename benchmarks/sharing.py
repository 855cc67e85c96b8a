"""What one engine saves that serves two roles, and what transfers gain that share one.

    make bench-sharing         (or: python benchmarks/sharing.py [adapters] [transfers] --base REF)

Engines are loaded before the first round and each side is warmed up. Nothing else may run on the machine.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import torch
from demo import memory, tree
from rounds import CPUS, LORA, SETTINGS, Round, Side, alternate, example_kit, packs_of, run_parts, table

from translora_ray import adapting, models
from translora_ray.engines.base import AdapterRef
from translora_ray.recipe import Synthesis
from translora_ray.records import Pack, derive_seed, read_rows, request_pack
from translora_ray.stream.discriminate import Discriminator
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.stream.teach import Teacher


def random_adapter(model: Any, base: str, folder: Path, seed: int) -> AdapterRef:
    """An adapter of the usual size that changes something: what it has learnt costs nothing."""
    adapted = adapting.create(model, LORA, seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.002)
    adapting.save(adapted, folder, base)
    adapted.unload()
    return AdapterRef(folder.name, str(folder))


def made_adapters(base: str, folder: Path, count: int) -> list[AdapterRef]:
    return [random_adapter(models.load_base(base, "cpu"), base, folder / f"adapter{number}", number) for number in range(count)]


def judge_and_answer(base: str, size: int, engines: int, folder: str, pipe: Any) -> None:
    """A process with one engine for discriminator and teacher, or one for each with half of the cores; a round is four packs of ready prompts.

    Where there are two, the one judges a pack while the other answers another. First answer: the bytes that the engines brought.
    """
    os.environ["OMP_NUM_THREADS"] = str(CPUS // engines)
    from translora_ray.engines.vllm import VllmEngine

    kit = example_kit()
    rows = read_rows(kit.task.train)
    judge, teacher = (AdapterRef(name, f"{folder}/{name}") for name in ("adapter0", "adapter1"))
    before = memory(tree(os.getpid()))
    roles = [[judge, teacher]] if engines == 1 else [[judge], [teacher]]
    opened = [VllmEngine(base, used, SETTINGS) for used in roles]
    discriminator = Discriminator(opened[0], kit.task.name, judge, float("-inf"))
    answers = Teacher(opened[-1], kit.task, teacher)
    pipe.send(memory(tree(os.getpid())) - before)
    while (turn := pipe.recv()) is not None:
        packs = packs_of(turn[1], 4, size)
        for candidate in (candidate for pack in packs for candidate in pack.candidates):
            candidate.input = f"{rows[candidate.index % len(rows)].input} {candidate.index}"
        began = time.perf_counter()
        with ThreadPoolExecutor(4) as threads:
            done = list(threads.map(lambda pack: answers.process(discriminator.process(pack)), packs))
        pipe.send((time.perf_counter() - began, sum(pack.tokens["teacher"] for pack in done), sum(len(pack.candidates) for pack in done)))
    for engine in opened:
        engine.close()


def two_adapters(rounds: int, requests: int, base: str) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        made_adapters(base, Path(scratch), 2)
        kinds = {"one engine": 1, "two engines": 2}
        brought = {}
        for name, count in kinds.items():  # alone: what two processes share would be counted for the one that came first
            alone = Side(judge_and_answer, base, requests // 4, count, scratch)
            brought[name] = alone.ready
            alone.close()
        sides = {name: Side(judge_and_answer, base, requests // 4, count, scratch) for name, count in kinds.items()}
        measured = alternate({name: side.round(name) for name, side in sides.items()}, rounds)
        for side in sides.values():
            side.close()
    lines = ["### Discriminator and teacher: one engine with two adapters, or an engine each", ""]
    lines += ["| | memory that the engines bring, GiB | seconds a round | seconds, ratio |", "|---|---|---|---|"]
    for name in sides:
        seconds = [[found[0] for found in measured[which]] for which in (name, "two engines")]
        ratio = results.spread([a / b for a, b in zip(*seconds, strict=True)])
        lines.append(f"| {name} | {brought[name] / 2**30:.1f} | {results.spread(seconds[0], 1)} | {ratio} |")
    return [*lines, ""]


def eight_transfers(rounds: int, requests: int, base: str) -> list[str]:
    """Eight transfers with two adapters each on one engine: as many packs at once as a stream of all of them has, or of one after the other."""
    from translora_ray.engines.vllm import VllmEngine

    kit, count = example_kit(), 8
    lines = ["### Eight transfers on one engine: interleaved, or in turn", ""]
    lines += ["Each transfer has two adapters and two packs a round, which are on their way together; wanted: 1.5 times the throughput.", ""]
    with tempfile.TemporaryDirectory() as scratch:
        made = made_adapters(base, Path(scratch), 2 * count)
        engine = VllmEngine(base, made, SETTINGS.model_copy(update={"adapters": 2 * count}))
        size, chains = requests // count // 2, []
        for judge, teacher in zip(made[::2], made[1::2], strict=True):
            writer = Synthesizer(engine, Synthesis(pack_size=size).settled(()), kit.seeds)
            chains.append([writer, Discriminator(engine, kit.task.name, judge, float("-inf")), Teacher(engine, kit.task, teacher)])
        lines += [f"Packs of {size}:", "", *interleaved(engine, chains, size, rounds), ""]
        engine.close()
    return lines


def interleaved(engine: Any, chains: list[list[Any]], size: int, rounds: int) -> list[str]:
    answered: dict[str, dict[int, list[tuple[str, str | None]]]] = {"interleaved": {}, "in turn": {}}

    def through(work: tuple[list[Any], Pack]) -> Pack:
        stages, pack = work
        for stage in stages:
            pack = stage.process(pack)
        return pack

    def run(name: str, at_once: int) -> Round:
        def measure(turn: int) -> tuple[float, int, int]:
            work = [(chain, request_pack(derive_seed(turn, number), pack, size)) for number, chain in enumerate(chains) for pack in range(2)]
            asyncio.run_coroutine_threadsafe(engine.llm.reset_prefix_cache(), engine.loop).result()
            began = time.perf_counter()
            with ThreadPoolExecutor(at_once) as threads:
                done = list(threads.map(through, work))
            answered[name][turn] = [(row.input, row.target) for pack in done for row in pack.candidates if row.target is not None]
            return time.perf_counter() - began, sum(sum(pack.tokens.values()) for pack in done), len(answered[name][turn])

        return measure

    measured = alternate({"in turn": run("in turn", SETTINGS.packs), "interleaved": run("interleaved", SETTINGS.at_once(len(chains), size))}, rounds)
    pairs = [(set(answered["in turn"][turn]), set(answered["interleaved"][turn])) for turn in answered["in turn"]]
    same = [len(ours & theirs) / max(1, len(ours)) for ours, theirs in pairs]
    return [*table(measured, "in turn"), "", f"Rows (prompt and answer) that are the same both ways: {statistics.mean(same):.1%}."]


if __name__ == "__main__":
    run_parts(__doc__, {"adapters": two_adapters, "transfers": eight_transfers})
