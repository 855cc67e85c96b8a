"""What the stream adds to vLLM, what one engine for two adapters saves, and what transfers gain that share an engine.

    make bench-generation      (or: python benchmarks/generation.py [stream] [choices] [adapters] [transfers] --base REF)

Every comparison alternates its sides, round by round, in one run; engines are loaded before the first round and each side is warmed up.
Nothing else may run on the machine. The tables go to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import torch
from demo import memory, tree

from translora_ray import adapters, models
from translora_ray.config import Cluster, Recipe, Synthesis, Vllm, load_task
from translora_ray.engines.base import AdapterRef, Engine
from translora_ray.kit import Kit, choose_seeds
from translora_ray.prompts import prompt_ids, synthesis_prompt, synthesis_stops
from translora_ray.records import Pack, derive_seed, read_rows, request_pack
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.discriminate import Discriminator
from translora_ray.stream.synthesize import Synthesizer
from translora_ray.stream.teach import Teacher

SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
EXAMPLE = results.ROOT / "examples" / "support_routing"
SETTINGS = Vllm(cpu_cache_gib=1.0)
CPUS = 2
Round = Callable[[int], tuple[float, int, int]]
"""Round number -> (seconds, tokens, candidates that are kept)."""


def example_kit() -> Kit:
    task = load_task(EXAMPLE / "task.yaml")
    rows = read_rows(task.train)
    return Kit("", task, SOURCE, "", len(rows), choose_seeds(rows, task.seeds, 0), None, "")


def packs_of(turn: int, packs: int, size: int) -> list[Pack]:
    """Requests of a round, others in every round: those that a stream makes, whose pack 0 comes before the first round."""
    return [request_pack(Recipe().seed, 1 + turn * packs + number, size) for number in range(packs)]


def kept(packs: Sequence[Pack]) -> int:
    """Different candidates that no stage has rejected."""
    return len({candidate.input for pack in packs for candidate in pack.open()})


VARIANTS: dict[str, tuple[bool, dict[str, float]]] = {
    "as the stream does it": (True, {"temperature": Synthesis().temperature, "min_p": Synthesis().min_p}),
    "seeds shuffled for every request": (False, {"temperature": Synthesis().temperature, "min_p": Synthesis().min_p}),
    "temperature alone": (True, {"temperature": Synthesis().temperature}),
    "top_p 0.95": (True, {"temperature": Synthesis().temperature, "top_p": 0.95}),
}
"""How seeds are shown and tokens drawn: (one order of seeds for a pack, sampling)."""


def bare(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with `vllm.LLM`, which gets all prompts of a round in one call; answers (variant, round) that come through the pipe."""
    from translora_ray.engines.vllm import Log, engine_arguments

    Log()  # before vllm is imported: the environment that engines of the stream have
    from vllm import LLM, SamplingParams

    kit, stops = example_kit(), list(synthesis_stops(example_kit().seed_inputs))
    tokenizer = models.load_tokenizer(base)
    longest = 2 * max(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in kit.seed_inputs) + 8
    llm = LLM(**engine_arguments(base, [], SETTINGS, 1))
    copies = SeedFilter(kit.seed_inputs, 0.95)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        (alike, drawn), turn = VARIANTS[asked[0]], asked[1]
        work = packs_of(turn, packs, size)
        llm.reset_prefix_cache()
        began = time.perf_counter()
        prompts, sampling = [], []
        for pack in work:
            for candidate in pack.candidates:
                shown = synthesis_prompt(kit.seed_inputs, Synthesis().shots, (pack.candidates[0] if alike else candidate).seed)
                prompts.append({"prompt_token_ids": prompt_ids(tokenizer, shown)})
                sampling.append(SamplingParams(max_tokens=longest, stop=stops, seed=candidate.seed, **drawn))
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        flat = [candidate for pack in work for candidate in pack.candidates]
        for candidate, output in zip(flat, outputs, strict=True):
            candidate.input = output.outputs[0].text.strip()
            if output.outputs[0].finish_reason != "stop" or not candidate.input:
                candidate.reason = "unfinished or empty"
        pipe.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs), kept([copies.process(pack) for pack in work])))
    llm.llm_engine.engine_core.shutdown()


def streamed(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with the transfer's own stream on a local Ray: source, gate, actor with one engine, packs back in the driver."""
    import ray

    from translora_ray.stream.pipeline import Plan, Pool, open_stream
    from translora_ray.stream.requests import Desk
    from translora_ray.stream.synthesize import ROLE
    from translora_ray.workflow import ray_session

    class Writing(Plan):
        """A stream whose only role is the generator."""

        def pools(self) -> list[Pool]:
            return [Pool("vllm", base, (ROLE,))]

    recipe = Recipe(synthesis=Synthesis(pack_size=size))
    cluster = Cluster(vllm=SETTINGS.model_copy(update={"packs": packs}))
    plan = Writing(example_kit(), base, recipe, cluster, "vllm", CPUS, 0)
    with ray_session(plan.cluster):
        desk = Desk.remote(0, 0)
        arriving = open_stream(plan, desk, 0)
        ray.get(desk.arrived.remote())
        next(arriving)  # the engine is loaded, and warm
        pipe.send("ready")
        while pipe.recv() is not None:
            began = time.perf_counter()
            ray.get([desk.arrived.remote() for _ in range(packs)])
            back = [next(arriving) for _ in range(packs)]
            pipe.send((time.perf_counter() - began, sum(sum(pack.tokens.values()) for pack in back), kept(back)))
        arriving.close()


class Side:
    """One side of a comparison in a process of its own, idle while it is not its turn."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(*arguments, theirs))
        self.process.start()
        self.pipe.recv()

    def round(self, variant: str) -> Round:
        def run(turn: int) -> tuple[float, int, int]:
            self.pipe.send((variant, turn))
            answer: tuple[float, int, int] = self.pipe.recv()
            return answer

        return run

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def alternate(sides: dict[str, Round], rounds: int) -> dict[str, list[tuple[float, int, int]]]:
    """All sides in turn, round after round, the first of each round changing."""
    measured: dict[str, list[tuple[float, int, int]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            found = sides[name](turn)
            print(f"round {turn}: {name} {found[0]:.1f} s, {found[1] / found[0]:.0f} tokens/s", flush=True)
            if turn:  # round 0 warms up
                measured[name].append(found)
    return measured


def table(measured: dict[str, list[tuple[float, int, int]]], against: str) -> list[str]:
    """Tokens and kept candidates per second, and their ratio to the side `against` round by round."""
    lines = ["| | tokens/s | kept candidates/s | tokens/s, ratio | candidates/s, ratio |", "|---|---|---|---|---|"]
    for name, rounds in measured.items():
        tokens, candidates = ([found[part] / found[0] for found in rounds] for part in (1, 2))
        other = [[found[part] / found[0] for found in measured[against]] for part in (1, 2)]
        ratios = [results.spread([a / b for a, b in zip(ours, theirs, strict=True)]) for ours, theirs in zip((tokens, candidates), other, strict=True)]
        lines.append(f"| {name} | {results.spread(tokens, 0)} | {results.spread(candidates, 2)} | {' | '.join(ratios)} |")
    return lines


def stream(rounds: int, requests: int, base: str) -> list[str]:
    """What the stream adds: a bare engine with all prompts at once is the measure."""
    size = requests // 2
    engine, ours = Side(bare, base, 2, size), Side(streamed, base, 2, size)
    first = next(iter(VARIANTS))
    measured = alternate({"vllm.LLM": engine.round(first), "the stream": ours.round("")}, rounds)
    engine.close()
    ours.close()
    head = f"{base}, 2 packs of {size} prompts a round, both waiting for the round's last one; wanted of the stream: ratios of at least 0.95."
    return ["### The stream against a bare `vllm.LLM`", "", head, "", *table(measured, "vllm.LLM"), ""]


def choices(rounds: int, requests: int, base: str) -> list[str]:
    """What other prompts and samplings would give."""
    engine = Side(bare, base, 2, requests // 2)
    measured = alternate({name: engine.round(name) for name in VARIANTS}, rounds)
    engine.close()
    return ["### Prompts and sampling", "", f"{base}, bare `vllm.LLM`.", "", *table(measured, next(iter(VARIANTS))), ""]


def random_adapter(model: Any, base: str, folder: Path, seed: int) -> AdapterRef:
    """An adapter of the usual size that changes something: what it has learnt costs nothing."""
    adapted = adapters.create(model, 16, 32.0, 0.0, seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.002)
    adapters.save(adapted, folder, base)
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
    lines = ["### Discriminator and teacher: one engine with two adapters, or an engine each", "", f"{base}, {requests} prompts a round.", ""]
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
    lines += [f"{base}, {count} transfers with two adapters each, two packs of {size} a round and transfer; wanted: 1.5 times the throughput.", ""]
    lines += [*table(measured, "in turn"), "", f"Rows (prompt and answer) that are the same both ways: {statistics.mean(same):.1%}.", ""]
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"stream": stream, "choices": choices, "adapters": two_adapters, "transfers": eight_transfers}
    options.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=128, help="prompts a round")
    options.add_argument("--base", choices=[SOURCE, TARGET], default=SOURCE)
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(CPUS)
    for name in chosen.parts or parts:
        head = f"Commit {results.commit()}; medians of {chosen.rounds} rounds (least to most), {chosen.requests} prompts each."
        text = "\n".join([head, "", *parts[name](chosen.rounds, chosen.requests, chosen.base)])
        results.replace(f"generation-{name}", text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
