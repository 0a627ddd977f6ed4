"""Servers for tests: in the event loop of a test, or as a process of its own with an engine that needs no model."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web
from support.engine import Parrot

from megatron_carve.data.tokenizer import Tokenizer, load_tokenizer
from megatron_carve.serving.app import App, Settings
from megatron_carve.serving.server import bound_socket, runner_of, serve, url
from megatron_carve.serving.worker import Worker


class Client:
    """A server and a client of it in one event loop.

    Attributes:
        engine: the server's.
        app, worker: its parts.
    """

    def __init__(self, engine: Any, app: App, worker: Worker, session: aiohttp.ClientSession, address: str) -> None:
        self.engine, self.app, self.worker, self.session, self.address = engine, app, worker, session, address

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON of an answer; `body` is JSON, or bytes as they are."""
        kind = {"data": body, "headers": {"Content-Type": "application/json"}} if isinstance(body, bytes) else {}
        async with self.session.post(path, **(kind or {"json": body}), **options) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, str]:
        async with self.session.get(path) as answer:
            return answer.status, await answer.text()

    async def complete(self, prompt: Any, **fields: Any) -> Any:
        """The JSON of a completion that succeeds."""
        status, answer = await self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return answer

    async def events(self, path: str, body: Any) -> list[Any]:
        """All of a stream, which must have ended as streams do unless the last event is an error."""
        async with self.session.post(path, json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            lines = (await answer.read()).decode().split("\n\n")
        assert lines.pop() == ""
        events = [line.removeprefix("data: ") for line in lines]
        if events[-1] == "[DONE]":
            return [json.loads(event) for event in events[:-1]]
        assert "error" in json.loads(events[-1])
        return [json.loads(event) for event in events]

    async def until_free(self) -> None:
        """Wait until the engine has nothing to do, and the server remembers no request."""
        async with asyncio.timeout(30):
            while not self.engine.idle() or self.worker.running or self.app.busy or self.worker._owners:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def served(
    engine: Any = None, *, tokenizer: Tokenizer | str | None = "bytes", waiting: int = 300, **settings: Any
) -> AsyncIterator[Client]:
    """A server in this event loop."""
    engine = Parrot() if engine is None else engine
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    worker = Worker(lambda: contextlib.closing(engine), waiting=waiting)
    await worker.start()
    app = App(worker, Settings("parrot", tokenizer, 257 if tokenizer is None else tokenizer.vocab_size, **settings))
    runner = runner_of(app)
    await runner.setup()
    sock = bound_socket("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # so that who does not read shows soon
    await web.SockSite(runner, sock).start()
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(url(sock), connector=connector) as session:
            yield Client(engine, app, worker, session, url(sock))
    finally:
        await runner.cleanup()
        await worker.close(5)


@contextlib.contextmanager
def server_process(
    command: list[str], *, ends_with: int = 143, timeout: float = 120, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address; it must end as it should when it is stopped."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()[-4000:]
        yield process, line.split()[-1]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=timeout) == ends_with, process.stderr.read()[-4000:]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


async def mixed_requests(address: str, count: int, *, seed: int, tokens: int, abandoned: int) -> None:
    """Whole answers, streams, mistakes, and clients that go away, eight at a time.

    Args:
        tokens: at most, of an answer.
        abandoned: tokens of an answer that its client does not wait for.
    """
    draw = random.Random(seed)
    turns = asyncio.Semaphore(8)

    async def one(session: aiohttp.ClientSession, kind: str) -> None:
        body = {"prompt": "some text é" * draw.randrange(1, 4), "max_tokens": draw.randrange(1, tokens), "logprobs": 2}
        async with turns:
            if kind == "wrong":
                async with session.post("/v1/completions", json={**body, "n": 0}) as answer:
                    assert answer.status == 400
            elif kind == "gone":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await (await session.post("/v1/completions", json={**body, "max_tokens": abandoned})).read()
            else:
                async with session.post("/v1/completions", json={**body, "stream": kind == "stream"}) as answer:
                    assert answer.status == 200
                    await answer.read()

    async with aiohttp.ClientSession(address) as session:
        kinds = [draw.choice(["whole", "stream", "wrong", "gone"]) for _ in range(count)]
        await asyncio.gather(*(one(session, kind) for kind in kinds))


async def growth_over_1000_requests(address: str, pid: int, *, tokens: int, abandoned: int) -> int:
    """Bytes that a server's process is larger after 1,000 mixed requests than after the 300 before."""
    memory = psutil.Process(pid).memory_info
    await mixed_requests(address, 300, seed=1, tokens=tokens, abandoned=abandoned)
    before = memory().rss
    await mixed_requests(address, 1000, seed=2, tokens=tokens, abandoned=abandoned)
    print(f"resident: {before / 2**20:.1f} MiB after 300 requests, {memory().rss / 2**20:.1f} after 1300")
    return memory().rss - before


TESTS = str(Path(__file__).parents[1])
START = f"import sys; sys.path.insert(0, {TESTS!r}); from support.serving import main; main()"
PARROT = [sys.executable, "-P", "-c", START]


def main() -> None:
    """A server of its own with the engine that needs no model; words are its options, as JSON."""
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    with bound_socket("127.0.0.1", 0) as sock:
        settings = Settings("parrot", load_tokenizer("bytes"), 257)
        by = asyncio.run(
            serve(
                lambda: contextlib.closing(Parrot(**options)), settings, sock, waiting=300, grace=1,
                ready=lambda: print(url(sock), flush=True),
            )
        )  # fmt: skip
    sys.exit(128 + by)
