"""Small real parts that tests share: random two-layer models with character tokenizers, a task, and a kit prepared on it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from translora_ray import adapters, kit
from translora_ray.config import Adapter
from translora_ray.registry import Registry

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # small models are compared with plain CPU computations
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads of one process must not starve another's on two cores
collect_ignore = [] if find_spec("vllm") else ["vllm"]  # `make test-vllm` fails where it finds no tests
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzHISTYNEABCQ0123456789:.,?!"


def save_tokenizer(folder: Path, characters: str) -> int:
    """A tokenizer with a token for each character; returns its size."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_model(folder: Path, family: str, seed: int = 0) -> str:
    """A random causal LM of two layers with hidden size 32 (Gemma: 48), float32. Heads are as small as vLLM takes them on a CPU."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True)
    size = save_tokenizer(folder, CHARACTERS if family != "gemma" else "".join(reversed(CHARACTERS)))
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": size, "max_position_embeddings": 2048, "initializer_range": 0.3}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, head_dim=32, **layers, **tokens))
    elif family == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=32, intermediate_size=64, **layers, **tokens))
    elif family == "gemma":
        config = Gemma3TextConfig(hidden_size=48, intermediate_size=64, head_dim=32, sliding_window=64, final_logit_softcapping=30.0, **layers, **tokens)
        model = Gemma3ForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, **tokens))
    model.save_pretrained(folder)
    return str(folder)


def lora(rank: int = 4, alpha: float = 8.0) -> Adapter:
    return Adapter(type="lora", rank=rank, alpha=alpha, dropout=0.0, modules="all-linear")


BALLAST = "ballast"


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of so much, which `fill` fills with a file BALLAST."""
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no command `mount`, with which this test makes a small disk")
    except subprocess.CalledProcessError as failure:
        pytest.skip(f"this user may not mount the small disk that the test needs: {failure.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    ballast = (disk / BALLAST).open("wb", buffering=0)
    with ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(1024)):
            pass


def free_port() -> int:
    """One that nothing takes by itself meanwhile: Ray's workers have those below 20,000, the kernel gives away those from 32,768 on."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def command_lines() -> dict[int, bytes]:
    """Of all processes, by their ids; some may end while they are looked at."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[int(entry.name)] = (entry / "cmdline").read_bytes()
    return found


def processes(name: bytes) -> list[int]:
    """Ids of the processes whose command line begins with `name`."""
    return [pid for pid, line in command_lines().items() if line.startswith(name)]


def parent(pid: int) -> int:
    """Of a process that has ended, 0."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def own(found: list[int]) -> list[int]:
    """Those among the processes that this one has started, itself or through others: tests run beside each other."""

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid > 1 and mine(parent(pid)))

    return [pid for pid in found if mine(pid)]


SERVICES = {"test_serving.py", "test_rollout.py", "test_job.py", "test_local_cluster.py"}
"""Files whose tests look for a service's processes on the whole machine, or start a head with Ray's own ports."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process takes a file at a time, whose fixtures take time, in the order of their names."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", maxsplit=1)[0]
            return "services" if Path(file).name in SERVICES else file

    return Files(config, log)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "gemma", "gemma")


def task_rows(count: int) -> list[dict[str, str]]:
    """Two colours and a number; the answer depends on the first letter."""
    words = ["red", "blue", "green", "black", "white", "pink", "brown", "grey"]
    return [{"input": f"{words[i % 8]} {i} {words[(i // 8 + i) % 8]}", "target": "abc"["rbgwp".index(words[i % 8][0]) % 3]} for i in range(count)]


def write_task(folder: Path, count: int = 60, **keys: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows(count)))
    task = {"name": "colours", "prompt": "Q: {input}\nA:", "train": "train.jsonl", "max_new_tokens": 4, "seeds": 5}
    task |= {"source_training": {"epochs": 12, "learning_rate": 0.01}, "discriminator_training": {"epochs": 1}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task | keys))
    return folder / "task.yaml"


@pytest.fixture(scope="session")
def tiny_kit(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """A kit with everything in it, prepared by the command itself."""
    from translora_ray.cli import main

    folder = tmp_path_factory.mktemp("kit")
    assert main(["prepare", str(write_task(folder)), "--base", tiny_llama, "--out", str(folder / "kit"), "--engine", "transformers"]) == 0
    return folder / "kit"


@pytest.fixture(scope="session")
def open_kit(tmp_path_factory: pytest.TempPathFactory, tiny_kit: Path) -> Path:
    """The same one of a task without labels whose seeds have one answer: the gate does not want several of the tiny teacher, who often has one."""
    return one_answer_kit(tiny_kit, tmp_path_factory.mktemp("open") / "kit", "a")


def one_answer_kit(tiny_kit: Path, folder: Path, answer: str) -> Path:
    """A copy of the kit whose seeds have one and the same answer."""
    shutil.copytree(tiny_kit, folder)
    facts = json.loads((folder / kit.FACTS).read_text())
    facts["task"]["labels"] = "open"
    seeds = "".join(json.dumps({"input": seed.input, "target": answer}) + "\n" for seed in kit.load(tiny_kit).seeds)
    (folder / kit.SEEDS).write_text(seeds)
    facts["digest"] = kit.digest_of(facts, seeds)
    (folder / kit.FACTS).write_text(json.dumps(facts))
    return folder


def save_adapter(folder: Path, seed: int = 0, rank: int = 2) -> Path:
    """A LoRA of one module with random weights; it fits none of the models above."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, 8), "B": (8, rank)}
    tensors = {f"base_model.model.q_proj.lora_{side}.weight": torch.randn(shape, generator=draw) for side, shape in shapes.items()}
    save_file(tensors, folder / adapters.WEIGHTS)
    (folder / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "target"}))
    return folder


def channels(registry: Registry) -> dict[str, str]:
    """What each channel of a registry names."""
    return {channel: change["release"] for channel, change in registry.changes().items()}


def save_run(folder: Path, seed: int = 0, verdict: str | None = "ship", on_rows: str | None = None, **facts: object) -> str:
    """What a finished run leaves for the registry: its adapter, made by `save_adapter` unless there is one, its manifest and its evaluation."""
    adapter = folder / "adapter"
    if not adapter.exists():
        save_adapter(adapter, seed)
    manifest = {"kit": "kit", "target": "fingerprint", "recipe_hash": "recipe", "task": {"name": "colours"}, "source_base": "source", "target_base": "target"}
    gate = {"verdict": verdict, "reasons": [] if verdict == "ship" else ["few agree"], "checks": []} if verdict else None
    manifest |= {"lineage": ["before"], "adapter_digest": adapters.digest(adapter), "gate": gate, **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if on_rows:
        (folder / "evaluation").mkdir()
        result = {"n": 30, "metric": "exact_match", "gate": {"verdict": on_rows, "reasons": [], "checks": []}, "verdicts": {"real": [0.1]}}
        (folder / "evaluation" / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URI of an empty bucket in an object store on loopback. The environment names it for all that is started after it: ask for it before a Ray."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            environment.setenv(name, "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        bucket, path = FileSystem.from_uri("s3://translora?allow_bucket_creation=true")
        bucket.create_dir(path)
        yield "s3://translora"
        server.stop()


@pytest.fixture(scope="session")
def gs() -> Iterator[Callable[[str], str]]:
    """URIs of places in an object store on loopback that speaks Google's protocol. pyarrow reads from a URI alone where it is."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="translora")
    server.start()
    yield lambda place: f"gs://anonymous@translora/{place}?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=10"
    server.stop()
