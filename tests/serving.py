"""What tests of the service share: finished runs made of random adapters, a base with a chat template, and the command itself running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import openai

from tests.conftest import save_model
from translora_ray import adapters, models
from translora_ray.registry import Registry
from translora_ray.storage import RunStore

PROMPT = "question 1"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}A:"


def chat_base(folder: Path, seed: int = 5) -> str:
    """A tiny Llama whose tokenizer has a chat template."""
    base = save_model(folder, "llama", seed)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return base


def finished_run(folder: Path, base: str, name: str, seed: int, rank: int = 4) -> str:
    """A run as a transfer leaves it, as far as the registry looks, with an adapter of random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    digest = adapters.digest(folder / "adapter")
    manifest = {"adapter_digest": digest, "target_base": base, "target": models.fingerprint(base), "source_base": "elsewhere", "kit": "k" * 16, "lineage": []}
    manifest |= {"recipe_hash": f"r{seed}", "gate": {"verdict": "ship", "reasons": [], "checks": []}, "task": {"name": name, "format": "text"}}
    RunStore(str(folder)).write_json("manifest.json", manifest)
    return str(folder)


def expected(base: str, adapter: str, prompt: str, tokens: int, exact: bool = False) -> str:
    """The greedy answer of plain transformers and peft; `exact`: in float32, wherever it is computed."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) if exact else models.load_base(base)
    tokenizer, model = models.load_tokenizer(base), PeftModel.from_pretrained(plain, f"{adapter}/adapter").eval()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
    return str(tokenizer.decode(output, skip_special_tokens=True))


class Running:
    """`translora serve` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        # The tests' own directory comes first for Ray's workers, too.
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "translora_ray.cli", "serve", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def url(self, seconds: float = 300) -> str:
        """The address it prints when it is ready."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            for line in self.lines:
                if line.startswith("serving "):
                    return line.split(" at ")[1].split("/v1")[0]
            time.sleep(0.1)
        raise AssertionError(f"the service did not start: {self.output()}")

    def output(self) -> str:
        return "".join(self.lines)

    def end(self, seconds: float = 90) -> int:
        """Tell it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def session(self) -> Path:
        """The directory of its Ray's session."""
        return max(Path("/tmp/ray").glob(f"session_*_{self.process.pid}"))  # of an earlier process with the same id there may be one

    def metrics(self) -> list[str]:
        """What Prometheus would read now, line by line; Ray exports it every few seconds."""
        ports = [path.read_text().strip() for path in self.session().glob("metrics_export_port_*")]
        pages = [urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode() for port in ports]
        return [line for page in pages for line in page.splitlines()]

    def counted(self, metric: str, **labels: str) -> float:
        """The sum of a counter over its series with these labels. Ray exports a counter under one name or two."""
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        lines = [line for line in self.metrics() if all(label in line for label in wanted)]
        return max(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ray_{metric}{end}{{")) for end in ("", "_total"))


_expected = cache(expected)


@dataclass
class World:
    """A registry of random adapters on one base, and the service that has them."""

    folder: Path
    base: str
    registry: Registry
    exact: bool = False
    """Whether the service computes in float32."""
    runs: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    service: Running = None  # type: ignore[assignment]

    @cached_property
    def url(self) -> str:
        return self.service.url()

    def client(self, key: str = "all", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys.get(key, key), max_retries=retries, timeout=120)

    def publish(self, name: str, seed: int, rank: int = 4) -> str:
        run = finished_run(self.folder / f"{name}-{seed}", self.base, name, seed, rank)
        release = self.registry.publish(run).id
        self.runs[release] = run
        return release

    def says(self, release: str, prompt: str = PROMPT, tokens: int = 8) -> str:
        """What the release must answer."""
        return _expected(self.base, self.runs[release], prompt, tokens, self.exact)

    def asks(self, model: str, prompt: str = PROMPT, tokens: int = 8, key: str = "all") -> tuple[str, str]:
        """(release, text) that the service answers."""
        answer = self.client(key).completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
        return answer.model, answer.choices[0].text


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Running]:
    service = Running(*arguments)
    try:
        yield service
    finally:
        service.end()


def eventually(holds: Callable[[], bool], seconds: float = 180) -> bool:
    """Whether it comes to hold: metrics are exported every few seconds, on a busy machine every minute."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.5)
    return False


def post(url: str, body: bytes | dict[str, object], key: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a POST, whatever the status."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(url, "POST", data, {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}))


def fetch(url: str, method: str = "GET", data: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body), whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}, method=method), timeout=120) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()
