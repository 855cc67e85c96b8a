"""What the ingress reads: a client's body, an engine's pieces. Whatever goes wrong there is an error that a client understands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect

from translora_ray.serving.protocol import Piece, ServiceError

logger = logging.getLogger("ray.serve")


async def read_body(request: Request, most: int) -> bytes:
    too_large = ServiceError(413, "request_too_large", f"The request's body is larger than the {most} bytes that this key may send.")
    if (length := request.headers.get("content-length", "")).isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise ServiceError(400, "invalid_request", "The request ended before its body.") from None
    return bytes(body)


async def read_pieces(answer: Any) -> AsyncIterator[Piece]:
    """An engine's pieces. What Ray or Serve raise when a replica dies or is full is an error that a client may try again after.

    Who stops waiting has the engine stop, too: Serve does that for a client's requests alone.
    """
    try:
        async for piece in answer:
            yield piece
    except asyncio.CancelledError:
        answer.cancel()
        raise
    except RayTaskError as error:
        if isinstance(error.cause, ServiceError):
            raise error.cause from None
        logger.error(f"an engine failed: {error}")
        raise ServiceError(503, "engine_failed", "The engine failed on this request: try again.", 1) from None
    except (RayError, RayServeException) as error:
        logger.error(f"an engine is not available: {error}")
        raise ServiceError(503, "engine_unavailable", "The engine is not available at the moment: try again.", 2) from None
