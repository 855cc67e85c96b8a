"""What one engine saves that serves two roles, and what transfers gain that share one.

    make bench-sharing         (or: python benchmarks/sharing.py [adapters] [transfers] --base REF)

Engines are loaded before the first round and each side is warmed up. Nothing else may run on the machine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import torch
from demo import memory, tree
from rounds import SETTINGS, Round, alternate, example_kit, packs_of, run_parts, table

from translora_ray import adapting, models
from translora_ray.config import Adapter, Synthesis
from translora_ray.engines.base import AdapterRef, Engine
from translora_ray.kit import Kit
from translora_ray.records import Pack, derive_seed, read_rows, request_pack
from translora_ray.stream.discriminate import Discriminator
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.stream.teach import Teacher


def random_adapter(model: Any, base: str, folder: Path, seed: int) -> AdapterRef:
    """An adapter of the usual size that changes something: what it has learnt costs nothing."""
    adapted = adapting.create(model, Adapter(type="lora", rank=16, alpha=32.0, dropout=0.0, modules="all-linear"), seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.002)
    adapting.save(adapted, folder, base)
    adapted.unload()
    return AdapterRef(folder.name, str(folder))


def made_adapters(base: str, folder: Path, count: int) -> list[AdapterRef]:
    return [random_adapter(models.load_base(base, "cpu"), base, folder / f"adapter{number}", number) for number in range(count)]


def judge_and_answer(judging: Engine, answering: Engine, judge: AdapterRef, teacher: AdapterRef, kit: Kit, packs: Sequence[Pack], at_once: int) -> Round:
    """Packs of ready prompts through discriminator and teacher; a discriminator on one engine works while the teacher on the other does."""
    discriminator = Discriminator(judging, kit.task.name, judge, float("-inf"))
    answers = Teacher(answering, kit.task, teacher)

    def run(turn: int) -> tuple[float, int, int]:
        fresh = [Pack(pack.number, [type(row)(row.index, row.seed, f"{row.input} {turn}") for row in pack.candidates]) for pack in packs]
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            done = list(threads.map(lambda pack: answers.process(discriminator.process(pack)), fresh))
        return time.perf_counter() - began, sum(pack.tokens["teacher"] for pack in done), sum(len(pack.candidates) for pack in done)

    return run


def two_adapters(rounds: int, requests: int, base: str) -> list[str]:
    from translora_ray.engines.vllm import VllmEngine

    kit, size = example_kit(), requests // 4
    rows = read_rows(kit.task.train)
    packs = packs_of(0, 4, size)
    for pack in packs:
        for candidate in pack.candidates:
            candidate.input = rows[candidate.index % len(rows)].input
    with tempfile.TemporaryDirectory() as scratch:
        judge, teacher = made_adapters(base, Path(scratch), 2)
        before = memory(tree(multiprocessing.current_process().pid or 0))
        one = VllmEngine(base, [judge, teacher], SETTINGS)
        shared = memory(tree(multiprocessing.current_process().pid or 0)) - before
        first, second = VllmEngine(base, [judge], SETTINGS), VllmEngine(base, [teacher], SETTINGS)
        separate = memory(tree(multiprocessing.current_process().pid or 0)) - before - shared
        sides = {
            "one engine": judge_and_answer(one, one, judge, teacher, kit, packs, 4),
            "two engines": judge_and_answer(first, second, judge, teacher, kit, packs, 4),
        }
        measured = alternate(sides, rounds)
        for engine in (one, first, second):
            engine.close()
    seconds = {name: results.spread([found[0] for found in found_rounds], 1) for name, found_rounds in measured.items()}
    lines = ["### Discriminator and teacher: one engine with two adapters, or an engine each", "", "All engines are there in all rounds.", ""]
    lines += ["| | memory, GiB | seconds a round |", "|---|---|---|"]
    lines += [f"| {name} | {size / 2**30:.1f} | {seconds[name]} |" for name, size in (("one engine", shared), ("two engines", separate))]
    return [*lines, ""]


def eight_transfers(rounds: int, requests: int, base: str) -> list[str]:
    """Eight transfers with two adapters each on one engine: a thread each, or one after the other, `Vllm.packs` packs at a time."""
    from translora_ray.engines.vllm import VllmEngine

    kit, count = example_kit(), 8
    size = max(4, requests // count // 2)
    with tempfile.TemporaryDirectory() as scratch:
        made = made_adapters(base, Path(scratch), 2 * count)
        engine = VllmEngine(base, made, SETTINGS.model_copy(update={"adapters": 2 * count}))
        synthesis = Synthesis(pack_size=size)
        chains = []
        for judge, teacher in zip(made[::2], made[1::2], strict=True):
            writer = Synthesizer(engine, synthesis, kit.seed_inputs)
            chains.append([writer, Discriminator(engine, kit.task.name, judge, float("-inf")), Teacher(engine, kit.task, teacher)])
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

        measured = alternate({"in turn": run("in turn", SETTINGS.packs), "interleaved": run("interleaved", SETTINGS.packs * count)}, rounds)
        engine.close()
    pairs = [(set(answered["in turn"][turn]), set(answered["interleaved"][turn])) for turn in answered["in turn"]]
    same = [len(ours & theirs) / max(1, len(ours)) for ours, theirs in pairs]
    lines = ["### Eight transfers on one engine: interleaved, or in turn", ""]
    lines += [f"{count} transfers with two adapters each, two packs of {size} a round and transfer; wanted: 1.5 times the throughput.", ""]
    lines += [*table(measured, "in turn"), "", f"Rows (prompt and answer) that are the same both ways: {statistics.mean(same):.1%}.", ""]
    return lines


if __name__ == "__main__":
    run_parts(__doc__, {"adapters": two_adapters, "transfers": eight_transfers})
