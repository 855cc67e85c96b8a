"""What lies at a path: a kit, an adapter, a run, a registry or a model, and whether it is sound."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from translora_ray import adapters, kit, models, releasing
from translora_ray.errors import UsageError
from translora_ray.evaluation.report import show_facts
from translora_ray.registry import RELEASES, Registry
from translora_ray.releases import parse_id
from translora_ray.storage import ADAPTER, IDENTITY, MANIFEST, RunStore, reaching


def inspect(paths: list[str]) -> None:
    """Show one thing, or two models and whether a transfer between them can work. Raises `UsageError` for what is not sound."""
    if len(paths) > 2:
        raise UsageError("inspect takes one path, or two models to check as a pair.")
    if len(paths) == 2:
        _pair(*paths)
        return
    if (registry := Registry(paths[0])).exists():
        releasing.show(registry)
        return
    where, _, name = paths[0].rstrip("/").rpartition(f"/{RELEASES}/")
    if where and parse_id(name):
        title, facts = releasing.described(Registry(where), name)
        show_facts(title, facts)
        return
    title, facts = _facts(paths[0])
    show_facts(title, facts)


def _facts(path: str) -> tuple[str, dict[str, Any]]:
    folder = Path(path)
    if _holds(path, kit.FACTS):
        loaded = kit.load(path)
        facts = {"task": loaded.task.name, "base": loaded.base, "rows": loaded.rows, "seeds": len(loaded.seeds)}
        return "transfer kit, sound", facts | {"discriminator": loaded.discriminator, "generator adapter": loaded.generator, "digest": loaded.digest}
    if (folder / adapters.CONFIG).exists():
        info = asdict(adapters.inspect(folder))
        return "adapter, sound", info | {"shapes": f"{len(info['shapes'])} modules"}
    if "://" in path or (folder / IDENTITY).exists():
        return _run(RunStore(path))
    return "model", asdict(models.describe(path))


def _holds(path: str, name: str) -> bool:
    """Whether a file of that name lies in a directory or at a URI; of what is neither, none does."""
    if "://" not in path:
        return (Path(path) / name).exists()
    store = RunStore(path)
    with reaching(store.uri):
        return store.exists(name)


def _run(store: RunStore) -> tuple[str, dict[str, Any]]:
    if not store.exists(IDENTITY):
        raise UsageError(f"There is no kit or run at {store.uri}: correct the address.")
    identity = store.read_json(IDENTITY)
    accepted = sum(candidate.accepted for candidate in store.candidates())
    facts = {"recipe": identity["recipe_hash"], "accepted": accepted, "finished": store.exists(MANIFEST)}
    if store.exists(MANIFEST):
        manifest = store.read_json(MANIFEST)
        with tempfile.TemporaryDirectory() as scratch:
            adapters.require(store.fetch_folder(ADAPTER, Path(scratch)), manifest["adapter_digest"], store.uri)
        facts |= {
            "source": manifest["source_base"],
            "target": manifest["target_base"],
            "adapters before it": manifest["lineage"],
            "counts": manifest["counts"],
            "seconds": manifest["seconds"],
        }
    return "run, sound", facts


def _pair(source_reference: str, target_reference: str) -> None:
    source, target = models.describe(source_reference), models.describe(target_reference)
    for role, info in (("source", source), ("target", target)):
        show_facts(role, asdict(info))
    verdicts = {format: models.pair_obstacle(source, target, format) or "can work" for format in ("text", "chat")}
    show_facts("transfer of a task with", {f"format: {format}": verdict for format, verdict in verdicts.items()})
