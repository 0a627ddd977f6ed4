"""The life of a server: what its clients and its caller see when it is told to stop, or its engine fails."""

import asyncio
import contextlib
import os
import signal

import aiohttp
import pytest
from support.engine import Parrot

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.serving.app import Settings
from megatron_carve.serving.server import bound_socket, serve, url


def life(scenario, engine, *, grace=1.0):
    """The signal that ended a server, which `scenario` has sent; what it returns, after the end."""

    async def whole():
        ready = asyncio.Event()
        with bound_socket("127.0.0.1", 0) as sock:
            address = url(sock)
            server = asyncio.create_task(
                serve(
                    lambda: contextlib.closing(engine), Settings("parrot", load_tokenizer("bytes"), 257), sock,
                    waiting=10, grace=grace, ready=ready.set,
                )
            )  # fmt: skip
            await ready.wait()
            async with aiohttp.ClientSession(address) as session:
                result = await scenario(session)
                async with asyncio.timeout(10):
                    return await server, result

    kept = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        return asyncio.run(whole())
    finally:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == kept
        assert engine.closed


async def status_and_json(session, body):
    async with session.post("/v1/completions", json=body) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_finishes_what_it_can_and_tells_the_others(number):
    engine = Parrot(seconds=0.01, max_sequence=10**6)

    async def scenario(session):
        short = asyncio.create_task(status_and_json(session, {"prompt": "abc", "max_tokens": 10}))
        long = asyncio.create_task(status_and_json(session, {"prompt": "abc", "max_tokens": 10**5}))
        stream = await session.post("/v1/completions", json={"prompt": "abc", "max_tokens": 10**5, "stream": True})
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        async with session.get("/health") as health:
            assert (health.status, await health.text()) == (503, '{"status": "stopping"}')
        refused = await status_and_json(session, {"prompt": "abc"})
        return refused, await short, await long, (await stream.read()).decode()

    by, (refused, short, long, stream) = life(scenario, engine)
    assert by == number
    assert short[0] == 200 and len(short[1]["choices"][0]["text"]) == 10
    for status, answer in (refused, long):
        assert status == 503 and answer["error"]["message"] == "the server is stopping"
    assert stream.rstrip().splitlines()[-1].startswith('data: {"error":{"message":"the server is stopping"')


def test_a_second_signal_ends_what_runs():
    async def scenario(session):
        long = asyncio.create_task(status_and_json(session, {"prompt": "abc", "max_tokens": 10**5}))
        await asyncio.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
        return await long

    by, (status, _) = life(scenario, Parrot(seconds=0.01, max_sequence=10**6), grace=1000)
    assert (by, status) == (signal.SIGINT, 503)


def test_who_does_not_read_holds_up_no_end(monkeypatch):
    monkeypatch.setattr("megatron_carve.serving.server.LAST_SECONDS", 0.2)

    async def scenario(session):
        body = {"prompt": "abc" * 100, "max_tokens": 10**5, "n": 100, "stream": True}
        await session.post("/v1/completions", json=body)  # and its answer is not read
        await asyncio.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    assert life(scenario, Parrot(max_sequence=10**6, max_requests=100))[0] == signal.SIGTERM


def test_when_the_engine_fails_clients_are_told_and_the_server_ends(caplog):
    async def scenario(session):
        long = asyncio.create_task(status_and_json(session, {"prompt": "abc", "max_tokens": 10**5}))
        await asyncio.sleep(0.05)
        failed = await status_and_json(session, {"prompt": "a~", "max_tokens": 50})
        assert failed[0] == (await long)[0] == 503
        assert failed[1]["error"]["message"] == "the engine has failed"

    with pytest.raises(RuntimeError, match="the engine failed") as raised:
        life(scenario, Parrot(seconds=0.01, max_sequence=10**6, fails_on=ord("~")))
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert "the engine failed: ArithmeticError: this token is not for me" in caplog.text


def test_an_engine_that_cannot_be_made_is_no_server():
    def make():
        raise ValueError("max_sequence: expected memory for it")

    async def whole():
        with bound_socket("127.0.0.1", 0) as sock:
            settings = Settings("parrot", load_tokenizer("bytes"), 257)
            await serve(make, settings, sock, waiting=1, grace=0, ready=lambda: pytest.fail("it is not ready"))

    with pytest.raises(ValueError, match="max_sequence: expected memory for it"):
        asyncio.run(whole())


def test_an_address_that_cannot_be_had_is_named():
    with bound_socket("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match=rf"listen on 127\.0\.0\.1 port {port}: Address already in use"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(OSError, match=r"^--host, --port: cannot listen on no\.such\.host\.invalid port 1: "):
        bound_socket("no.such.host.invalid", 1)
