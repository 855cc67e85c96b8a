"""What a run is, as its run.json says: by it a command that is given again knows its own run, also where an older version began it."""

from __future__ import annotations

from typing import Any

from translora_ray import adapters, models
from translora_ray.config import EPOCHS
from translora_ray.errors import UsageError
from translora_ray.kit import Kit
from translora_ray.reading import differing_field
from translora_ray.recipe import CHOSEN_FOR_A_ROW, Gate, Recipe, Selection
from translora_ray.storage import ADAPTER, IDENTITY, RunStore


def of(loaded: Kit, target: str, recipe: Recipe) -> dict[str, Any]:
    """That of a transfer, everything in its recipe decided."""
    return {"kit": loaded.digest, "target": models.fingerprint(target), "recipe_hash": recipe.digest(), "recipe": recipe.model_dump()}


def check(store: RunStore, loaded: Kit, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What is written down of the run, None where nothing is. Raises `UsageError` where it is another one."""
    if not store.exists():
        return None
    if not store.exists(IDENTITY):
        if store.names(""):
            raise UsageError(f"{store.uri} is not empty and not a run: choose another --out.")
        return None
    stored: dict[str, Any] = store.read_json(IDENTITY)
    trained = store.exists(f"{ADAPTER}/{adapters.CONFIG}")
    if field := differing_field(_fixed(_as_today(stored, loaded), trained), _fixed(identity, trained)):
        raise UsageError(f"{store.uri} is a run of something else: {field}. Choose another --out.")
    return stored


def as_begun(recipe: Recipe, store: RunStore, loaded: Kit) -> Recipe:
    """The recipe; where it and an older run both leave something open, with what that was then."""
    if not store.exists(IDENTITY):
        return recipe
    begun = store.read_json(IDENTITY).get("recipe")
    if begun is None:
        raise UsageError(f"{store.uri} is no run, though it has a {IDENTITY}: choose another --out.")
    then, lacking = _left_open(begun["selection"], loaded), _lacking(begun["synthesis"], loaded)
    both = {key: then[key] for key in then.keys() & _left_open(recipe.selection.model_dump(), loaded).keys()}
    epochs = recipe.training.epochs
    if "high_temperature" in lacking:  # then there were two examples for a row, whatever selected them, and six epochs
        if recipe.selection.quota is None and begun["selection"]["quota"] == CHOSEN_FOR_A_ROW * loaded.rows:
            both["quota"] = CHOSEN_FOR_A_ROW * loaded.rows
        if epochs is None and begun["training"]["epochs"] == EPOCHS:
            epochs = EPOCHS
    synthesis = recipe.synthesis.model_copy(update={key: value for key, value in lacking.items() if getattr(recipe.synthesis, key) is None})
    changed = {"selection": recipe.selection.model_copy(update=both), "synthesis": synthesis, "training": recipe.training.model_copy(update={"epochs": epochs})}
    return recipe.model_copy(update=changed)


def of_manifest(manifest: dict[str, Any], loaded: Kit) -> Recipe:
    """The recipe of a finished run; where an older one lacks something, with what that was then."""
    recipe = manifest["recipe"]
    return Recipe.model_validate({**recipe, "synthesis": {**recipe["synthesis"], **_lacking(recipe["synthesis"], loaded)}})


def _lacking(synthesis: dict[str, Any], loaded: Kit) -> dict[str, Any]:
    """What an older run lacks: how few seeds a request shows, then as many as it might, seeds with other values, then none, and the temperature of half of the
    packs, then that of the others."""
    by_label = bool(loaded.task.classes) if (asks := synthesis.get("by_label", False)) is None else asks
    temperature = synthesis["temperature"] or (1.0 if by_label else 0.7)
    once = {"fewest_shots": synthesis["shots"], "fill": False, "high_temperature": temperature}
    return {key: value for key, value in once.items() if synthesis.get(key) is None}


def _left_open(selection: dict[str, Any], loaded: Kit) -> dict[str, Any]:
    """What older runs did where the selection's quota or method is left open."""
    then = {"quota": loaded.rows, "method": "excess" if loaded.discriminator is None else "discriminator"}
    return {key: value for key, value in then.items() if selection[key] == Selection.model_fields[key].default}


def _as_today(stored: dict[str, Any], loaded: Kit) -> dict[str, Any]:
    """What an older run is, as it is written down today: it lacks keys of the gate, shows as many seeds in each request, all as they are, asks all at one
    temperature, and left open that prompts of a task with labels were by label, how many examples there were, and how they were selected."""
    recipe = {**stored["recipe"], "gate": {**Gate().model_dump(), **stored["recipe"]["gate"]}}
    recipe["synthesis"] = {**recipe["synthesis"], **_lacking(recipe["synthesis"], loaded)}
    if recipe["synthesis"].get("by_label", False) is None:
        recipe["synthesis"]["by_label"] = bool(loaded.task.classes)
    recipe["selection"] = {**recipe["selection"], **_left_open(recipe["selection"], loaded)}
    return {**stored, "recipe": recipe}


def _fixed(identity: dict[str, Any], trained: bool) -> dict[str, Any]:
    """What must stay as it is in a run. How its adapter is trained may change until there is one, but for what the stream measures for it."""
    recipe = identity["recipe"]
    if not trained:
        recipe = {**recipe, "training": {"token_weights": recipe["training"].get("token_weights")}}
    return {**{key: value for key, value in identity.items() if key != "recipe_hash"}, "recipe": recipe}
