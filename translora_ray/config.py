"""What users write in YAML: the task, the recipe and the cluster section. Nothing heavy is imported here.

Identity is not placement: the recipe is hashed and makes a run what it is, the cluster section never is.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from translora_ray.errors import UsageError

EngineKind = Literal["auto", "transformers", "vllm"]
AdapterType = Literal["lora", "rslora", "dora", "prompt_tuning", "ia3"]


class Section(BaseModel):
    """A part of a YAML file: unknown keys and wrong types are errors that name the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Training(Section):
    """How an adapter is trained. The paper (arXiv 2405.17258, section 4.1): AdamW, linear decay, batch 8, no weight decay."""

    epochs: int = Field(6, ge=1)
    """Passes over the rows."""
    batch_size: int = Field(8, ge=1)
    """Rows per optimiser step over all workers together."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak rate, decayed linearly to 0."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """A step's gradient that is longer is shortened to this: now and then one is a hundred times the median."""
    held_out: float = Field(0.0, ge=0, le=0.5)
    """Share of the rows that is not trained on: the epoch, and the learning rate, with the least loss on them are taken. A transfer's rows are
    synthetic, so no real row decides anything. 0: the last epoch is taken."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a lower loss on the rows held out after which training stops. None: it goes on to the end."""
    base_bits: Literal[4, 8] | None = None
    """Bits per weight of the frozen base while it trains (bitsandbytes, the extra `quantized`; 4 is QLoRA's NF4, arXiv 2305.14314). None: as it is."""
    learning_rates: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=2)
    """Rates to try in turn in place of `learning_rate`, each from a fresh adapter; the rows held out choose."""

    @model_validator(mode="after")
    def _chooses_by_something(self) -> Training:
        if (self.patience or self.learning_rates) and not self.held_out:
            raise ValueError("patience and learning_rates choose by rows held out: set held_out")
        return self

    @property
    def trials(self) -> list[Training]:
        """This section for each of the learning rates to try."""
        rates = self.learning_rates or [self.learning_rate]
        return [self.model_copy(update={"learning_rate": rate, "learning_rates": None}) for rate in rates]


class Adapter(Section):
    """An adapter's type and size. None: what the source adapter has; keys that a type has no use for are not read."""

    type: AdapterType | None = None
    """LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), prompt tuning (2104.08691; it wants a higher learning rate, in the paper
    2e-3) or IA3 (2205.05638, on the modules that peft names for the base's family). vLLM serves the first two."""
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    """With another rank than the source adapter's, None keeps alpha / rank."""
    dropout: float | None = Field(None, ge=0, lt=1)
    modules: Literal["all-linear"] | list[str] | None = Field(None, min_length=1)
    """Names of the linear layers that LoRA goes on, as they end (`q_proj`). None: those that do what the source adapter's do."""
    virtual_tokens: int | None = Field(None, ge=1)
    """Of prompt tuning; 20 where the source adapter has none."""


class Task(Section):
    """TASK.yaml: what the adapter is for, and where its rows lie while they are at hand."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the task in the discriminator's question and in tables."""
    prompt: str
    """Template with `{input}` in it."""
    train: str
    """JSONL of {"input", "target"}, relative to the YAML file."""
    metric: Literal["exact_match", "choice", "number", "rouge_l", "code"] = "exact_match"
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens."""
    seeds: int = Field(5, ge=1)
    """Rows that go into the kit (paper: 5, one task needed 15). Spread over the targets where these are classes."""
    format: Literal["text", "chat"] = "text"
    """`chat` sends the prompt as one user message through each base's own template."""
    seed: int = 0
    """Random seed of `prepare`."""
    source_training: Training = Training()
    """For the source adapter; unused with `--adapter`."""
    source_adapter: Adapter = Adapter()
    """Type and size of the source adapter; None means LoRA of rank 16, alpha twice the rank, dropout 0, all linear layers."""
    discriminator_training: Training = Training(epochs=3)


class Synthesis(Section):
    """How candidates are written."""

    generator: Literal["source", "target"] = "source"
    """Which base continues the seeds: the source base shares its engine with discriminator and teacher; `target` is the paper's."""
    shots: int = Field(5, ge=1)
    """Seeds shown in one request, drawn anew for each pack (paper: 5)."""
    temperature: float = Field(0.7, gt=0)
    """Of the generator. Small bases drift off the task above it."""
    min_p: float = Field(0.05, ge=0, lt=1)
    """Drops tokens less likely than this share of the likeliest. Needs no sorting of the vocabulary, unlike top-p."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest candidate in tokens; a longer one is a reject. None: 8 more than twice the longest seed."""
    pack_size: int = Field(64, ge=1)
    """Requests that travel, and are computed, together."""


class Selection(Section):
    """Which candidates become examples."""

    quota: int | None = Field(None, ge=1)
    """Examples to accept; None: as many as the task had rows (paper)."""
    threshold: float = 0.0
    """Least log p(yes) - log p(no) of the discriminator; 0 is the paper's p(yes) > p(no)."""
    near_duplicate: float = Field(0.95, gt=0, le=1)
    """Similarity (1 - normalised edit distance) from which a candidate repeats a seed or an accepted prompt."""
    max_candidates: int = Field(30, ge=1)
    """Candidates per example wanted, after which a run that is not full stops with an error."""


class Recipe(Section):
    """Everything that decides what a transfer produces, given the kit and the target base."""

    seed: int = 0
    synthesis: Synthesis = Synthesis()
    selection: Selection = Selection()
    training: Training = Training()
    adapter: Adapter = Adapter()
    """Type and size of the target adapter; None inherits from the source adapter."""
    overlap: bool = False
    """Training begins with the first examples that are committed, and takes the others as they come: the first epoch has their order. The workers hold their
    resources beside the engines."""

    @model_validator(mode="after")
    def _knows_its_rows(self) -> Recipe:
        if self.overlap and self.training.held_out:
            raise ValueError("rows held out are drawn from all of them, before training begins: leave overlap or training.held_out out")
        return self

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]


class Vllm(Section):
    """Engines on vLLM (its engine arguments, docs.vllm.ai/en/stable/configuration/engine_args); unused by the transformers engine."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that one engine spreads over."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the base computes in. auto: as its configuration says, but float32 on CPUs that do not compute in bf16."""
    memory_share: float | None = Field(None, gt=0, le=1)
    """Part of each GPU's memory that an engine takes. None: 0.9 of its share of the GPU."""
    cpu_cache_gib: float = Field(1.0, gt=0)
    """GiB for keys and values where vLLM computes on CPUs."""
    context: int | None = Field(None, ge=1)
    """Most tokens of a prompt and its answer. None: the base's own, or what the memory holds."""
    adapters: int | None = Field(None, ge=1)
    """Most different adapters in one batch. None: as many as the engine's roles name, at most 8."""
    rank: int | None = Field(None, ge=1, le=512)
    """Largest rank of an adapter. None: the largest that the engine's roles name."""
    packs: int = Field(2, ge=1)
    """Packs that one engine computes at the same time, in one batch: while one is read, another is written."""


class Cluster(Section):
    """Where and how widely a run is computed. Never part of a run's identity."""

    address: str | None = None
    """A running Ray; None: the job's own cluster where there is one, else a local Ray that ends with the command."""
    engines: tuple[int, int] = Field((1, 1), strict=False)
    """(least, most) actors of each pool."""

    engine_cpus: float | None = Field(None, gt=0)
    """CPUs of one engine. None: an even share of the machine on a local Ray, 1 on a cluster."""
    engine_gpus: float | None = Field(None, ge=0)
    """GPUs of one engine. None: an even share of the machine's on a local Ray, at most 1; 0 on a cluster."""
    vllm: Vllm = Vllm()
    workers: tuple[int, int] = Field((1, 1), strict=False)
    """(least, most) training workers, or one number. It does not change which rows a step learns from, nor its gradient (but for dropout's draws)."""
    rows_at_once: int | None = Field(None, ge=1)
    """Rows that one worker computes together; their gradients add up to a step's. None: its whole share of the batch."""
    spread_base: bool = False
    """Spreads the frozen base over the training workers (torch's FSDP2), for bases that one GPU does not hold. The adapter stays whole on each."""
    recompute: bool = False
    """Training keeps few activations and computes the others twice: less memory, about a third more time."""
    checkpoint_seconds: float = Field(60, ge=0)
    """Least time between two checkpoints inside an epoch: what the death of a worker can cost. One more comes at the end of each epoch."""
    worker_cpus: float | None = Field(None, gt=0)
    """CPUs of one training worker. None: as for engines."""
    worker_gpus: float | None = Field(None, ge=0)
    """GPUs of one training worker. None: as for engines."""
    commit_seconds: float = Field(10, ge=0)
    """Least time between two shards: what a kill can cost."""
    start_timeout_s: int = Field(600, ge=1)
    """Seconds to wait for engines and workers to start."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number(cls, workers: Any) -> Any:
        return (workers, workers) if isinstance(workers, int) else workers

    @field_validator("engines", "workers")
    @classmethod
    def _ordered(cls, count: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= count[0] <= count[1]:
            raise ValueError("the least must be 1 or more and no more than the most")
        return count


class Config(Section):
    """RECIPE.yaml: the recipe's sections, and `cluster`."""

    recipe: Recipe = Recipe()
    cluster: Cluster = Cluster()


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))

_S = TypeVar("_S", bound=Section)


def load_task(path: str | Path) -> Task:
    """Read TASK.yaml; `train` comes back as an absolute path."""
    task = _validate(Task, _read_yaml(path), str(path))
    if "{input}" not in task.prompt:
        raise UsageError(f"{path}: prompt has no {{input}} in it, so no row could be shown to a model; add it.")
    return task.model_copy(update={"train": str((Path(path).parent / task.train).resolve())})


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """RECIPE.yaml with `--set` overrides (`training.epochs=3`, `cluster.workers=2`). Recipe sections stand at the top level."""
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write key=value, e.g. training.epochs=3.")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {override}: {parent} is a value, not a section.")
        try:
            node[leaf] = yaml.load(value, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            raise UsageError(f"--set {override}: {value} is not a YAML value.") from None
    where = str(path) if path else "--set"
    cluster = _validate(Cluster, tree.pop("cluster", None) or {}, where, "cluster.")
    return Config(recipe=_validate(Recipe, tree, where), cluster=cluster)


def differing_field(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str | None:
    """The first field in which two nested dictionaries differ, as `training.epochs is 6 there and 3 here`; None if none."""
    for key in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            if found := differing_field(there, here, f"{prefix}{key}."):
                return found
        elif there != here:
            return f"{prefix}{key} is {there} there and {here} here"
    return None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{path} can not be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise UsageError(f"{path} is not valid YAML{'' if line is None else f' at line {line + 1}'}: correct it.") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must be a YAML mapping of keys to values.")
    return tree


def _validate(section: type[_S], tree: dict[str, Any], where: str, prefix: str = "") -> _S:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UsageError(f"{where}: unknown key {key}; remove it or correct its spelling.") from None
        if first["type"] == "missing":
            raise UsageError(f"{where}: the key {key} is missing; add it.") from None
        if first["type"] == "value_error":
            raise UsageError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}.") from None
        raise UsageError(f"{where}: {key}: {first['msg']}, not {first['input']!r}.") from None
