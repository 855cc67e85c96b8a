"""The stream itself, with stages that only wait: packs of one actor overlap, and a pool grows while packs wait."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from translora_ray import kit
from translora_ray.config import Cluster, Recipe, Synthesis
from translora_ray.records import pack_to_table, packs_from_table
from translora_ray.stream import pipeline
from translora_ray.stream.plan import Plan
from translora_ray.stream.requests import Desk
from translora_ray.workflow import ray_session

pytestmark = pytest.mark.ray
PACKS = 40


class Waiting:
    """A stage actor without an engine: a pack takes half a second, and is told who computed it and beside how many others."""

    def __init__(self, _plan: Plan, _pool: Any, _desk: Any) -> None:
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
    monkeypatch.setattr(Plan, "packs_at_once", lambda self, pool: 2)
    cluster = Cluster(engines=(1, 2))
    plan = Plan(kit.load(tiny_kit), tiny_gemma, Recipe(synthesis=Synthesis(pack_size=2)), cluster, "transformers", 0.5, 0.0)
    with ray_session(cluster):
        desk = Desk.remote(0, 6)  # type: ignore[attr-defined]  # what run_stream lets through for two actors
        packs = pipeline.open_stream(plan, desk, 0)
        found = []
        for pack in packs:
            found.append(pack)
            if len(found) == PACKS:
                break
            ray.get(desk.arrived.remote())
        packs.close()
    assert sorted({pack.number for pack in found}) == sorted(pack.number for pack in found)
    assert max(pack.tokens["at once"] for pack in found) == 2
    assert len({pack.tokens["actor"] for pack in found}) == 2
