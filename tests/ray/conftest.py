"""One undisturbed run that tests compare with, and what they ask of a run."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from translora_ray.cli import main
from translora_ray.records import Candidate
from translora_ray.storage import RunStore

SETTINGS = [
    "selection.quota=40", "selection.method=discriminator", "selection.threshold=-100", "selection.as_asked=false",
    "selection.near_duplicate=1.0", "selection.max_candidates=200",
    "synthesis.pack_size=16", "synthesis.temperature=1.0", "synthesis.min_p=0.0", "synthesis.max_tokens=60",
    "training.epochs=8", "training.batch_size=4", "adapter.rank=4", "cluster.commit_seconds=0", "gate.held_out=0",
]  # fmt: skip


def arguments(kit: Path, target: str, run: Path, *more: str) -> list[str]:
    settings = [part for setting in [*SETTINGS, *more] for part in ("--set", setting)]
    return ["transfer", str(kit), "--target", target, "--out", str(run), "--engine", "transformers", *settings]


def rows(run: Path) -> list[Candidate]:
    return RunStore(str(run)).candidates()


def has_checkpoint(run: Path) -> bool:
    return bool(checkpoints(run))


def checkpoints(run: Path) -> list[str]:
    """Names of those that are whole."""
    return sorted(path.name for path in run.glob("train/target0/checkpoints/[0-9]*"))


def same_weights(one: Path, other: Path) -> None:
    """Equal to what the order of additions in bf16 leaves."""
    weights = [load_file(place / "adapter" / "adapter_model.safetensors") for place in (one, other)]
    for name, ours in weights[0].items():
        torch.testing.assert_close(ours, weights[1][name], rtol=1e-2, atol=1e-3, msg=name)


def token_in(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to use a token of its own, which lies in the folder."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_kit: Path, tiny_gemma: str) -> Path:
    run = tmp_path_factory.mktemp("calm") / "run"
    assert main(arguments(tiny_kit, tiny_gemma, run)) == 0
    return run


def answers(base: str, adapter: Path | None, inputs: list[str]) -> list[str]:
    """Greedy answers of plain transformers and peft, row by row."""
    from peft import PeftModel

    from translora_ray.models import load_base, load_tokenizer

    tokenizer, model = load_tokenizer(base), load_base(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    found = []
    for text in inputs:
        ids = torch.tensor([tokenizer(f"Q: {text}\nA:").input_ids])
        output = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
        found.append(tokenizer.decode(output, skip_special_tokens=True).split("\n")[0].strip())
    return found


def accuracy(base: str, adapter: Path | None, part: list[dict[str, str]]) -> float:
    found = answers(base, adapter, [row["input"] for row in part])
    return sum(answer == row["target"] for answer, row in zip(found, part, strict=True)) / len(part)
