"""Many clients, and clients that go away, do not read, or ask for too much."""

import asyncio
import gc
import gzip
import json
import logging
import socket
import struct

import psutil
import pytest
from support.engine import Parrot
from support.serving import mixed_requests, served


def asked(body, *, host="x"):
    """The bytes of a request for a completion."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def raw(address):
    """A connection that keeps little for its reader."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = address.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    return sock


def run(scenario, engine=None, **options):
    async def whole():
        async with served(engine, **options) as client:
            await scenario(client)
            await client.until_free()

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def quiet_logs(caplog):
    """Nothing that clients do is an error of the program."""
    with caplog.at_level(logging.WARNING):
        yield
    # caplog.records are by now those of the fixture's own end
    assert not [record.getMessage() for record in caplog.get_records("call")]


def test_100_clients_each_get_their_own_text():
    async def scenario(client):
        async def one(number):
            prompt, length = f"client {number}: é", 20 + number
            wanted = ((prompt * 10).encode()[:length]).decode(errors="replace")
            if number % 2:
                found = (await client.complete(prompt, max_tokens=length))["choices"][0]["text"]
            else:
                events = await client.events("/v1/completions", {"prompt": prompt, "max_tokens": length})
                found = "".join(event["choices"][0]["text"] for event in events)
            assert found == wanted

        await asyncio.gather(*(one(number) for number in range(100)))

    run(scenario, Parrot(max_requests=16))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_request(stream):
    async def scenario(client):
        for end in ("close", "reset"):
            socks = [raw(client.address) for _ in range(5)]
            for sock in socks:
                sock.send(asked({"prompt": "abc", "max_tokens": 10**6, "stream": stream}))
            while client.worker.running < 5 or client.engine.idle():
                await asyncio.sleep(0.01)
            for sock in socks:
                if end == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            await client.until_free()
        assert len(client.engine.cancelled) == 10 and client.engine.steps < 5000
        assert 'path="/v1/completions",status="499"} 10.0' in (await client.get("/metrics"))[1]

    run(scenario, Parrot(max_sequence=2 * 10**6, seconds=0.001))


def test_a_request_that_never_comes_whole_takes_nothing_with_it():
    async def scenario(client):
        socks = [raw(client.address) for _ in range(20)]
        for number, sock in enumerate(socks):
            sock.send(asked({"prompt": "abc"})[: 20 + 7 * number])
        await asyncio.sleep(0.1)
        assert (await client.complete("abc", max_tokens=3))["choices"][0]["text"] == "abc"
        for sock in socks:
            sock.close()
        garbage = raw(client.address)
        garbage.send(b"\x00\xff nothing of HTTP\r\n\r\n")
        await asyncio.sleep(0.05)
        assert garbage.recv(100).startswith(b"HTTP/1.0 400")
        garbage.close()

    run(scenario)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("megatron_carve.serving.app.BODY_SECONDS", 0.1)

    async def scenario(client):
        reader, writer = await asyncio.open_connection(*client.address.removeprefix("http://").split(":"))
        writer.write(asked({"prompt": "abc"})[:-3])
        answer = await reader.readuntil(b"}}")
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the body did not come within 0.1 s" in answer
        writer.close()

    run(scenario)


def test_a_packed_body_is_bounded_by_what_is_in_it():
    async def scenario(client):
        body = gzip.compress(json.dumps({"prompt": "a" * 2**24}).encode())
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with client.session.post("/v1/completions", data=body, headers=headers) as answer:
            assert answer.status == 413 and "the body is too large" in (await answer.json())["error"]["message"]

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_who_does_not_read_is_cut_off_and_stalls_nobody(stream):
    """Long before all that it asked for has been made, and with little of it in memory."""

    async def scenario(client):
        slow = raw(client.address)
        body = {"prompt": "abc" * 500, "max_tokens": 10**5, "stream": stream}
        slow.send(asked(body if stream else {**body, "n": 10, "max_tokens": 500, "logprobs": 3}))
        await asyncio.sleep(0.1)
        for _ in range(20):
            async with asyncio.timeout(5):
                assert (await client.complete("abc", max_tokens=3))["choices"][0]["text"] == "abc"
        async with asyncio.timeout(20):
            await client.until_free()
        slow.settimeout(5)
        with pytest.raises(ConnectionResetError):
            while await asyncio.to_thread(slow.recv, 2**16):
                pass
        slow.close()

    run(scenario, Parrot(max_requests=101, max_sequence=2 * 10**5), write_seconds=0.3)


def test_who_does_not_read_what_was_wrong_is_cut_off_too():
    async def scenario(client):
        mute = raw(client.address)
        mute.settimeout(5)
        wrong = asked({"prompt": "abc", "n": 0})
        with pytest.raises(ConnectionError):
            while True:
                await asyncio.to_thread(mute.sendall, wrong)
        mute.close()

    run(scenario, write_seconds=0.3)


def test_a_whole_answer_that_is_taken_late_is_the_only_one():
    """The time of its request passes while it is written."""

    async def scenario(client):
        late = raw(client.address)
        late.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=late, limit=2**12)
        writer.write(asked({"prompt": "abc" * 10**5, "max_tokens": 3, "echo": True}))
        await asyncio.sleep(2.2)
        for text in ("abc" * 10**5 + "abc", "abc"):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            assert json.loads(body)["choices"][0]["text"] == text
            writer.write(asked({"prompt": "abc", "max_tokens": 3}))
        writer.close()

    run(scenario, Parrot(max_sequence=10**6), timeout=2)


def test_who_falls_too_far_behind_is_given_up_at_once():
    """While it may still take what was written before."""

    async def scenario(client):
        reader, writer = await asyncio.open_connection(*client.address.removeprefix("http://").split(":"), limit=2**12)
        writer.write(asked({"prompt": "abc" * 500, "max_tokens": 10**5, "stream": True}))
        async with asyncio.timeout(10):
            while not client.engine.cancelled:
                await asyncio.sleep(0.01)
        assert client.engine.idle() and client.app.busy
        received = b""
        while not received.endswith(b"\n0\r\n\r\n"):
            received += await reader.read(2**16)
        assert b'"message":"the reader is 1024 steps behind"' in received.splitlines()[-5]
        writer.close()

    run(scenario, Parrot(max_sequence=2 * 10**5))


def test_who_reads_slowly_gets_it_all():
    async def scenario(client):
        reader, writer = await asyncio.open_connection(*client.address.removeprefix("http://").split(":"), limit=2**12)
        writer.write(asked({"prompt": "abcdefgh", "max_tokens": 4000, "stream": True}))
        received = b""
        while not received.endswith(b"\n0\r\n\r\n"):
            received += await reader.read(2000)
            await asyncio.sleep(0.001)
        events = [line[6:] for line in received.decode().splitlines() if line.startswith("data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "abcdefgh" * 500
        writer.close()

    run(scenario, Parrot(max_sequence=10**5, seconds=1e-5))


def test_a_full_queue_refuses_and_says_so():
    async def scenario(client):
        body = {"prompt": "abc", "max_tokens": 10**5}
        held = [asyncio.create_task(client.post("/v1/completions", body)) for _ in range(5)]
        while client.worker.running < 5:
            await asyncio.sleep(0.01)
        metrics = (await client.get("/metrics"))[1]
        assert "megatron_carve_choices_running 4.0" in metrics and "megatron_carve_choices_waiting 1.0" in metrics
        status, answer = await client.post("/v1/completions", {"prompt": "abc", "n": 2})
        assert status == 429, answer
        wanted = "5 of at most 6 choices are running or waiting; try again later"
        assert answer["error"] == {"message": wanted, "type": "rate_limit_error", "param": None, "code": "queue_full"}
        status, answer = await client.post("/v1/completions", {"prompt": "abc", "n": 7})  # which no waiting helps
        wanted = "n: expected at most 6 choices for all prompts together, got 7"
        assert (status, answer["error"]["message"]) == (400, wanted)
        held.append(asyncio.create_task(client.post("/v1/completions", body)))
        while client.worker.running < 6:
            await asyncio.sleep(0.01)
        async with client.session.post("/v1/completions", json=body) as refused:  # before its body is read
            assert refused.status == 429 and refused.headers["Retry-After"] == "1"
            assert (await refused.json())["error"][
                "message"
            ] == "6 requests are open, the most that are taken; try again later"
        for task in held:
            task.cancel()
        await client.until_free()
        assert (await client.complete("abc", max_tokens=3))["choices"][0]["text"] == "abc"

    run(scenario, Parrot(max_sequence=10**6, seconds=0.001), waiting=2)


def test_a_request_that_takes_too_long_ends_with_an_error():
    async def scenario(client):
        body = {"prompt": "abc", "max_tokens": 10**5}
        status, answer = await client.post("/v1/completions", body)
        assert status == 504 and answer["error"]["code"] == "timeout"
        *parts, last = await client.events("/v1/completions", body)
        assert len(parts) > 3 and last["error"]["message"] == "the request took too long"

    run(scenario, Parrot(max_sequence=10**6, seconds=0.01), timeout=1)


def test_the_event_loop_answers_while_the_engine_steps():
    async def scenario(client):
        task = asyncio.create_task(client.complete("abc", max_tokens=3))
        while client.engine.idle():
            await asyncio.sleep(0.01)
        before = client.engine.steps
        for _ in range(10):
            assert (await client.get("/health"))[0] == 200
        assert client.engine.steps <= before + 2  # and not one for each
        await task

    run(scenario, Parrot(seconds=0.3))


def test_1000_requests_leave_nothing_behind():
    memory = psutil.Process().memory_info

    async def scenario(client):
        await mixed_requests(client.address, 300, seed=1, tokens=10, abandoned=1000)
        await client.until_free()
        gc.collect()
        before, tasks = memory().rss, len(asyncio.all_tasks())
        await mixed_requests(client.address, 1000, seed=2, tokens=10, abandoned=1000)
        await client.until_free()
        gc.collect()
        assert memory().rss - before < 3 * 2**20
        assert len(asyncio.all_tasks()) <= tasks and not client.worker._streams

    run(scenario, Parrot(max_sequence=2 * 10**5))
