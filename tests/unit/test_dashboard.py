"""The Grafana dashboard asks for metrics that there are, by labels that they have, under the names that Ray gives them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from translora_ray.fleet.state import STATES

ROOT = Path(__file__).parents[2]
SOURCES = ("measures.py", "serving/measures.py")
EXPORTED = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
"""What Ray puts behind the name of a metric; `ray_` is before it."""
NAME = re.compile(r"\b[a-z_]+_translora_\w+")


def defined() -> dict[str, set[str]]:
    """Exported name to labels, of all metrics that the code makes."""
    found = {}
    for source in SOURCES:
        tree = ast.parse((ROOT / "translora_ray" / source).read_text())
        constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXPORTED):
            assert isinstance(call.func, ast.Name)
            name, labels = ast.literal_eval(call.args[0]), set()
            if len(call.args) > 2:
                last = call.args[-1]
                labels = set(ast.literal_eval(constants[last.id] if isinstance(last, ast.Name) else last))
            for ending in EXPORTED[call.func.id]:
                found[f"ray_{name}{ending}"] = labels | ({"le"} if ending == "_bucket" else set())
    return found


def dashboard() -> dict[str, Any]:
    return dict(json.loads((ROOT / "cluster" / "grafana.json").read_text()))


def queries() -> list[tuple[str, str]]:
    """(expression, legend) of each query."""
    return [(target["expr"], target["legendFormat"]) for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def test_each_query_asks_for_what_there_is() -> None:
    there = defined()
    assert there["ray_translora_transfers"] == {"state"}
    for expression, legend in queries():
        (name,) = NAME.findall(expression)
        assert name in there, f"{expression}: no such metric"
        asked = {label.strip() for part in re.findall(r"by \(([^)]*)\)", expression) for label in part.split(",")}
        assert asked | set(re.findall(r"\{\{(\w+)\}\}", legend)) <= there[name], f"{expression}: no such label"
        assert expression.count("(") == expression.count(")")
        assert ("rate(" in expression) == (not name.endswith("_transfers")), f"{expression}: counters are to be read as rates, gauges as they are"


def test_each_metric_is_shown() -> None:
    shown = {name for expression, _ in queries() for name in NAME.findall(expression)}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in defined()} == {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}


def test_panels_have_places_of_their_own_and_a_source_to_choose() -> None:
    found = dashboard()
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not taken & cells
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in found["templating"]["list"]] == ["datasource"]


def test_labels_have_few_values() -> None:
    labels = {label for name, found in defined().items() for label in found if "translora_phase" in name or name == "ray_translora_transfers"}
    assert labels == {"phase", "state"} and len(STATES) < 10
