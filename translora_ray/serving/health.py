"""Which engines have a replica that runs, as Serve sees it: an engine that is asked itself answers after the requests that wait there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from ray import serve
from ray.serve.handle import DeploymentHandle

from translora_ray.serving.protocol import ServiceError

logger = logging.getLogger("ray.serve")
SECONDS = 2.0
"""Between two looks."""
WORKING = {"RUNNING", "RECOVERING", "UPDATING"}
_T = TypeVar("_T")


class Health:
    """Engines by the fingerprint of their base; `running` are those of which a replica runs."""

    def __init__(self, engines: Mapping[str, DeploymentHandle]) -> None:
        self.engines = engines
        self.running: set[str] = set()
        self._seen = dict.fromkeys(engines, time.monotonic())
        """When each was last known to run, or may have."""

    async def watch(self) -> None:
        """Ask Serve again and again, for ever. While its controller is away all stays as it was."""
        said: str | None = None
        while True:
            try:
                self.running, now = await asyncio.to_thread(self._look), None
                self._seen |= dict.fromkeys(self.running, time.monotonic())
            except Exception as error:  # whatever it is, it is tried again in a moment
                now = f"{type(error).__name__}: {error}"
                if now != said:
                    logger.warning(f"Serve does not tell which engines run: {now}")
            said = now
            await asyncio.sleep(SECONDS)

    def all_run(self) -> bool:
        return self.running == set(self.engines)

    async def while_running(self, engine: str, answer: Coroutine[Any, Any, _T], patience: float = 0.0) -> _T:
        """The answer, or 503 where the engine has had no replica for `patience` seconds: Serve itself lets a request wait for the next one for ever."""
        step = asyncio.ensure_future(answer)
        try:
            while engine in self.running or time.monotonic() - self._seen[engine] < patience:
                if (await asyncio.wait([step], timeout=SECONDS))[0]:
                    return step.result()
        finally:
            step.cancel()  # nothing, where it is done
        raise ServiceError(503, "engine_unavailable", "The engine is not available at the moment: try again.", 5)

    def _look(self) -> set[str]:
        applications = serve.status().applications
        found = set()
        for fingerprint, handle in self.engines.items():
            deployments = applications[handle.app_name].deployments if handle.app_name in applications else {}
            states = {state for state, count in deployments[handle.deployment_name].replica_states.items() if count} if deployments else set()
            # After a restart Serve's controller takes replicas over that answer all the while.
            if states & (WORKING if fingerprint in self.running else {"RUNNING"}):
                found.add(fingerprint)
        return found
