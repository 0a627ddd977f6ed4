"""What clients may ask, in the form of OpenAI's interface, and how they are told what is wrong with it."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

# A request's choices, and the likeliest tokens that are named beside each.
MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
# Of a value, in a message that names it.
SHOWN = 80


class ApiError(Exception):
    """An answer that says what is wrong.

    Attributes:
        status: of HTTP.
        kind: invalid_request_error, rate_limit_error, timeout_error or server_error.
        param: the field that is meant.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of texts or of lists of ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(prompts, list) or not all(isinstance(p, str) or (p and _are_ids(p)) for p in prompts):
        raise ValueError(f"expected a text, token ids, or a list of these, got {_shown(value)}")
    if not 1 <= len(prompts) <= MOST_CHOICES:
        raise ValueError(f"expected 1 to {MOST_CHOICES} prompts, got {len(prompts)}")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"expected a text that is not empty, or a list of such, got {_shown(value)}")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"expected at most {MOST_STOPS} texts, got {len(stops)}")
    return tuple(stops)


def _content(value: Any) -> str:
    """A text, or parts of type "text", which follow each other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        and isinstance(part["text"], str) for part in value
    ):  # fmt: skip
        return "".join(part["text"] for part in value)
    raise ValueError(f'expected a text, or parts {{"type": "text", "text": TEXT}}, got {_shown(value)}')


def _nothing(value: Any) -> Any:
    """Fields that clients send, and that change nothing where they have these values."""
    if value not in (None, 0, {}, [], ""):
        raise ValueError(f"this is not served, got {_shown(value)}")
    return value


def _only(*allowed: Any) -> AfterValidator:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"only {' or '.join(map(repr, allowed))} is served, got {_shown(value)}")
        return value

    return AfterValidator(check)


Nothing = Annotated[Any, AfterValidator(_nothing)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class _Request(_Body):
    """What both kinds of completions take; `top_k` is not OpenAI's."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Nothing = None

    @property
    def reports_usage(self) -> bool:
        """In a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected with stream alone")
        return self


class Completion(_Request):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int | None, _only(None, 1)] = None
    suffix: Nothing = None

    @property
    def likeliest(self) -> int | None:
        """Tokens named beside each; None for no log-probabilities."""
        return self.logprobs

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if (count := len(self.prompt) * (self.n or 1)) > MOST_CHOICES:
            raise ValueError(f"n: expected at most {MOST_CHOICES} choices of all prompts together, got {count}")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of a prompt are not served; leave out echo or logprobs")
        return self


class Message(_Body):
    role: Annotated[str, Field(min_length=1)]
    content: Annotated[str, BeforeValidator(_content)]


class ResponseFormat(_Body):
    type: Annotated[str, _only("text")]


class Chat(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing = None

    @property
    def likeliest(self) -> int | None:
        """Tokens named beside each; None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected with logprobs alone")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: expected this or max_completion_tokens, got both")
        return self


def parse[T: _Body](kind: type[T], body: bytes) -> T:
    """A request of this kind.

    Raises:
        ApiError: 400, with the first thing that is wrong in it.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    message, where = first["msg"], ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        if not where:  # of the whole, whose messages begin with the field
            where, _, message = message.partition(": ")
    elif first["type"] == "extra_forbidden":
        message = "unknown field"
    elif first["type"] == "missing":
        message = "expected this field, which is missing"
    else:
        message = f"{message[:1].lower()}{message[1:]}, got {_shown(first['input'])}"
    raise ApiError(400, f"{where or 'body'}: {message}", param=where or None)
