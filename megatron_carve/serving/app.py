"""The HTTP interface: its paths, and the way of a request from its body to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

from aiohttp import web

from megatron_carve.serving.answers import ChatAnswer, CompletionAnswer, usage
from megatron_carve.serving.choice import Choice, Piece, TokenTexts
from megatron_carve.serving.metrics import Metrics
from megatron_carve.serving.prompts import Prompts
from megatron_carve.serving.protocol import ApiError, Chat, Completion, parse
from megatron_carve.serving.worker import Busy, Closed, Refused, Stream, TooSlow, Worker

if TYPE_CHECKING:
    from megatron_carve.data.tokenizer import Tokenizer
    from megatron_carve.use.engine import Sampling

logger = logging.getLogger("megatron_carve")

# New tokens of a completion that does not say, as OpenAI has it; a chat goes on to the end of the sequence.
COMPLETION_TOKENS = 16
# Bytes of a body for each token that a sequence may have: ids as numbers, or texts with escapes.
BODY_BYTES_PER_TOKEN = 32
# Seconds in which a body must have come, and in which a client must take what is written to it.
BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0
# What the page may do: its own script and style, and requests to this server.
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class Gone(Exception):
    """A client does not take what is written to it; its connection has been cut."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is served, and how.

    Attributes:
        name: of the model, for clients.
        tokenizer: None for a model of tokens that are no text.
        vocab_size: token ids that a prompt may have.
        timeout: seconds that a request may take, waiting included.
        write_seconds: in which a client must take what is written to it.
    """

    name: str
    tokenizer: Tokenizer | None
    vocab_size: int
    timeout: float = 600.0
    write_seconds: float = WRITE_SECONDS


class App:
    """Answers requests with what a worker makes.

    Attributes:
        stopping: requests for completions are refused from now on.
    """

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.stopping = False
        self.metrics = Metrics(worker)
        self._created = int(time.time())
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._prompts = Prompts(settings.tokenizer, settings.vocab_size)
        self._turn_ends = self._prompts.turn_ends()
        self._texts = TokenTexts(settings.tokenizer)
        self._page = resources.files("megatron_carve.serving").joinpath("page.html").read_bytes()
        self._open = 0  # requests for completions

    def build(self) -> web.Application:
        """The aiohttp application. The worker must have started."""
        size = max(2**20, BODY_BYTES_PER_TOKEN * self.worker.max_sequence)
        app = web.Application(client_max_size=size, middlewares=[self._middleware])
        app.add_routes(
            [
                web.get("/", self._get_page),
                web.get("/health", self._get_health),
                web.get("/metrics", self._get_metrics),
                web.get("/v1/models", self._get_models),
                web.get("/v1/models/{name:.+}", self._get_model),
                web.post("/v1/completions", self._post_completion),
                web.post("/v1/chat/completions", self._post_chat),
            ]
        )
        app.on_cleanup.append(self._close)
        return app

    @property
    def busy(self) -> bool:
        """Whether a request for a completion is open."""
        return self._open > 0

    async def quiet(self) -> None:
        """Wait until none is."""
        while self.busy:
            await asyncio.sleep(0.02)

    async def _close(self, app: web.Application) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Requests are counted."""
        route = request.match_info.route.resource
        path = "unknown" if route is None else route.canonical
        status = 499
        try:
            response = await self._answer_of(request, handler)
            status = response.status
            return response
        except Gone:
            return web.Response(status=status)  # there is nobody to read it
        finally:
            self.metrics.requests.labels(path, str(status)).inc()

    async def _answer_of(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Errors become answers in OpenAI's form."""
        try:
            return await handler(request)
        except Gone:
            raise
        except web.HTTPException as error:  # aiohttp's own, of paths and methods
            problem = ApiError(error.status, f"{request.method} {request.path:.200}: {error.reason.lower()}")
            allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return await self._answer(request, problem.body(), problem.status, allowed)
        except Exception as error:
            problem = as_api_error(error)
            return await self._answer(request, problem.body(), problem.status)

    async def _get_page(self, request: web.Request) -> web.StreamResponse:
        headers = {"Content-Security-Policy": PAGE_POLICY}
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def _get_health(self, request: web.Request) -> web.StreamResponse:
        ended = self.worker.ended.is_set()
        state = "stopping" if self.stopping else "failed" if ended else "ok"
        return web.json_response({"status": state}, status=200 if state == "ok" else 503)

    async def _get_metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})

    async def _get_models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def _get_model(self, request: web.Request) -> web.StreamResponse:
        self._require_model(request.match_info["name"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.name, "object": "model", "created": self._created, "owned_by": "megatron_carve",
            "max_model_len": self.worker.max_sequence,
        }  # fmt: skip

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"model: only {self.settings.name!r} is served, got {name!r:.80}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _post_completion(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, Completion)

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, Chat)

    async def _complete(self, request: web.Request, kind: type[Completion] | type[Chat]) -> web.StreamResponse:
        start = time.monotonic()
        if self.stopping:
            raise Closed("the server is stopping")
        if self._open >= self.worker.capacity:  # so that bodies do not pile up in memory
            raise Busy(f"{self._open} requests are open, the most that are taken; try again later")
        self._open += 1
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = await self._body(request)
                asked, prompts = await asyncio.get_running_loop().run_in_executor(self._reader, self._read, kind, body)
            return await self._generate(request, asked, prompts, start)
        finally:
            self._open -= 1
            self.metrics.whole.observe(time.monotonic() - start)

    async def _body(self, request: web.Request) -> bytes:
        # A page of another site can send forms and plain text to this address, and no JSON.
        if request.content_type != "application/json":
            raise ApiError(415, f"Content-Type: expected application/json, got {request.content_type!r:.80}")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await request.read()
        except TimeoutError:
            message = f"the body did not come within {BODY_SECONDS:g} s"
            raise ApiError(408, message, kind="timeout_error", code="timeout") from None
        except web.HTTPRequestEntityTooLarge as error:
            raise ApiError(413, f"the body is too large: {error.text}", code="body_too_large") from None

    def _read(
        self, kind: type[Completion] | type[Chat], body: bytes
    ) -> tuple[Completion | Chat, list[tuple[str, list[int]]]]:
        """In the thread that reads: the request, and of every prompt what is echoed and its token ids."""
        asked: Completion | Chat = parse(kind, body)  # type: ignore[type-var]
        self._require_model(asked.model)
        prompts = self._prompts.of(asked)
        echoes = [""] * len(prompts)
        if isinstance(asked, Completion) and asked.echo:
            echoes = self._prompts.texts(asked, prompts)
        return asked, list(zip(echoes, prompts, strict=True))

    async def _generate(
        self, request: web.Request, asked: Completion | Chat, prompts: Sequence[tuple[str, list[int]]], start: float
    ) -> web.StreamResponse:
        count = asked.n or 1
        stop_tokens = self._stop_tokens(asked)
        work = [
            (ids, self._sampling(asked, len(ids), number, stop_tokens))
            for _, ids in prompts for number in range(count)
        ]  # fmt: skip
        choices = [Choice(self.settings.tokenizer, asked.stop, stop_tokens) for _ in work]
        echoes = [echo for echo, _ in prompts for _ in range(count)]
        texts = None if asked.likeliest is None else self._texts
        answer = (ChatAnswer if isinstance(asked, Chat) else CompletionAnswer)(self.settings.name, texts)
        read = sum(len(ids) for _, ids in prompts)
        end = asyncio.get_running_loop().time() + self.settings.timeout - (time.monotonic() - start)
        response = None
        try:
            async with asyncio.timeout_at(end), self.worker.request(work) as stream:
                self.metrics.prompt_tokens.inc(read)
                pieces = self._pieces(stream, choices, start)
                if asked.stream:
                    response = await self._open_stream(request)
                    for number, echo in enumerate(echoes):
                        if opening := answer.opening(number, echo):
                            await self._send(request, response, opening)
                    async for number, piece in pieces:
                        await self._send(request, response, answer.chunk(number, piece))
                    if asked.reports_usage:
                        await self._send(request, response, answer.last(usage(read, _made(choices))))
                    await self._send(request, response, None)
                else:
                    whole = await _joined(pieces, echoes)
        except Exception as error:
            if response is None or isinstance(error, Gone):
                raise
            await self._send(request, response, as_api_error(error).body())
        finally:
            self.metrics.tokens.inc(_made(choices))
        if response is not None:
            return response
        # Outside of the timeout, whose error would follow what is written as an answer to the client's next request.
        return await self._answer(request, answer.whole(whole, usage(read, _made(choices))))

    def _stop_tokens(self, asked: Completion | Chat) -> tuple[int, ...]:
        if self.settings.tokenizer is None:
            return ()
        return (self.settings.tokenizer.eod, *(self._turn_ends if isinstance(asked, Chat) else ()))

    def _sampling(self, asked: Completion | Chat, prompt: int, number: int, stop_tokens: tuple[int, ...]) -> Sampling:
        """Of the choice `number` of a prompt of so many tokens; choices of one seed differ by their number."""
        from megatron_carve.use.engine import Sampling

        longest = self.worker.max_sequence
        most = asked.max_tokens
        if isinstance(asked, Chat):
            most = asked.max_completion_tokens if most is None else most
        if most is None:
            most = max(1, longest - prompt)
            most = most if isinstance(asked, Chat) else min(COMPLETION_TOKENS, most)
        if prompt + most > longest:
            param = "messages" if isinstance(asked, Chat) else "prompt"
            wanted = f"{param}: expected at most {longest} tokens of a prompt and its continuation together"
            raise ApiError(400, f"{wanted}, got {prompt} + {most}", param=param, code="context_length_exceeded")
        return Sampling(
            max_tokens=most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_k=asked.top_k or 0,
            top_p=asked.top_p or 0.0,
            seed=None if asked.seed is None else (asked.seed + number) % 2**63,
            logprobs=asked.likeliest,
            stop_tokens=stop_tokens,
        )

    async def _pieces(
        self, stream: Stream, choices: Sequence[Choice], start: float
    ) -> AsyncIterator[tuple[int, Piece]]:
        """What comes of every choice, until all are complete."""
        first = True
        while any(choice.finish is None for choice in choices):
            steps = await stream.take()
            if first:
                self.metrics.first.observe(time.monotonic() - start)
                first = False
            assert steps, "a request has ended without a word of the engine"
            live = [(number, step) for number, step in steps if choices[number].finish is None]
            for number, step in live:
                choices[number].add(step)
            for number in dict.fromkeys(number for number, _ in live):
                choice = choices[number]
                if choice.finish is not None:
                    self.worker.drop(stream, number)  # where a text ended it, the engine does not know
                if choice.finish not in (None, "stop", "length"):
                    raise Closed(f"the engine gave the request up: {choice.finish}")
                if piece := choice.take():
                    yield number, piece

    async def _open_stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, event: dict[str, Any] | None) -> None:
        """An event of a stream; None for its end."""
        data = b"[DONE]" if event is None else _json(event)
        await self._written(request, response.write(b"data: " + data + b"\n\n"))

    async def _answer(
        self, request: web.Request, body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        """Send a whole answer, and wait until the client has taken it as far as the system does not keep it."""
        headers = {**(headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
        response = web.Response(body=_json(body), status=status, content_type="application/json", headers=headers)

        async def send() -> None:
            await response.prepare(request)
            await response.write_eof()

        await self._written(request, send())
        return response

    async def _written(self, request: web.Request, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self.settings.write_seconds):
                await writing
        except (TimeoutError, ConnectionError):
            if request.transport is not None:
                # At once, with what the system still keeps for it.
                sock = request.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.transport.abort()
            raise Gone from None


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; those of the program itself are logged."""
    match error:
        case ApiError():
            return error
        case Refused():
            return ApiError(400, str(error))
        case Busy():
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full")
        case Closed():
            return ApiError(503, str(error), kind="server_error", code="unavailable")
        case TooSlow():
            return ApiError(408, str(error), kind="timeout_error", code="too_slow")
        case TimeoutError():
            return ApiError(504, "the request took too long", kind="timeout_error", code="timeout")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__} in the server, whose log says more", kind="server_error")


async def _joined(pieces: AsyncIterator[tuple[int, Piece]], echoes: Sequence[str]) -> list[Piece]:
    """Every choice as one piece."""
    parts: list[list[Piece]] = [[Piece(echo, [], None)] for echo in echoes]
    async for number, piece in pieces:
        parts[number].append(piece)
    return [
        Piece("".join(p.text for p in part), [token for p in part for token in p.tokens], part[-1].finish)
        for part in parts
    ]


def _made(choices: Sequence[Choice]) -> int:
    return sum(choice.count for choice in choices)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
