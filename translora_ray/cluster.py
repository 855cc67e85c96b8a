"""What users write in YAML about where and how widely a run is computed: never part of what a run is. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from translora_ray.config import MOST_RANK, Section
from translora_ray.recipe import Recipe

FULL_BATCH = 256
"""Requests with which an engine of vLLM has enough to do."""


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
    """Most different adapters in one batch. None: as many as the engine's roles name, at most 16."""
    rank: int | None = Field(None, ge=1, le=MOST_RANK)
    """Largest rank of an adapter. None: the largest that the engine's roles name."""
    packs: int = Field(2, ge=1)
    """Packs of a transfer that one engine computes at the same time, in one batch: while one is read, another is written. Transfers that share the engine have
    as many each, until 256 requests are under way (`make bench-sharing`)."""

    def at_once(self, transfers: int, pack_size: int) -> int:
        """Packs that one engine computes at the same time for so many transfers."""
        return max(self.packs, min(self.packs * transfers, FULL_BATCH // pack_size))


class Nodes(Section):
    """Nodes that are alike, by what Ray counts on each of them."""

    nodes: int = Field(1, ge=1)
    CPU: float = Field(0, ge=0)
    GPU: float = Field(0, ge=0)

    @property
    def each(self) -> list[dict[str, float]]:
        """What each of them has, as Ray tells it of a node."""
        return [{"CPU": self.CPU, "GPU": self.GPU}] * self.nodes


def ordered(count: tuple[int, int]) -> tuple[int, int]:
    """(least, most), where they can be that."""
    if not 1 <= count[0] <= count[1]:
        raise ValueError("the least must be 1 or more and no more than the most")
    return count


class Cluster(Section):
    """Where and how widely a run is computed. Never part of a run's identity."""

    address: str | None = None
    """A running Ray; None: the job's own cluster where there is one, else a local Ray that ends with the command."""
    expect: list[Nodes] | None = Field(None, min_length=1)
    """What a cluster with an autoscaler can grow to, group by group ({nodes: 4, CPU: 8, GPU: 1}); one group may stand without a list. Ray knows only
    the nodes that are there, maybe none yet, so without this key no more than those is planned on."""
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

    @field_validator("expect", mode="before")
    @classmethod
    def _one_group(cls, groups: Any) -> Any:
        return [groups] if isinstance(groups, dict) else groups

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number(cls, workers: Any) -> Any:
        return (workers, workers) if isinstance(workers, int) else workers

    _ordered = field_validator("engines", "workers")(ordered)


class Config(Section):
    """RECIPE.yaml: the recipe's sections, and `cluster`."""

    recipe: Recipe = Recipe()
    cluster: Cluster = Cluster()
