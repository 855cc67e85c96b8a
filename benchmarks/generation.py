"""What the stream adds to vLLM, and what other prompts and samplings would give.

    make bench-generation      (or: python benchmarks/generation.py [stream] [choices] --base REF)

Engines are loaded before the first round and each side is warmed up. Nothing else may run on the machine.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

from asking import PLAIN, VARIANTS, asked, writing, written
from rounds import SETTINGS, SOURCE, Side, alternate, judged_kit, kept, packs_of, run_parts, table

from translora_ray.engines.select import open_engine
from translora_ray.recipe import Selection
from translora_ray.records import Pack
from translora_ray.stream.discriminate import Discriminator
from translora_ray.stream.requests import Desk
from translora_ray.stream.teach import Teacher


def bare(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with `vllm.LLM`, which gets all prompts of a round in one call; answers (variant, round) that come through the pipe."""
    from translora_ray.engines.vllm import Log, engine_arguments

    Log()  # before vllm is imported: the environment that engines of the stream have
    from vllm import LLM, SamplingParams

    requests = asked(base)
    llm = LLM(**engine_arguments(base, [], SETTINGS, 1))
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        variant, number = turn
        work = packs_of(number, packs, size)
        llm.reset_prefix_cache()
        began = time.perf_counter()
        prompts = [request for pack in work for request in requests(pack, VARIANTS[variant])]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in prompts], [SamplingParams(**drawn) for _, drawn in prompts], use_tqdm=False)
        seconds = time.perf_counter() - began
        count = written(work, [(output.outputs[0].text, output.outputs[0].finish_reason == "stop") for output in outputs])
        candidates = [candidate for pack in work for candidate in pack.open()]
        cached = sum(output.num_cached_tokens for output in outputs) / sum(len(ids) for ids, _ in prompts)
        pipe.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs), count, candidates, cached))
    llm.llm_engine.engine_core.shutdown()


def streamed(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with the transfer's own stream on a local Ray: source, gate, actor with one engine, packs back in the driver."""
    import ray

    from translora_ray.placement import ray_session
    from translora_ray.stream.pipeline import open_stream

    plan = writing(base, packs, size)
    with ray_session(plan.cluster):
        desk = Desk.remote([1 - packs], packs)  # type: ignore[attr-defined]  # a round to warm up, then those of `packs_of`
        arriving = open_stream([plan], desk)
        back = [next(arriving) for _ in range(packs)]  # the engine is loaded, and warm
        pipe.send("ready")
        while pipe.recv() is not None:
            began = time.perf_counter()
            ray.get([desk.arrived.remote(0, pack.number) for pack in back])
            back = [next(arriving) for _ in range(packs)]
            pipe.send((time.perf_counter() - began, sum(sum(pack.tokens.values()) for pack in back), kept(back)))
        arriving.close()


def stream(rounds: int, requests: int, base: str) -> list[str]:
    """What the stream adds: a bare engine with all prompts at once is the measure."""
    measured = compared({"vllm.LLM": bare, "the stream": streamed}, rounds, requests, base)
    return ["### The stream against a bare `vllm.LLM`", "", *measured, "", "Wanted of the stream: ratios of at least 0.95.", ""]


def compared(kinds: dict[str, Any], rounds: int, requests: int, base: str) -> list[str]:
    size = requests // 2
    sides = {name: Side(work, base, 2, size) for name, work in kinds.items()}
    measured = alternate({name: side.round(PLAIN) for name, side in sides.items()}, rounds)
    for side in sides.values():
        side.close()
    return [f"2 packs of {size} prompts a round, both waiting for the round's last one.", "", *table(measured, next(iter(kinds)))]


def choices(rounds: int, requests: int, base: str) -> list[str]:
    """What other prompts and samplings would give, judged by the example's discriminator and teacher."""
    engine = Side(bare, base, 2, requests // 2)
    measured = alternate({name: engine.round(name) for name in VARIANTS}, rounds)
    engine.close()
    lines = table(measured, PLAIN)
    lines[0], lines[1] = (
        f"{lines[0]} read from the cache | passed by the discriminator | trusted | least of a label | trusted/s |",
        f"{lines[1]}---|---|---|---|---|",
    )
    kit = judged_kit()
    judge = open_engine("transformers", SOURCE, [kit.adapter, kit.discriminator_adapter])
    for line, (name, found) in enumerate(measured.items(), 2):
        pack = Pack(0, list({candidate.input: candidate for one in found for candidate in one[3]}.values()))
        count, asked_for = len(pack.candidates), VARIANTS[name].by_label
        passed = len(Discriminator(judge, kit.task.name, kit.discriminator_adapter, 0.0).process(pack).open())
        trusted = Teacher(judge, kit.task, kit.adapter, selection=Selection(as_asked=asked_for)).process(pack).open()
        least = min(Counter(candidate.target for candidate in trusted)[label] for label in kit.task.classes)
        speed = statistics.median(one[2] / one[0] for one in found) * len(trusted) / count
        cached = statistics.median(one[4] for one in found)
        lines[line] += f" {cached:.0%} | {passed / count:.0%} of {count} | {len(trusted) / count:.0%} | {least} | {speed:.2f} |"
    judge.close()
    about = (
        "Bare `vllm.LLM`; discriminator and teacher of a kit prepared on the example's rows. Trusted are candidates that the discriminator passes and whose"
        " answer is the label they were written for, or one of the task's where they continue a list. Candidates of all rounds together, each once."
    )
    return ["### Prompts and sampling", "", about, "", *lines, ""]


if __name__ == "__main__":
    run_parts(__doc__, {"stream": stream, "choices": choices})
