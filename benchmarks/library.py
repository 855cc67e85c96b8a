"""The stream against `ray.data.llm`, Ray's own library for engines in datasets: the same prompts, engine settings, batches and concurrency.

    make bench-library         (or: python benchmarks/library.py --base REF)

A round is one dataset, with an engine of its own, from beginning to end. What counts is the time from its first batch that comes back to its last,
in which nothing is loaded. Nothing else may run on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from asking import PLAIN, VARIANTS, asked, writing, written
from rounds import CPUS, SETTINGS, Round, Side, alternate, kept, packs_of, run_parts, table

from translora_ray.stream.requests import Desk

AT_ONCE, SIZE = 2, 64


def streamed(base: str, packs: int, turn: int, pipe: Any) -> None:
    """A process with the transfer's own stream on a local Ray."""

    from translora_ray.placement import ray_session
    from translora_ray.stream.pipeline import open_stream

    plan = writing(base, AT_ONCE, SIZE)
    with ray_session(plan.cluster):
        desk = Desk.remote([1 + turn * packs], packs)  # type: ignore[attr-defined]
        arriving = open_stream([plan], desk)
        next(arriving)
        began = time.perf_counter()
        back = [next(arriving) for _ in range(packs - 1)]
        seconds = time.perf_counter() - began
        arriving.close()
    pipe.send((seconds, sum(sum(pack.tokens.values()) for pack in back), kept(back)))


def processed(base: str, packs: int, turn: int, pipe: Any) -> None:
    """A process with a processor of `ray.data.llm` on a local Ray."""
    from translora_ray.engines.vllm import Log, engine_arguments

    Log()  # Ray's workers inherit the environment that engines of the stream have
    import pyarrow as pa
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    work, requests = packs_of(turn, packs, SIZE), asked(base)
    made = [requests(pack, VARIANTS[PLAIN]) for pack in work]
    blocks = [pa.Table.from_pylist([{"pack": number, "ids": ids, "sampling": drawn} for ids, drawn in rows]) for number, rows in enumerate(made)]
    ray.init(address="local", num_cpus=CPUS + 4, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    engine = engine_arguments(base, [], SETTINGS, 1)
    settings = vLLMEngineProcessorConfig(
        model_source=engine.pop("model"),
        engine_kwargs=engine,
        batch_size=SIZE,
        max_concurrent_batches=AT_ONCE,
        max_tasks_in_flight_per_actor=AT_ONCE + 1,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        placement_group_config={"bundle_per_worker": {"CPU": CPUS}},
    )
    process = build_processor(
        settings,
        preprocess=lambda row: {"pack": row["pack"], "tokenized_prompt": row["ids"], "sampling_params": row["sampling"]},
        postprocess=lambda row: {name: row[name] for name in ("pack", "generated_text", "num_generated_tokens")},
    )
    arriving = iter(process(ray.data.from_arrow(blocks)).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    first = next(arriving).to_pylist()
    began = time.perf_counter()
    rows = [row for block in arriving for row in block.to_pylist()]
    seconds = time.perf_counter() - began
    ray.shutdown()
    if len(first) != SIZE or len(rows) != SIZE * (packs - 1):
        raise RuntimeError(f"{len(first)} and {len(rows)} rows came back")
    longest = made[0][0][1]["max_tokens"]
    back = [work[number] for number in dict.fromkeys(row["pack"] for row in rows)]  # whole packs, in the order of their coming
    count = written(back, [(row["generated_text"], row["num_generated_tokens"] < longest) for row in rows])
    pipe.send((seconds, sum(row["num_generated_tokens"] for row in rows), count))


def library(rounds: int, requests: int, base: str) -> list[str]:
    def once(work: Callable[..., None]) -> Round:
        def run(turn: int) -> tuple[float, int, int]:
            side = Side(work, base, requests // SIZE, turn)
            side.process.join()
            found: tuple[float, int, int] = side.ready
            return found

        return run

    measured = alternate({"ray.data.llm": once(processed), "the stream": once(streamed)}, rounds)
    lines = ["### The stream against `ray.data.llm`", "", f"Packs of {SIZE} prompts, {AT_ONCE} at once. Wanted of the stream: ratios of at least 1.", ""]
    return [*lines, *table(measured, "ray.data.llm"), ""]


if __name__ == "__main__":
    run_parts(__doc__, {"library": library})
