"""Imports run one way, and Ray stays in its few places (docs/architecture.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "translora_ray"
LAYERS = [
    {"errors"},
    {"records"},
    {"config"},
    {"reading", "evaluation.metrics"},
    {"prompts", "storage", "progress", "references"},
    {"models", "adapters"},
    {"adapting"},
    {"engines.base"},
    {"engines.transformers", "engines.vllm", "engines.vllm_worker"},
    {"engines.select"},
    {"training.loop"},
    {"training.task"},
    {"evaluation.statistics", "stream.synthesize", "stream.dedup", "stream.discriminate", "stream.teach"},
    {"kit"},
    {"stream.plan"},
    {"stream.choose", "evaluation.gate"},
    {"ledger", "releases"},
    {"registry"},
    {"releasing"},
    {"stream.requests", "stream.collect", "evaluation.distance", "placement"},
    {"evaluation.arms"},
    {"evaluation.compare"},
    {"stream.pipeline", "training.trainer"},
    {"evaluation.report", "gating"},
    {"workflow", "inspection"},
    {"cli"},
]
RAY = {"stream.pipeline", "stream.requests", "training.trainer", "placement", "gating", "workflow"}
VLLM = {"engines.vllm", "engines.vllm_worker"}


def modules() -> dict[str, set[str]]:
    """Module name to all the modules that it imports, at its head or inside functions."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{name}: a relative import is not seen here"
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = imported
    return found


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set().union(*LAYERS)


def test_imports_run_one_way() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {other}"
        for name, imported in modules().items()
        for other in level
        if f"translora_ray.{other}" in imported and level[other] >= level[name]
    ]
    assert not wrong


def test_ray_and_vllm_are_imported_only_where_they_may_be() -> None:
    found = modules()
    assert {name for name, imported in found.items() if any(module.split(".")[0] == "ray" for module in imported)} == RAY
    assert {name for name, imported in found.items() if any(module.split(".")[0] == "vllm" for module in imported)} == VLLM
