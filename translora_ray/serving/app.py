"""The service as a Serve application: for `translora serve`, and `translora_ray.serving.app:build` for `serve deploy`.

Which engine answers is decided here. vLLM is served by `ray.serve.llm` (`serving/llm.py`), transformers by a deployment of ours
(`serving/local.py`); both answer `Asked` in `Piece`s behind one ingress.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application

from translora_ray import adapters, models
from translora_ray.cluster import Vllm, ordered
from translora_ray.config import EngineKind
from translora_ray.engines.select import choose_engine
from translora_ray.errors import UsageError, first_line
from translora_ray.registry import Registry, Release
from translora_ray.serving.auth import read_keys
from translora_ray.serving.gateway import Gateway
from translora_ray.serving.routing import Serves

logger = logging.getLogger("ray.serve")
NAME = "translora"


class Service(BaseModel):
    """Arguments of `build`. `registry` and `keys` must be readable on every node."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    registry: str
    bases: tuple[str, ...] = ()
    """References of the bases to load, an engine each. None: the one that all releases are for."""
    engine: EngineKind = "auto"
    """`auto` is transformers, which serves all kinds of adapters."""
    keys: str | None = None
    """File of keys (`translora keys`). None: no keys, which a config file has to ask for with `open`."""
    open: bool = False
    """Let whoever reaches the port in, without keys. `translora serve` without keys listens on its own machine alone."""
    replicas: Annotated[int, Field(ge=1)] | Annotated[tuple[int, int], AfterValidator(ordered)] = 1
    """Engines of each base, or the least and the most between which Serve scales with the load."""
    ingresses: int = Field(1, ge=1)
    """Replicas of the ingress. Rates are limited in each of them."""
    adapters: int = Field(8, ge=1)
    """Adapters in an engine's memory; more of them take turns."""
    batch_size: int = Field(16, ge=1)
    """Requests that the transformers engine computes at once."""
    cpus: float = Field(1, ge=0)
    """CPUs of an engine; beside whole GPUs vLLM's has those that `ray.serve.llm` asks for."""
    gpus: float = Field(0, ge=0)
    """GPUs of an engine: a share of one, or, with vLLM, as many as `vllm.tensor_parallel_size`."""
    vllm: Vllm = Vllm()
    drain_seconds: float = Field(60, ge=0)
    """How long a replica that is to end may finish what it began."""


def build(arguments: dict[str, Any]) -> Application:
    """The application from the arguments of a Serve config file. Raises `UsageError` where they can not work."""
    asked = service(arguments)
    if not (asked.keys or asked.open):
        raise UsageError("args.keys: whoever reaches the port would be let in. Name a file of keys (translora keys), or set open: true.")
    return application(asked)


def service(arguments: dict[str, Any]) -> Service:
    """Checked arguments, or a `UsageError` that names the wrong one."""
    try:
        return Service.model_validate(arguments)
    except ValidationError as error:
        found = error.errors()
        wrong = next((each for each in found if not each["type"].endswith("_type")), found[0])  # of two kinds that a value may have, the one that it has
        where = ".".join(str(part) for part in wrong["loc"] if re.fullmatch(r"\w+", str(part)))
        raise UsageError(f"args.{where}: {wrong['msg']}.") from None


def application(service: Service) -> Application:
    """The ingress with an engine for each base."""
    releases, bases = plan(service)
    kind = choose_engine("transformers" if service.engine == "auto" else service.engine)
    serves, engines = list[Serves](), []
    for number, base in enumerate(bases):
        fingerprint = models.fingerprint(base)
        if twice := next((each.base for each in serves if each.fingerprint == fingerprint), None):
            raise UsageError(f"The bases {twice} and {base} are the same: name it once, and ask for more replicas where one engine is too few.")
        mine = [release for release in releases if release.base_fingerprint == fingerprint]
        found, engine = _vllm(service, number, base, fingerprint, mine) if kind == "vllm" else _transformers(service, number, base, fingerprint)
        serves.append(found)
        engines.append(engine)
    options = _options(service, service.ingresses) | {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(Gateway, name="gateway", **options).bind(service.registry, service.keys, serves, *engines)


def plan(service: Service) -> tuple[list[Release], tuple[str, ...]]:
    """The releases that there are and the bases to load. Raises `UsageError` where something named is not there; starts nothing."""
    if service.keys:
        read_keys(service.keys)
    registry = Registry(service.registry)
    registry.check()
    releases = registry.releases(skip=logger.warning)
    return releases, service.bases or only_base(releases, registry.uri)


def count(service: Service) -> int:
    """Engines that there may be."""
    most = service.replicas if isinstance(service.replicas, int) else service.replicas[1]
    return most * max(1, len(service.bases))


def only_base(releases: list[Release], where: str) -> tuple[str]:
    """The base that all releases are for."""
    bases = {release.base_fingerprint: release.target_base for release in releases}
    if len(bases) != 1:
        found = f"holds adapters of {', '.join(sorted(bases.values()))}" if bases else "has no releases yet"
        raise UsageError(f"The registry {where} {found}: say with --base which base to load.")
    return (next(iter(bases.values())),)


def _transformers(service: Service, number: int, base: str, fingerprint: str) -> tuple[Serves, Any]:
    from translora_ray.serving.local import TransformersBackend

    options = _options(service, service.replicas) | {"ray_actor_options": {"num_cpus": service.cpus, "num_gpus": service.gpus}}
    options |= {"max_ongoing_requests": 4 * service.batch_size, "max_queued_requests": 1000}
    engine = serve.deployment(TransformersBackend, name=f"engine-{number}", **options)
    bound = engine.bind(base, fingerprint, service.registry, service.adapters, service.batch_size, service.gpus)
    return Serves(base, fingerprint, tuple(adapters.NAMES)), bound


def _vllm(service: Service, number: int, base: str, fingerprint: str, releases: list[Release]) -> tuple[Serves, Any]:
    from translora_ray.serving import llm

    if service.gpus and max(1, service.gpus) != service.vllm.tensor_parallel_size:
        wanted = f"args.gpus is {service.gpus:g} and vllm.tensor_parallel_size {service.vllm.tensor_parallel_size}"
        raise UsageError(f"{wanted}: vLLM spreads over as many GPUs as the latter says; make them equal.")
    served = [release for release in releases if release.adapter["type"] in adapters.SERVED_BY_VLLM]
    rank = service.vllm.rank or max([16, *(release.adapter["rank"] for release in served)])
    vllm = service.vllm.model_copy(update={"rank": rank, "adapters": service.vllm.adapters or service.adapters})
    options = _options(service, service.replicas) | {"ray_actor_options": {"num_cpus": service.cpus}, "max_queued_requests": 1000}
    try:
        bound = llm.deployment(f"engine-{number}", base, fingerprint, service.registry, vllm, service.gpus, options)
    except (ValueError, ImportError) as error:
        raise UsageError(f"ray.serve.llm does not take this ({first_line(error)}): change it, or use --engine transformers.") from None
    return Serves(base, fingerprint, adapters.SERVED_BY_VLLM, rank), bound


def _options(service: Service, replicas: int | tuple[int, int]) -> dict[str, Any]:
    """What all deployments have in common: how many, how they end, and logs in JSON."""
    count: dict[str, Any] = {"num_replicas": replicas}
    if not isinstance(replicas, int):
        count = {"autoscaling_config": {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": service.batch_size}}
    draining = {"graceful_shutdown_timeout_s": service.drain_seconds, "graceful_shutdown_wait_loop_s": 0.5}
    return count | draining | {"logging_config": {"encoding": "JSON", "enable_access_log": False}}
