"""Is it the same run? One that was begun with another recipe is refused by the field; one that an older version began goes on as it began."""

import json
from pathlib import Path
from typing import Any

import pytest

from translora_ray import identity, kit
from translora_ray.adapters import CONFIG
from translora_ray.errors import UsageError
from translora_ray.progress import Display
from translora_ray.reading import load_config
from translora_ray.recipe import Recipe
from translora_ray.workflow import ADAPTER, check


def again(tiny_kit: Path, tiny_gemma: str, run: Path, *overrides: str) -> Recipe:
    """The recipe with which the same command goes on."""
    with Display() as display:
        return check(str(tiny_kit), tiny_gemma, str(run), load_config(None, list(overrides)), "transformers", display).config.recipe


def begun(tiny_kit: Path, tiny_gemma: str, run: Path, *overrides: str, trained: bool = False) -> dict[str, Any]:
    """What is written down of a run of these settings, everything decided."""
    loaded, recipe = kit.load(tiny_kit), load_config(None, list(overrides)).recipe
    written = identity.of(loaded, tiny_gemma, recipe.decided(loaded.task.classes, loaded.rows, loaded.discriminator, loaded.copies))
    keep(run, written, trained)
    return written


def keep(run: Path, written: dict[str, Any], trained: bool = False) -> None:
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps(written))
    if trained:
        (run / ADAPTER).mkdir()
        (run / ADAPTER / CONFIG).write_text("{}")


@pytest.mark.parametrize(
    ("there", "here", "trained", "message"),
    [
        ((), ("selection.votes=3",), False, "recipe.selection.votes is 1 there and 3 here"),
        (("training.epochs=12",), (), True, "recipe.training.epochs is 12 there and 6 here"),
        (("synthesis.high_temperature=1.2",), (), False, "recipe.synthesis.high_temperature is 1.2 there and 0.7 here"),
        (("synthesis.by_label=true", "selection.quota=120"), ("synthesis.by_label=true",), False, "recipe.selection.quota is 120 there and 240 here"),
    ],
)
def test_a_run_of_another_recipe_is_refused_by_field(
    tmp_path: Path, tiny_kit: Path, tiny_gemma: str, there: tuple[str, ...], here: tuple[str, ...], trained: bool, message: str
) -> None:
    begun(tiny_kit, tiny_gemma, tmp_path / "run", *there, trained=trained)
    with pytest.raises(UsageError, match=message):
        again(tiny_kit, tiny_gemma, tmp_path / "run", *here)
    again(tiny_kit, tiny_gemma, tmp_path / "run", *there)


def test_a_run_from_before_selection_was_decided_goes_on_as_it_began(tmp_path: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    older = identity.of(kit.load(tiny_kit), tiny_gemma, load_config(None, []).recipe)
    del older["recipe"]["synthesis"]["fewest_shots"], older["recipe"]["synthesis"]["high_temperature"]
    older["recipe"]["training"]["epochs"] = 6
    keep(tmp_path / "run", older)
    with pytest.raises(UsageError, match=r"recipe\.synthesis.by_label is True there and False here"):
        again(tiny_kit, tiny_gemma, tmp_path / "run")
    found = again(tiny_kit, tiny_gemma, tmp_path / "run", "synthesis.by_label=true")
    assert (found.selection.quota, found.selection.method) == (60, "discriminator"), "as many examples as rows, and all were judged"
    assert found.synthesis.fewest_shots == found.synthesis.shots
    assert (found.synthesis.high_temperature, found.training.epochs) == (1.0, 6)


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_of_two_examples_for_each_row_goes_on_as_it_began(tmp_path: Path, tiny_kit: Path, tiny_gemma: str, trained: bool) -> None:
    new = again(tiny_kit, tiny_gemma, tmp_path / "new", "synthesis.by_label=true")
    assert (new.selection.method, new.selection.quota, new.training.epochs, new.synthesis.high_temperature) == ("none", 240, 3, 1.5)
    older = begun(tiny_kit, tiny_gemma, tmp_path / "run", "synthesis.by_label=true", "selection.quota=120", "training.epochs=6")
    del older["recipe"]["synthesis"]["high_temperature"]
    keep(tmp_path / "run", older, trained)
    found = again(tiny_kit, tiny_gemma, tmp_path / "run", "synthesis.by_label=true")
    assert (found.selection.quota, found.training.epochs, found.synthesis.high_temperature) == (120, 6, 1.0)


def test_a_file_of_another_kind_is_no_run(tmp_path: Path, tiny_kit: Path, tiny_gemma: str) -> None:
    keep(tmp_path / "run", {"name": "something else"})
    with pytest.raises(UsageError, match=r"run is no run, though it has a run\.json: choose another --out"):
        again(tiny_kit, tiny_gemma, tmp_path / "run")
