"""The stream on Ray Data: source -> generators -> source-model actors -> collector."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import GetTimeoutError

from translora_ray.errors import NoRoom, RunFailed, Stopped, TransLoraError, reason
from translora_ray.measures import StreamMeasures
from translora_ray.progress import Display, Phase
from translora_ray.records import Pack, packs_from_table
from translora_ray.storage import RunStore
from translora_ray.stream.actor import ENGINE_DEATHS, StageActor
from translora_ray.stream.collect import Collector, Totals
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import AT_ONCE, PackSource, beside_driver, open_desk

Ended = Callable[[int, Totals | TransLoraError], None]
"""Is told of a transfer, by its place in the stream, as it ends: its totals, or why it can not go on."""


def _raise(_transfer: int, outcome: Totals | TransLoraError) -> None:
    if isinstance(outcome, TransLoraError):
        raise outcome


def run_stream(
    plans: Sequence[Plan],
    stores: Sequence[RunStore],
    display: Display,
    ended: Ended = _raise,
    stop: threading.Event | None = None,
    shares: Sequence[float] = (),
) -> list[Totals]:
    """Stream until the quota of every transfer is full and committed; returns their totals. Goes on from the shards that are there.

    The transfers share engines, in proportion to `shares`, so their plans must agree in engine, bases and cluster (`Plan.pools`). Where `ended` does not
    raise, the others go on after a transfer that can not. After `stop` what is under way is still computed and committed, then `Stopped` is raised.
    """
    running, totals = _collectors(plans, stores, ended)
    if not running:
        return totals
    phases = [display.phase("examples" if len(plans) == 1 else f"examples, {store.uri.rpartition('/')[2]}") for store in stores]
    for phase, plan, total in zip(phases, plans, totals, strict=True):
        phase.update(total.accepted, plan.wanted, "loading engines")
    cap = sum((plans[0].packs_at_once(pool, min(len(plans), AT_ONCE)) + 1) * plans[0].cluster.engines[1] for pool in plans[0].pools())
    desk = open_desk([each.packs for each in totals], cap, shares)
    ray.get(desk.full.remote(*{*range(len(plans))} - running.keys()))
    measures = StreamMeasures(totals)
    began = time.monotonic()
    tokens = 0
    packs = open_stream(plans, desk)
    try:
        for pack in packs:
            tokens += sum(pack.tokens.values())
            transfer = pack.transfer
            if collector := running.get(transfer):  # else it was under way when the transfer ended
                outcome = _take(collector, pack, ray.get(desk.all_loads.remote()))
                measures.committed(transfer, collector.totals)
                _show(phases[transfer], collector, tokens / (time.monotonic() - began))
                if outcome:
                    del running[transfer]  # and its prompts
                    ray.get(desk.full.remote(transfer))
                    ended(transfer, outcome)
            if not running:
                break  # what is under way is not needed
            if stop and stop.is_set():
                ray.get(desk.full.remote(*running))
            ray.get(desk.arrived.remote(transfer, pack.number))
        if running:  # after a stop alone
            _commit(running, ray.get(desk.all_loads.remote()), ended)
            for transfer, collector in running.items():
                measures.committed(transfer, collector.totals)
    finally:
        packs.close()
        ray.kill(desk)
    if running:
        raise Stopped("Stopped: what was under way is committed, and the same command goes on from there.")
    return totals


def _collectors(plans: Sequence[Plan], stores: Sequence[RunStore], ended: Ended) -> tuple[dict[int, Collector], list[Totals]]:
    """The collectors of the transfers that have something to do, by their places, and the totals of all of them."""
    running, totals = {}, []
    for transfer, (plan, store) in enumerate(zip(plans, stores, strict=True)):
        try:
            collector = Collector(plan, store)
        except Exception as failure:
            totals.append(Totals())
            ended(transfer, failure if isinstance(failure, TransLoraError) else RunFailed(f"{store.uri} can not be read: {reason(failure)}"))
            continue
        totals.append(collector.totals)
        if collector.full:
            ended(transfer, collector.totals)
        else:
            running[transfer] = collector
    return running, totals


def _take(collector: Collector, pack: Pack, loads: list[str]) -> Totals | TransLoraError | None:
    """Give the pack to its collector; how its transfer ended, if it did."""
    if pack.failure:
        return RunFailed(pack.failure)
    return _written(collector, partial(collector.take, pack, loads)) or (collector.totals if collector.full else None)


def _commit(running: dict[int, Collector], loads: list[str], ended: Ended) -> None:
    """Commit what the collectors have decided; those that can not be written are no longer among them."""
    for transfer, collector in list(running.items()):
        if failure := _written(collector, partial(collector.commit, loads)):
            del running[transfer]
            ended(transfer, failure)


def _written(collector: Collector, work: Callable[[], None]) -> TransLoraError | None:
    """Do what may write to the collector's run; why it could not, which is that transfer's own, but for a disk that is full."""
    try:
        work()
    except NoRoom:
        raise
    except TransLoraError as failure:
        return failure
    except OSError as failure:
        return RunFailed(f"{collector.store.uri} can not be written ({reason(failure)}): the same command goes on from what is committed.")
    return None


def open_stream(plans: Sequence[Plan], desk: Any) -> Generator[Pack]:
    """Finished packs in the order of their completion, as many as the desk lets through."""
    plan = plans[0]
    pools = plan.pools()
    if any((other.pools(), other.cluster) != (pools, plan.cluster) for other in plans):
        raise ValueError("transfers that share a stream must agree in engine, bases and cluster")
    source = PackSource(desk, [(one.recipe.seed, one.recipe.synthesis.pack_size) for one in plans])
    packs = ray.data.read_datasource(source, override_num_blocks=1, **beside_driver())
    context = packs.context  # of this dataset alone: trainings beside it read with the usual one
    context.target_max_block_size = 1  # a pack leaves the source at once; with the default it waits for the source's end
    context.autoscaling_config.actor_pool_util_upscaling_threshold = (
        1.01  # a pool grows when packs wait; the default asks for more than (at_once + 1) / at_once
    )
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.wait_for_min_actors_s = plan.cluster.start_timeout_s
    low, high = plan.cluster.engines
    for pool in pools:
        at_once = plan.packs_at_once(pool, min(len(plans), AT_ONCE))
        packs = packs.map_batches(
            StageActor,
            fn_constructor_args=(plans, pool, desk),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=low,
                max_size=high,
                max_tasks_in_flight_per_actor=at_once + 1,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,  # else Ray Data overlaps the calls' inputs and outputs alone
            ),
            num_cpus=plan.engine_cpus,
            num_gpus=plan.engine_gpus or None,
            max_restarts=ENGINE_DEATHS,
            max_task_retries=-1,  # until Ray sees that a node is lost, each try fails at once; `max_restarts` is the limit
        )
    try:
        for table in packs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from packs_from_table(table)
    except GetTimeoutError:
        raise RunFailed(
            f"The engines did not start within {plan.cluster.start_timeout_s} seconds: where others hold the cluster, give the same command again when they "
            "are done, or lower cluster.engines; where loading takes longer, raise cluster.start_timeout_s."
        ) from None


def _show(phase: Phase, collector: Collector, rate: float) -> None:
    looked_at = max(1, collector.next * collector.plan.recipe.synthesis.pack_size)
    phase.update(min(collector.accepted, collector.plan.wanted), collector.plan.wanted, f"{collector.accepted / looked_at:.0%} accepted, {rate:.0f} tokens/s")
