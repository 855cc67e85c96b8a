"""Imports run one way, and Ray stays in its few places (docs/architecture.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "translora_ray"
LAYERS = [
    {"errors", "background"},
    {"records"},
    {"config", "disk"},
    {"recipe"},
    {"cluster"},
    {"answers", "reading", "evaluation.metrics"},
    {"prompts", "storage", "progress", "references"},
    {"models", "adapters", "token_weights"},
    {"adapting"},
    {"engines.base"},
    {"engines.transformers", "engines.vllm", "engines.vllm_worker"},
    {"engines.select"},
    {"training.loop", "training.checkpoints"},
    {"training.task"},
    {"training.private"},
    {"evaluation.statistics", "evaluation.plots", "stream.synthesize", "stream.dedup", "stream.discriminate", "stream.teach"},
    {"stream.fill"},
    {"kit", "evaluation.markup"},
    {"stream.plan", "preparing", "identity"},
    {"stream.choose", "evaluation.gate"},
    {"ledger", "releases"},
    {"registry"},
    {"releasing"},
    {"stream.requests", "stream.collect", "placement"},
    {"measures", "stream.actor"},
    {"evaluation.arms", "evaluation.audit", "evaluation.distance"},
    {"evaluation.report"},
    {"evaluation.page"},
    {"evaluation.compare"},
    {"stream.pipeline", "training.trainer"},
    {"gating", "training.alone"},
    {"training.again"},
    {"finishing"},
    {"workflow", "inspection", "fleet.manifest", "fleet.lease"},
    {"fleet.groups", "fleet.state"},
    {"fleet.page", "fleet.status", "fleet.forecast", "fleet.training"},
    {"fleet.driver"},
    {"serving.auth", "serving.protocol", "serving.measures", "serving.index", "serving.trials"},
    {"serving.loading", "serving.batches", "serving.prompting", "serving.reading", "serving.routing", "serving.health"},
    {"serving.local", "serving.llm", "serving.gateway"},
    {"serving.app"},
    {"serving.run"},
    {"options"},
    {"cli"},
]
RAY = {"measures", "stream.actor", "stream.pipeline", "stream.requests", "training.trainer", "placement", "workflow", "fleet.driver", "fleet.training"}
RAY |= {"training.again"} | {f"serving.{name}" for name in ("measures", "reading", "health", "local", "llm", "gateway", "app", "run")}
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
