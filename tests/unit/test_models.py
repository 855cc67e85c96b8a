"""Model references: the cache under two processes, bases that can not be used, telling bases apart."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from translora_ray import models, references
from translora_ray.errors import UsageError

TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from translora_ray import references

def make(target):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    time.sleep(1)
    target.mkdir()
    (target / "config.json").write_text("{}")

print(references.once("model", make))
"""


def test_two_processes_make_a_cached_model_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path / "log")]
    environment = {**os.environ, "TRANSLORA_CACHE": str(tmp_path / "cache")}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str(tmp_path / "cache" / "model")] * 2
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLORA_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(UsageError, match=r"broken\.gguf can not be read"):
        references.resolve(str(broken))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("remove", "message"), [("*.safetensors", "no weights in safetensors"), ("tokenizer*", "no tokenizer that can be read"), ("config.json", "no config.json")]
)
def test_incomplete_bases_are_told(tiny_llama: str, tmp_path: Path, remove: str, message: str) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    for path in base.glob(remove):
        path.unlink()
    with pytest.raises(UsageError, match=message):
        models.describe(str(base))


def test_fine_tunes_of_one_architecture_have_different_fingerprints(tiny_llama: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name] + 0.01}, other / "model.safetensors", metadata={"format": "pt"})
    assert models.fingerprint(tiny_llama) != models.fingerprint(str(other))


def test_end_tokens_are_the_tokenizers_and_the_generation_configurations(tiny_llama: str) -> None:
    model, tokenizer = models.load_base(tiny_llama), models.load_tokenizer(tiny_llama)
    model.generation_config.eos_token_id = [7, 9]
    assert models.end_tokens(model, tokenizer) == {2, 7, 9}
