"""OpenAI's HTTP protocol, as much of it as is served: what may be asked, what is answered, what errors look like. No Ray and no web server.

Fields that nothing here honours are refused by name, but for those at the value that changes nothing: an answer that ignores what was asked
for would be a silent fallback. Both engines take the same requests, so a client need not know which one answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from translora_ray.errors import TransLoraError

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ServiceError(TransLoraError):
    """An error with its HTTP status, a code for programs and a sentence for people; 429 and 503 say after how many seconds to try again."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, code, message, retry_after)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "invalid_request_error"), "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}


def unknown(model: str) -> ServiceError:
    """The answer for a name that does not exist and for one that the key may not use: one can not be told from the other."""
    return ServiceError(404, "model_not_found", f"There is no model {model[:200]!r} for this key: GET /v1/models lists those there are.")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        """A field that this service does not know is not asked for where it is null: some clients send all that they know."""
        return {name: value for name, value in fields.items() if name in cls.model_fields or value is not None} if isinstance(fields, dict) else fields


class _Part(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Text(_Fields):
    type: Literal["text"]


class _StreamOptions(_Fields):
    include_usage: bool = False


def _off(value: bool) -> bool:
    if value:
        raise ValueError("this service does not take it")
    return value


_Off = Annotated[bool, AfterValidator(_off)] | None
_Nothing = Annotated[float, Field(ge=0, le=0)] | None
_Empty = Annotated[dict[str, float], Field(max_length=0)] | None
_Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Asked(_Fields):
    """What both routes take. Defaults are OpenAI's; `min_p` is an extension of vLLM's, which both engines have."""

    model: str = Field(max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = 1
    user: str | None = None
    presence_penalty: _Nothing = None
    frequency_penalty: _Nothing = None
    logit_bias: _Empty = None
    logprobs: _Off = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        return self.max_tokens


class ChatRequest(_Asked):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: _Text | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    echo: _Off = None
    best_of: Literal[1] | None = None


@dataclass(frozen=True)
class Asked:
    """A checked request on its way to an engine. `messages` are (role, text), or one ("", prompt) that is continued as it stands.

    `max_tokens` None: as many as the context has room for, `most` at most.
    """

    release: str
    chat: bool
    messages: tuple[tuple[str, str], ...]
    max_tokens: int | None
    most: int
    temperature: float
    top_p: float | None
    min_p: float
    stop: tuple[str, ...]
    seed: int | None
    stream: bool

    def opening(self) -> str:
        """All up to what the user said first, which is the same in every request of a conversation; or the prompt."""
        first = next((i for i, (role, _) in enumerate(self.messages) if role == "user"), 0)
        return json.dumps(self.messages[: first + 1])


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a `finish` and the counts of tokens; where nothing is streamed it is the only one."""

    text: str
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    tokens: int = 0


_R = TypeVar("_R", bound=_Asked)


def parse(kind: type[_R], body: bytes, most: int) -> _R:
    """A request from its body; raises `ServiceError` 400 that names the field. `most` is the largest number of tokens that may be asked for."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in found["loc"])
        what = "this service does not take it" if found["type"] == "extra_forbidden" else found["msg"]
        raise ServiceError(400, "invalid_request", f"{where[:200] or 'body'}: {what[:300]}.") from None
    if (wanted := request.limit()) and "max_tokens" not in request.model_fields_set and not isinstance(request, ChatRequest):
        wanted = request.max_tokens = min(wanted, most)  # nobody asked for the default
    if wanted and wanted > most:
        raise ServiceError(400, "invalid_request", f"max_tokens is {wanted}, this key may ask for {most} at most.")
    return request


def asked(request: ChatRequest | CompletionRequest, release: str, most: int) -> Asked:
    if isinstance(request, ChatRequest):
        messages: tuple[tuple[str, str], ...] = tuple((message.role, message.text()) for message in request.messages)
    else:
        messages = (("", request.prompt if isinstance(request.prompt, str) else request.prompt[0]),)
    return Asked(
        release=release,
        chat=isinstance(request, ChatRequest),
        messages=messages,
        max_tokens=request.limit(),
        most=most,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p,
        min_p=request.min_p or 0.0,
        stop=request.stops(),
        seed=request.seed,
        stream=bool(request.stream),
    )


def usage(piece: Piece) -> dict[str, int]:
    return {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.tokens, "total_tokens": piece.prompt_tokens + piece.tokens}


def answer(identity: str, created: int, model: str, chat: bool, piece: Piece) -> dict[str, Any]:
    """A whole answer. `model` is the release that answered, whatever channel was asked for."""
    said = {"message": {"role": "assistant", "content": piece.text}} if chat else {"text": piece.text}
    kind = "chat.completion" if chat else "text_completion"
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": piece.finish}
    return {"id": identity, "object": kind, "created": created, "model": model, "choices": [choice], "usage": usage(piece)}


def event(identity: str, created: int, model: str, chat: bool, piece: Piece, first: bool) -> str:
    """One server-sent event of a streamed answer."""
    delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
    choice = {"index": 0, **({"delta": delta} if chat else {"text": piece.text}), "logprobs": None, "finish_reason": piece.finish}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return sent({"id": identity, "object": kind, "created": created, "model": model, "choices": [choice]})


def usage_event(identity: str, created: int, model: str, chat: bool, piece: Piece) -> str:
    """The event with which a stream ends where `stream_options.include_usage` was asked for."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return sent({"id": identity, "object": kind, "created": created, "model": model, "choices": [], "usage": usage(piece)})


def sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


DONE = "data: [DONE]\n\n"
