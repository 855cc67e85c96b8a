"""The whole way on the two packaged real models, on vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_real_models import SOURCE, moved

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.real]


def test_from_rows_to_a_comparison(tmp_path: Path) -> None:
    manifest = moved(tmp_path, "vllm")
    assert manifest["engine"] == "vllm" and list(manifest["counts"]["engine_loads"].values()) == [[SOURCE]]
    assert manifest["selection"] == "importance", "of a task whose answers are open"
    assert [manifest["counts"][key] for key in ("accepted", "trained", "held_out", "left")] == [28, 12, 2, 14]
