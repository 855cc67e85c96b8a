"""`translora serve`: the service in the foreground, on a local Ray of its own unless an address is given, until it is told to end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from translora_ray import models
from translora_ray.cluster import Cluster
from translora_ray.errors import RunFailed, UsageError
from translora_ray.placement import Resources, cpus, ray_failures, ray_session
from translora_ray.registry import Registry
from translora_ray.serving.app import NAME, Service, application, count, plan

logger = logging.getLogger("ray.serve")
START_SECONDS, END_SECONDS = 600, 30


def run(service: Service, host: str | None, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then let requests that run finish. `host` None: this machine alone where there are no keys, else all addresses."""
    host = host or ("0.0.0.0" if service.keys else "127.0.0.1")
    if not service.keys and not _loopback(host):
        raise UsageError(f"Whoever reaches {host} would be let in: name a file of keys with --keys, or leave --host out to serve this machine alone.")
    if ":" in host:
        raise UsageError(f"--host {host}: IPv6 addresses are not served; name one of IPv4.")
    _require_free(host, port)
    service = service.model_copy(update={"cpus": max(1.0, cpus() // count(service))})
    model, bases = _model(service)
    with ray_failures(), ray_session(Cluster()) as local:
        logger.setLevel(logging.ERROR)  # replicas log to files of their own; here it would tell of its own start
        if serve.status().proxies:
            raise UsageError("Serve runs on that Ray already, with its own port and hosts: give it this service with `serve deploy` (examples/serve.yaml).")
        if lack := lacking(service, len(bases)):
            if local:
                raise UsageError(f"{lack}: lower --replicas, name fewer bases, or give engines less (--set cluster.engine_gpus).")
            say(f"{lack}: waiting for nodes")
        serve.start(http_options={"host": host, "port": port})
        try:
            # Built on this Ray: `ray.serve.llm` looks for one, and would start its own. Until the engines run, signals end the command as they are used to.
            serve.run(application(service), name=NAME, blocking=False)
            with _told_to_end() as ending:
                url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
                _wait_ready(url, ending)
                if not ending.is_set():
                    _greet(service, url, model, say)
                while not ending.wait(1):
                    pass
            say("ending: requests that run may finish")
            _end(service.drain_seconds)
        finally:
            serve.shutdown()  # there was none before


def _end(drain_seconds: float) -> None:
    """Have the gateway refuse new requests until those that run have ended, then Serve end the service: told to wait for that, it raises after a minute."""
    until = time.monotonic() + drain_seconds + END_SECONDS
    with contextlib.suppress(RayError, RayServeException, TimeoutError):  # a gateway that is gone has nothing to finish
        serve.get_app_handle(NAME).drain.remote(drain_seconds).result(timeout_s=drain_seconds + END_SECONDS)
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications and time.monotonic() < until:
        time.sleep(0.2)


@contextlib.contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    ending = threading.Event()
    before = {number: signal.signal(number, lambda *_: ending.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _require_free(host: str, port: int) -> None:
    if not 0 < port < 1 << 16:
        raise UsageError(f"--port {port}: give one from 1 to {(1 << 16) - 1}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"Port {port} of {host} can not be had ({error}): choose another one with --port.") from None


def _wait_ready(url: str, ending: threading.Event) -> None:
    until, direct = time.monotonic() + START_SECONDS, urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
    while not ending.wait(0.2):
        with contextlib.suppress(OSError), direct.open(f"{url}/ready", timeout=10):
            return
        if time.monotonic() > until:
            raise RunFailed(f"The service is not ready after {START_SECONDS} s: Ray's logs are in /tmp/ray/session_latest/logs/serve.")


def lacking(service: Service, bases: int) -> str:
    """What Ray has too little of for the least engines that there are to be, "" where it has enough. A vLLM of whole GPUs asks for CPUs of its own, and may
    spread over nodes."""
    whole, nodes = service.engine == "vllm" and service.gpus >= 1, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    engine = Resources(0.0 if whole else service.cpus, service.gpus)
    if whole:
        nodes = [{"GPU": sum(node.get("GPU", 0.0) for node in nodes)}]
    wanted = bases * (service.replicas if isinstance(service.replicas, int) else service.replicas[0])
    places = sum(engine.places(node) for node in nodes)
    return "" if places >= wanted else f"Ray has room for {places} of the {wanted} engines ({engine.cpus:g} CPU and {engine.gpus:g} GPU each)"


def _model(service: Service) -> tuple[str, tuple[str, ...]]:
    """One to ask for, and the bases. Raises `UsageError` where the service can not work."""
    releases, bases = plan(service)
    served = {models.fingerprint(base) for base in bases}
    names = [release.id for release in releases if release.base_fingerprint in served]
    channels = Registry(service.registry).changes(skip=logger.warning)
    return next(iter([*(channel for channel, change in channels.items() if change["release"] in names), *names]), "NAME"), bases


def _greet(service: Service, url: str, model: str, say: Callable[[str], None]) -> None:
    header = " -H 'Authorization: Bearer KEY'" if service.keys else ""
    say(f"serving {service.registry} at {url}/v1" + ("" if service.keys else ": no keys, for this machine alone (--keys FILE)"))
    pages = sorted(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes() if node["Alive"])
    say(f"  metrics for Prometheus: {' '.join(pages)}")
    say(f"""  curl {url}/v1/completions{header} -H 'Content-Type: application/json' -d '{{"model": "{model}", "prompt": "Hello", "max_tokens": 16}}'""")
