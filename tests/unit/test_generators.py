"""Who writes candidates: the source base, the target base, an adapter that has learnt the task's inputs, or several of them in turn."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opacus import optimizers

from tests.conftest import save_run, task_rows, write_task
from translora_ray import adapters, kit
from translora_ray.cli import main
from translora_ray.cluster import Cluster
from translora_ray.config import Adapter, Privacy, Training
from translora_ray.engines.base import Complete
from translora_ray.engines.transformers import TransformersEngine
from translora_ray.errors import UsageError
from translora_ray.evaluation.statistics import auc
from translora_ray.prompts import generator_prompt
from translora_ray.recipe import Recipe, Selection, Synthesis
from translora_ray.records import Step, request_pack
from translora_ray.stream.actor import STAGES
from translora_ray.stream.choose import by_generator
from translora_ray.stream.plan import Plan
from translora_ray.stream.synthesize import ROLE, LearntSynthesizer
from translora_ray.training.private import train_privately

COLOURS = ["red", "blue", "green", "black", "white", "pink", "brown", "grey"]
COLOUR = f"({'|'.join(COLOURS)})"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_kit: Path, tiny_llama: str) -> Path:
    """A kit with a generator adapter and without a discriminator."""
    folder = tmp_path_factory.mktemp("written")
    task = write_task(folder, generator_adapter=True, generator_training={"epochs": 25, "learning_rate": 0.01})
    command = ["prepare", str(task), "--base", tiny_llama, "--adapter", str(tiny_kit / "adapter"), "--no-discriminator", "--out", str(folder / "kit")]
    assert main([*command, "--engine", "transformers"]) == 0
    return folder / "kit"


def planned(loaded: kit.Kit, target: str, *generators: str, **synthesis: Any) -> Plan:
    recipe = Recipe(synthesis=Synthesis(generator=generators, pack_size=12, **synthesis), selection=Selection(method="none"))
    return Plan(loaded, target, recipe, Cluster(), "transformers", 1.0, 0.0)


def test_one_generator_is_dumped_as_its_name() -> None:
    """As recipes were before there could be several: their hash, and the identity of their runs, is the same."""
    names: tuple[Any, ...] = ("source", "target", ["source", "target"])
    assert [Synthesis.model_validate({"generator": name}).model_dump()["generator"] for name in names] == list(names)
    assert Synthesis.model_validate({"generator": ["target"]}) == Synthesis.model_validate({"generator": "target"})
    assert Recipe().model_dump()["synthesis"]["generator"] == "source"


def test_the_kit_states_its_generator_and_holds_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((made / "kit.json").read_text())
    assert (facts["generator"]["rows"], facts["generator"]["after"]) == (60, "label")
    assert facts["adapters"]["generator"] == adapters.digest(made / "generator")
    assert main(["inspect", str(made)]) == 0
    assert "generator adapter" in capsys.readouterr().out
    other = Path(shutil.copytree(made, tmp_path / "kit"))
    shutil.copy(other / "adapter" / adapters.WEIGHTS, other / "generator" / adapters.WEIGHTS)
    with pytest.raises(UsageError, match=r"generator is not the adapter that kit\.json describes"):
        kit.load(other)


def test_a_generator_that_is_trained_privately_says_what_it_guarantees_and_is_never_the_same_twice(
    tiny_kit: Path, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Seen(optimizers.DPOptimizer):  # type: ignore[misc]
        def __init__(self, optimizer: Any, **settings: Any) -> None:
            asked.append(settings)
            super().__init__(optimizer, **settings)

    monkeypatch.setattr(optimizers, "DPOptimizer", Seen)
    task = write_task(tmp_path, generator_adapter=True, generator_training={"epochs": 2}, generator_privacy={"epsilon": 4})
    command = ["prepare", str(task), "--base", tiny_llama, "--adapter", str(tiny_kit / "adapter"), "--no-discriminator", "--engine", "transformers"]
    for out in ("one", "two"):
        assert main([*command, "--out", str(tmp_path / out)]) == 0
    facts = [json.loads((tmp_path / out / "kit.json").read_text()) for out in ("one", "two")]
    private = facts[0]["generator"]["private"]
    assert 3.5 < private["epsilon"] <= 4 and private["delta"] == pytest.approx(0.1 / 60) and private["clip"] == 1 and private["noise"] > 0.5
    assert facts[0]["adapters"]["generator"] != facts[1]["adapters"]["generator"], "who knew the noise could take it away"
    assert adapters.has_effect(str(tmp_path / "one" / "generator")) and "loss" not in facts[0]["generator"]
    assert [(each["noise_multiplier"], each["max_grad_norm"], each["expected_batch_size"]) for each in asked] == [(private["noise"], 1, 8)] * 2
    assert facts[0]["rows_digest"] == "", "by which a guessed row could be told from the others"
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "one")]) == 0
    assert "epsilon" in capsys.readouterr().out
    for keys, said in (
        ({"generator_training": {"held_out": 0.1}, "generator_privacy": {"epsilon": 4}}, "generator_privacy does not count what rows choose"),
        ({"generator_privacy": {"epsilon": 1e-4}}, "generator_privacy.epsilon 0.0001 is too small for 60 rows"),
        ({"generator_adapter": False, "generator_privacy": {}}, "generator_privacy is about the generator adapter"),
    ):
        write_task(tmp_path, **({"generator_adapter": True} | keys))
        assert main([*command, "--out", str(tmp_path / "three")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_private_training_learns_where_its_noise_is_small_and_moves_little_where_rows_are_cut_short(tiny_llama: str, tmp_path: Path) -> None:
    pairs = [(generator_prompt(row["target"]), row["input"]) for row in task_rows(60)]
    lora, losses = Adapter(type="lora", rank=4, alpha=8.0, dropout=0.0, modules="all-linear"), []
    for number, clip in enumerate((10.0, 1e-9)):
        out, steps = tmp_path / str(number), list[Step]()
        private = train_privately(tiny_llama, pairs, lora, Training(epochs=6, learning_rate=0.01), 0, out, steps.append, Privacy(epsilon=1e5, clip=clip))
        assert private["noise"] < 0.2
        losses.append((steps[0].loss, steps[-1].loss))
    assert losses[0][1] < 0.8 * losses[0][0]
    assert losses[1][1] > 0.9 * losses[1][0], "of gradients of no length nothing is learnt"


def test_a_run_in_place_of_the_kit_keeps_its_generator(made: Path, tmp_path: Path) -> None:
    loaded = kit.load(made)
    (tmp_path / "run").mkdir()
    run = save_run(tmp_path / "run", kit=loaded.digest, kit_path=loaded.path)
    hop = kit.load(run)
    assert (hop.generator, hop.generator_adapter, hop.base) == (loaded.generator, loaded.generator_adapter, loaded.base)
    assert hop.adapter != loaded.adapter


def test_it_writes_inputs_like_those_it_has_learnt_each_after_a_label(made: Path, tiny_llama: str) -> None:
    loaded, engine = kit.load(made), TransformersEngine(tiny_llama)
    (write,) = STAGES[ROLE](plan := planned(loaded, "target", "adapter"), plan.pools()[0], engine)
    pack = write.process(request_pack(0, 0, 48))
    texts = [(candidate.input, candidate.label_of(loaded.task.classes)) for candidate in pack.open()]
    formed = [(text, label) for text, label in texts if re.fullmatch(rf"{COLOUR} \d+ {COLOUR}", text)]
    assert len(texts) > 24 and len(formed) > 0.25 * len(texts)  # of a model of two layers; its base forms none
    assert sum(label == task_rows(8)[COLOURS.index(text.split()[0])]["target"] for text, label in formed) > 0.7 * len(formed)
    assert write.process(request_pack(0, 0, 48)).candidates == pack.candidates
    asked = LearntSynthesizer(engine, plan.synthesis("adapter"), loaded.seeds, loaded.task, loaded.generator_adapter)
    assert [prompt.text for prompt in asked._prompts(pack)[:4]] == ["a:", "b:", "c:", "a:"]
    open_task = loaded.task.model_copy(update={"labels": "open"})
    asked = LearntSynthesizer(engine, plan.synthesis("adapter"), loaded.seeds, open_task, loaded.generator_adapter)
    assert {prompt.text for prompt in asked._prompts(pack)} == {"colours:"}
    engine.close()


def test_each_generator_is_in_the_pool_of_its_base(made: Path, tiny_kit: Path) -> None:
    loaded, judged = kit.load(made), replace(kit.load(made), discriminator={})
    alone = planned(loaded, "target", "adapter")
    (pool,) = alone.pools()
    assert (pool.base, pool.roles, alone.adapters(pool)) == (loaded.base, ("generator", "teacher"), [loaded.generator_adapter, loaded.adapter])
    both = planned(judged, "target", "source", "target")
    both = replace(both, recipe=both.recipe.model_copy(update={"selection": Selection(method="discriminator")}))
    assert [(pool.base, pool.roles) for pool in both.pools()] == [("target", ("generator",)), (loaded.base, ("generator", "discriminator", "teacher"))]
    assert [ref.name for ref in both.adapters(both.pools()[1])] == ["discriminator", "teacher"]
    assert len(planned(loaded, loaded.base, "source", "target", "adapter").pools()) == 1
    with pytest.raises(UsageError, match=r"has no generator adapter, which synthesis\.generator asks"):
        planned(kit.load(tiny_kit), "target", "source", "adapter").check()
    alone.check()


def test_packs_take_turns_and_each_is_written_once(made: Path, tiny_llama: str, tiny_gemma: str) -> None:
    loaded, engines = kit.load(made), {base: TransformersEngine(base) for base in (tiny_llama, tiny_gemma)}

    def written(plan: Plan, number: int) -> list[tuple[str, str | None]]:
        pack = request_pack(0, number, 12)
        for pool in plan.pools():
            for stage in STAGES[ROLE](plan, pool, engines[pool.base]):
                pack = stage.process(pack)
        return [(candidate.input, candidate.reason) for candidate in pack.candidates]

    names = ("adapter", "source", "target")
    nearly_uniform: dict[str, Any] = {"temperature": 20.0, "min_p": 0.0}  # else random bases hardly ever end a line
    together = planned(loaded, tiny_gemma, *names, **nearly_uniform)
    assert [together.recipe.synthesis.writer(number) for number in range(4)] == ["adapter", "source", "target", "adapter"]
    found = [written(together, number) for number in range(4)]
    assert found == [written(planned(loaded, tiny_gemma, names[number % 3], **nearly_uniform), number) for number in range(4)]
    assert all(any(text and not reason for text, reason in pack) for pack in found)
    for engine in engines.values():
        engine.close()


def test_candidates_are_counted_by_generator() -> None:
    synthesis = Synthesis(generator=("source", "target"), pack_size=4)
    candidates = [candidate for number in range(3) for candidate in request_pack(0, number, 4).candidates]
    for candidate in candidates[:5]:
        candidate.reason = "off task"
    assert by_generator(synthesis, candidates) == {"source": {"candidates": 8, "accepted": 4}, "target": {"candidates": 4, "accepted": 3}}


def test_the_audit_says_what_the_generator_gives_away(made: Path, tmp_path: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, part in (("train", task_rows(60)), ("test", task_rows(100)[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = ("--data", str(tmp_path / "train.jsonl"), "--holdout", str(tmp_path / "test.jsonl"), "--json", str(tmp_path / "out.json"))
    assert main(["inspect", str(made), "--audit", *files, "--engine", "transformers"]) == 0
    found, told, loaded = json.loads((tmp_path / "out.json").read_text())["generator"], capsys.readouterr().out, kit.load(made)
    engine = TransformersEngine(tiny_llama)

    def gains(rows: list[dict[str, str]]) -> list[float]:
        pairs = [(generator_prompt(row["target"]), row["input"]) for row in rows]
        with_it, bare = (engine.token_logprobs([Complete(*pair, ref) for pair in pairs]) for ref in (loaded.generator_adapter, None))
        return [sum(a) / len(a) - sum(b) / len(b) for a, b in zip(with_it, bare, strict=True)]

    members = [row for row in task_rows(60) if row["input"] not in loaded.seed_inputs]
    assert found["members"] == len(members) == 55
    assert found["gain"]["auc"] == pytest.approx(auc(gains(members), gains(task_rows(100)[60:]))[0], abs=0.02)
    engine.close()
    for name in ("likelihood", "gain"):  # after so many epochs it knows its rows by heart
        assert found[name]["low"] > 0.5 and "evidence of a membership leak" in found[name]["judgement"]
    assert "log-likelihood" in told and not [row["input"] for row in task_rows(100) if row["input"] in told]
