"""The stream itself: packs of one actor overlap, a pool grows while packs wait, transfers share engines."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from tests.unit.test_kit import put
from translora_ray import kit
from translora_ray.cluster import Cluster
from translora_ray.errors import RunFailed, Stopped
from translora_ray.placement import ray_session
from translora_ray.progress import Display
from translora_ray.recipe import Gate, Recipe, Selection, Synthesis
from translora_ray.records import pack_to_table, packs_from_table
from translora_ray.storage import RunStore
from translora_ray.stream import pipeline
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import Desk

pytestmark = pytest.mark.ray
PACKS = 40


class Waiting:
    """A stage actor without an engine: a pack takes half a second, and is told who computed it and beside how many others."""

    def __init__(self, _plans: list[Plan], _pool: Any, _desk: Any) -> None:
        self.busy, self.lock = 0, threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        (pack,) = packs_from_table(table)
        with self.lock:
            self.busy += 1
        time.sleep(0.25)
        pack.tokens = {"at once": self.busy, "actor": os.getpid()}
        time.sleep(0.25)
        with self.lock:
            self.busy -= 1
        return pack_to_table(pack)


def test_packs_of_an_actor_overlap_and_the_pool_grows(tiny_kit: Path, tiny_gemma: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "StageActor", Waiting)
    monkeypatch.setattr(Plan, "packs_at_once", lambda self, pool, transfers: 2)
    cluster = Cluster(engines=(1, 2))
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(synthesis=Synthesis(pack_size=2)), cluster, "transformers", 0.5, 0.0)
    with ray_session(cluster):
        desk = Desk.remote([0], 6)  # type: ignore[attr-defined]  # what run_stream lets through for two actors
        packs = pipeline.open_stream([plan], desk)
        found = []
        for pack in packs:
            found.append(pack)
            if len(found) == PACKS:
                break
            ray.get(desk.arrived.remote(0, pack.number))
        packs.close()
        with pytest.raises(RunFailed, match=r"did not start within 2 seconds: .* or lower cluster\.engines"):
            next(pipeline.open_stream([replace(plan, engine_cpus=999.0, cluster=Cluster(start_timeout_s=2))], desk))
    assert sorted({pack.number for pack in found}) == sorted(pack.number for pack in found)
    assert max(pack.tokens["at once"] for pack in found) == 2
    assert len({pack.tokens["actor"] for pack in found}) == 2


class Away:
    """A stage actor without an engine; the one that gets pack 1 first does not come back."""

    def __init__(self, plans: list[Plan], _pool: Any, _desk: Any) -> None:
        self.mark = Path(plans[0].target)

    def __call__(self, table: pa.Table) -> pa.Table:
        (pack,) = packs_from_table(table)
        if pack.number == 1 and not self.mark.exists():
            self.mark.touch()
            time.sleep(1000)
        return table


def test_packs_of_an_actor_that_does_not_come_back_go_to_another(tiny_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "StageActor", Away)
    cluster = Cluster(engines=(2, 2))
    plan = Plan(kit.load(tiny_kit), str(tmp_path / "mark"), Recipe(synthesis=Synthesis(pack_size=2)), cluster, "transformers", 0.5, 0.0)
    with ray_session(cluster):
        desk = Desk.remote([0], 4)  # type: ignore[attr-defined]  # what run_stream lets through for two actors
        packs, found = pipeline.open_stream([plan], desk), set()
        for pack in packs:
            found.add(pack.number)
            if found >= {*range(PACKS)} or len(found) == 5 * PACKS:
                break
            ray.get(desk.arrived.remote(0, pack.number))
        packs.close()
    assert (tmp_path / "mark").exists()
    assert found >= {*range(PACKS)}


def test_transfers_that_share_engines_accept_what_each_would_alone(s3: str, tiny_kit: Path, tiny_gemma: str, tmp_path: Path) -> None:
    """One of the kits lies on an object store."""
    there = put(tiny_kit, RunStore(f"{s3}/kit")).uri
    selection = Selection(method="discriminator", threshold=-100, as_asked=False, near_duplicate=1.0, max_candidates=200)
    synthesis = Synthesis(pack_size=16, temperature=1.0, min_p=0.0, max_tokens=60)
    cluster = Cluster(commit_seconds=0)
    plans = []
    for seed, quota, place in ((0, 8, tiny_kit), (1, 60, tiny_kit), (2, 12, there)):
        recipe = Recipe(seed=seed, gate=Gate(held_out=0), synthesis=synthesis, selection=selection.model_copy(update={"quota": quota}))
        plans.append(Plan(kit.load(place), tiny_gemma, recipe, cluster, "transformers", 1.0, 0.0))
    stores = {name: [RunStore(str(tmp_path / f"{name}{plan.recipe.seed}")) for plan in plans] for name in ("together", "alone")}
    with ray_session(cluster), Display() as display:
        totals = pipeline.run_stream(plans, stores["together"], display)
        stop = threading.Event()
        stop.set()
        with pytest.raises(Stopped):  # and what is under way is committed, long before that is due
            pipeline.run_stream([replace(plans[1], cluster=Cluster(commit_seconds=1000))], stores["alone"][1:2], display, stop=stop)
        (drained,) = stores["alone"][1].names("shards")
        for plan, store in zip(plans, stores["alone"], strict=True):
            pipeline.run_stream([plan], [store], display)
    assert drained in {"000000-000000.parquet", "000000-000001.parquet"}
    assert [total.accepted for total in totals] == [8, 60, 12]
    assert [list(total.loads.values()) for total in totals] == [[[plans[0].kit.base]]] * 3  # one engine, whatever the number of transfers
    for together, alone in zip(stores["together"], stores["alone"], strict=True):
        ours, theirs = (store.candidates() for store in (together, alone))
        assert ours == theirs
