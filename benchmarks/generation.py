"""What the stream adds to vLLM, and what other prompts and samplings would give.

    make bench-generation      (or: python benchmarks/generation.py [stream] [library] [choices] --base REF)

Engines are loaded before the first round and each side is warmed up. Nothing else may run on the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from asking import BLOCK, VARIANTS, Prompts, asked, rows_of
from rounds import CPUS, SETTINGS, SOURCE, Side, alternate, example_kit, judged_kit, kept, packs_of, run_parts, table

from translora_ray.config import Cluster, Recipe, Selection, Synthesis
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.records import Pack
from translora_ray.stream.dedup import SeedFilter
from translora_ray.stream.discriminate import verdicts
from translora_ray.stream.requests import Desk


def written(packs: Sequence[Pack], texts: Iterable[tuple[str, bool]]) -> int:
    """Candidates that are kept of what an engine wrote: (text, ended by itself) for each request in turn."""
    for candidate, (text, ended) in zip([candidate for pack in packs for candidate in pack.candidates], texts, strict=True):
        candidate.input = text.strip()
        if not ended or not candidate.input:
            candidate.reason = "unfinished or empty"
    copies = SeedFilter(example_kit().seed_inputs, Selection().near_duplicate)
    return kept([copies.process(pack) for pack in packs])


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
        prompts = [request for pack in work for request in requests(pack, *VARIANTS[variant])]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in prompts], [SamplingParams(**drawn) for _, drawn in prompts], use_tqdm=False)
        seconds = time.perf_counter() - began
        count = written(work, [(output.outputs[0].text, output.outputs[0].finish_reason == "stop") for output in outputs])
        texts = [candidate.input for pack in work for candidate in pack.open()]
        pipe.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs), count, texts))
    llm.llm_engine.engine_core.shutdown()


def streamed(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with the transfer's own stream on a local Ray: source, gate, actor with one engine, packs back in the driver."""
    import ray

    from translora_ray.stream.pipeline import open_stream
    from translora_ray.stream.plan import Plan, Pool
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
        desk = Desk.remote([0], 0)  # type: ignore[attr-defined]
        arriving = open_stream([plan], desk)
        ray.get(desk.arrived.remote())
        next(arriving)  # the engine is loaded, and warm
        pipe.send("ready")
        while pipe.recv() is not None:
            began = time.perf_counter()
            ray.get([desk.arrived.remote() for _ in range(packs)])
            back = [next(arriving) for _ in range(packs)]
            pipe.send((time.perf_counter() - began, sum(sum(pack.tokens.values()) for pack in back), kept(back)))
        arriving.close()


def processor(base: str, packs: int, size: int, pipe: Any) -> None:
    """A process with `ray.data.llm`'s processor, its engine, batches and prompts those of the stream."""
    from translora_ray.engines.vllm import Log, engine_arguments

    Log()  # Ray's workers inherit the environment that engines of the stream have
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(address="local", num_cpus=CPUS + 4, include_dashboard=False, log_to_driver=False, logging_level="error")
    engine = engine_arguments(base, [], SETTINGS, 1)
    settings = vLLMEngineProcessorConfig(
        model_source=engine.pop("model"),
        engine_kwargs=engine,
        batch_size=size,
        max_concurrent_batches=packs,
        max_tasks_in_flight_per_actor=packs + 1,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        placement_group_config={"bundle_per_worker": {"CPU": CPUS}},
    )
    process = build_processor(
        settings,
        preprocess=lambda row: {"pack": row["pack"], "row": row["row"], "tokenized_prompt": row["ids"], "sampling_params": row["sampling"]},
        postprocess=lambda row: {name: row[name] for name in ("pack", "row", "generated_text", "num_generated_tokens")},
    )
    first = rows_of(asked(base), *packs_of(0, 1, size))
    longest = first["sampling"][0].as_py()["max_tokens"]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    desk = Desk.remote([0], 0)  # type: ignore[attr-defined]
    source = ray.data.read_datasource(Prompts(desk, size, base), override_num_blocks=1, concurrency=1, num_cpus=0)
    blocks = process(source).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)  # rows ahead would wait for the next round
    arriving = (row for block in blocks for row in block.to_pylist())
    ray.get(desk.arrived.remote())
    for _ in range(size):
        next(arriving)
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        began = time.perf_counter()
        ray.get([desk.arrived.remote() for _ in range(packs)])
        rows = sorted((next(arriving) for _ in range(packs * size)), key=lambda row: (row["pack"], row["row"]))
        seconds = time.perf_counter() - began
        count = written(packs_of(turn[1], packs, size), [(row["generated_text"], row["num_generated_tokens"] < longest) for row in rows])
        pipe.send((seconds, sum(row["num_generated_tokens"] for row in rows), count))
    ray.shutdown()


def stream(rounds: int, requests: int, base: str) -> list[str]:
    """What the stream adds: a bare engine with all prompts at once is the measure."""
    measured = compared({"vllm.LLM": bare, "the stream": streamed}, rounds, requests, base)
    return ["### The stream against a bare `vllm.LLM`", "", *measured, "", "Wanted of the stream: ratios of at least 0.95.", ""]


def library(rounds: int, requests: int, base: str) -> list[str]:
    """What Ray's own library for engines in datasets makes of the same prompts."""
    lines = ["### The stream against `ray.data.llm`", ""]
    return [
        *lines,
        *compared({"ray.data.llm": processor, "the stream": streamed}, rounds, requests, base),
        "",
        "Wanted of the stream: ratios of at least 1.",
        "",
    ]


def compared(kinds: dict[str, Any], rounds: int, requests: int, base: str) -> list[str]:
    size = requests // 2
    sides = {name: Side(work, base, 2, size) for name, work in kinds.items()}
    measured = alternate({name: side.round(next(iter(VARIANTS))) for name, side in sides.items()}, rounds)
    for side in sides.values():
        side.close()
    return [f"2 packs of {size} prompts a round, both waiting for the round's last one.", "", *table(measured, next(iter(kinds)))]


def choices(rounds: int, requests: int, base: str) -> list[str]:
    """What other prompts and samplings would give, judged by the example's discriminator."""
    engine = Side(bare, base, 2, requests // 2)
    measured = alternate({name: engine.round(name) for name in VARIANTS}, rounds)
    engine.close()
    lines = table(measured, next(iter(VARIANTS)))
    lines[0], lines[1] = f"{lines[0]} accepted of those kept | accepted/s |", f"{lines[1]}---|---|"
    kit = judged_kit()
    judge = TransformersEngine(SOURCE)
    for line, found in enumerate(measured.values(), 2):
        texts = sorted({text for one in found for text in one[3]})
        share = sum(verdict > 0 for verdict in verdicts(judge, kit.task.name, texts, kit.discriminator_adapter)) / len(texts)
        speed = statistics.median(one[2] / one[0] for one in found)
        lines[line] += f" {share:.0%} of {len(texts)} | {share * speed:.2f} |"
    judge.close()
    return ["### Prompts and sampling", "", "Bare `vllm.LLM`; the discriminator of a kit prepared on the example's rows judges.", "", *lines, ""]


if __name__ == "__main__":
    run_parts(__doc__, {"stream": stream, "library": library, "choices": choices})
