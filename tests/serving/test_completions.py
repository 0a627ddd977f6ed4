"""What completions and chat completions answer, whole and as streams, with an engine that repeats its prompt."""

import asyncio
import json

import pytest
from support.chats import write_chat_tokenizer
from support.engine import Parrot, logprob
from support.serving import served

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.serving.app import App

TEXT = "héllo 🙂 €!"


def answered(scenario, **options):
    """What `scenario` returns, given a client of a server."""

    async def run():
        async with served(**options) as client:
            result = await scenario(client)
            await client.until_free()
            return result

    return asyncio.run(run())


def texts(answer):
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def joined(events, number=0):
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == number)


def test_a_completion_is_the_engines_text():
    async def scenario(client):
        return await client.complete(TEXT, max_tokens=2 * len(TEXT.encode()), model="parrot", user="me")

    answer = answered(scenario)
    size = len(TEXT.encode())
    assert answer["object"] == "text_completion" and answer["model"] == "parrot" and answer["id"].startswith("cmpl-")
    choice = {"index": 0, "text": TEXT * 2, "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {"prompt_tokens": size, "completion_tokens": 2 * size, "total_tokens": 3 * size}


def test_prompts_come_as_texts_and_token_ids():
    async def scenario(client):
        for prompt in ("ab", [97, 98], ["ab"], [[97, 98]]):
            assert texts(await client.complete(prompt, max_tokens=3)) == ["aba"]
        assert texts(await client.complete(["ab", [99]], n=2, max_tokens=2)) == ["ab", "ab", "cc", "cc"]
        # Nothing begins a document, and the end of one is no text.
        answer = await client.complete("", max_tokens=5)
        assert (texts(answer), answer["choices"][0]["finish_reason"]) == ([""], "stop")
        assert answer["usage"]["completion_tokens"] == 1
        answer = await client.complete([97, 98, 256, 99], max_tokens=50)
        assert (texts(answer), answer["choices"][0]["finish_reason"]) == (["ab"], "stop")
        # What is asked for without a number is 16 tokens.
        assert len(texts(await client.complete("a"))[0]) == 16

    answered(scenario)


def test_choices_of_a_seed_differ_and_come_again():
    async def scenario(client):
        first = texts(await client.complete("abcdef", n=3, seed=2, max_tokens=3))
        assert first == ["cde", "def", "efa"]  # the engine begins with the seed's token
        events = await client.events("/v1/completions", {"prompt": "abcdef", "n": 3, "seed": 2, "max_tokens": 3})
        assert [joined(events, number) for number in range(3)] == first

    answered(scenario)


@pytest.mark.parametrize("stop", ["🙂 €", ["never", "lo 🙂"], "\u20ac", "h"])
def test_nothing_of_a_stop_or_after_it_comes(stop):
    stops = [stop] if isinstance(stop, str) else stop
    wanted = TEXT[: min(TEXT.index(s) for s in stops if s in TEXT)]

    async def scenario(client):
        answer = await client.complete(TEXT, stop=stop, max_tokens=500)
        assert (texts(answer), answer["choices"][0]["finish_reason"]) == ([wanted], "stop")
        events = await client.events("/v1/completions", {"prompt": TEXT, "stop": stop, "max_tokens": 500})
        assert joined(events) == wanted
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        await client.until_free()
        assert len(client.engine.cancelled) == 2  # the engine does not go on to 500

    answered(scenario, engine=Parrot(seconds=0.001))


def test_a_choice_that_a_stop_ends_is_over_while_others_go_on(monkeypatch):
    """Although the engine has gone on with it, while what came before was written."""
    send = App._send

    async def slowly(*arguments):
        await asyncio.sleep(0.005)
        await send(*arguments)

    async def scenario(client):
        body = {"prompt": ["abcdefgh", "ab!"], "stop": "!", "max_tokens": 400}
        events = await client.events("/v1/completions", body)
        assert [joined(events, number) for number in (0, 1)] == ["abcdefgh" * 50, "ab"]
        ends = [c for event in events for c in event["choices"] if c["finish_reason"]]
        assert [(end["index"], end["finish_reason"]) for end in ends] == [(1, "stop"), (0, "length")]
        assert client.engine.cancelled == [2]  # its number there

    monkeypatch.setattr(App, "_send", slowly)
    answered(scenario, engine=Parrot(seconds=0.001))


def test_a_stream_has_whole_characters_and_all_of_the_text():
    """Also where the last of it might have become a stop, or is part of a character."""

    async def scenario(client):
        body = {"prompt": TEXT, "max_tokens": 3 * len(TEXT.encode()), "stop": "!!", "echo": True}
        body["stream_options"] = {"include_usage": True}
        events = await client.events("/v1/completions", body)
        *parts, last = events
        assert joined(parts) == TEXT * 4 and parts[0]["choices"][0]["text"] == TEXT
        assert all("\ufffd" not in event["choices"][0]["text"] for event in parts)
        assert [event["choices"][0]["finish_reason"] for event in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        size = len(TEXT.encode())
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 4 * size
        assert len({event["id"] for event in events}) == 1
        cut = await client.events("/v1/completions", {"prompt": "€", "max_tokens": 5})
        assert joined(cut) == "€\ufffd"

    answered(scenario, engine=Parrot(seconds=0.001))


def test_log_probabilities_are_those_of_the_tokens_in_the_text():
    async def scenario(client):
        whole = await client.complete("abé", max_tokens=8, stop="ba", logprobs=2)
        events = await client.events("/v1/completions", {"prompt": "abé", "max_tokens": 9, "logprobs": 2})
        none = await client.complete("ab", max_tokens=2, logprobs=0)
        return whole, events, none

    whole, events, none = answered(scenario)
    found = whole["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "token:195", "token:169", "a", "b", "token:195", "token:169"]
    assert found["token_logprobs"] == [logprob(i) for i in "abéabé".encode()]
    assert found["text_offset"] == [0, 1, 2, 2, 3, 4, 5, 5]
    assert found["top_logprobs"][0] == {"a": logprob(97), "b": -2.0}
    parts = [event["choices"][0] for event in events]
    assert [token for part in parts for token in part["logprobs"]["tokens"]] == [*found["tokens"], "a"]
    assert [place for part in parts for place in part["logprobs"]["text_offset"]] == [*found["text_offset"], 6]
    assert none["choices"][0]["logprobs"]["token_logprobs"] == [logprob(97), logprob(98)]
    assert none["choices"][0]["logprobs"]["top_logprobs"] == [{}, {}]


def test_tokens_of_a_stop_have_no_log_probabilities():
    async def scenario(client):
        for stop, kept in (("bc", "a"), ("é", "abc"), ("\u00e9a", "abc")):
            answer = await client.complete("abcé", max_tokens=30, stop=stop, logprobs=0)
            assert texts(answer) == [kept]
            assert answer["choices"][0]["logprobs"]["tokens"] == list(kept)
            body = {"prompt": "abcé", "max_tokens": 30, "stop": stop, "logprobs": 0}
            events = await client.events("/v1/completions", body)
            assert [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]] == list(kept)

    answered(scenario)


def test_infinite_log_probabilities_are_json():
    async def scenario(client):
        return await client.complete("a", max_tokens=1, logprobs=3)

    assert answered(scenario)["choices"][0]["logprobs"]["top_logprobs"] == [{"a": logprob(97), "b": -2.0, "c": -9999.0}]


def test_tokens_that_are_no_text_are_served_as_ids():
    async def scenario(client):
        answer = await client.complete([12, 13], max_tokens=3, stop="13 12", echo=True)
        assert texts(answer) == ["12 13 12 "]
        status, answer = await client.post("/v1/completions", {"prompt": "12 13"})
        assert status == 400 and "prompt: the model has tokens that are no text" in answer["error"]["message"]
        status, answer = await client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
        assert status == 400 and "messages: the model has tokens that are no text" in answer["error"]["message"]

    answered(scenario, tokenizer=None)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(write_chat_tokenizer(tmp_path_factory.mktemp("chat")))


def test_a_chat_goes_through_the_template(chat):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "é"}]}]
    written = "<|user|>hi é<|end|><|assistant|>"  # which the engine says again

    async def scenario(client):
        status, answer = await client.post("/v1/chat/completions", {"messages": messages})
        assert status == 200, answer
        count = len(chat.encode_template(written)[0])
        assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        # of the tokens that end an answer, the template's is the first here
        choice = {"index": 0, "message": {"role": "assistant", "content": "<|user|>hi é"}, "logprobs": None}
        assert answer["choices"] == [{**choice, "finish_reason": "stop"}]
        assert answer["usage"]["prompt_tokens"] == count
        body = {"messages": messages, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 1}
        first, *parts = await client.events("/v1/chat/completions", body)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert first["object"] == "chat.completion.chunk"
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == "<|user|>hi"
        tokens = [token for part in parts for token in part["choices"][0]["logprobs"]["content"]]
        assert [token["token"] for token in tokens] == ["<|user|>", "h", "i"]
        h = {"token": "h", "logprob": logprob(chat.encode("h")[0]), "bytes": [104]}
        assert tokens[1] == {**h, "top_logprobs": [h]}
        # Without a number it goes on to the end of a sequence.
        status, answer = await client.post("/v1/chat/completions", {"messages": messages[:1], "seed": 10**9})
        assert status == 200

    answered(scenario, tokenizer=chat)


def test_a_chat_needs_a_template():
    async def scenario(client):
        return await client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})

    status, answer = answered(scenario)
    assert status == 400
    assert answer["error"]["message"] == "messages: the model's tokenizer has no chat template"


def test_models_health_metrics_and_the_page():
    async def scenario(client):
        status, models = await client.get("/v1/models")
        assert status == 200 and [model["id"] for model in json.loads(models)["data"]] == ["parrot"]
        assert (await client.get("/v1/models/parrot"))[0] == 200
        assert (await client.get("/v1/models/other"))[0] == 404
        assert await client.get("/health") == (200, '{"status": "ok"}')
        await client.complete("abc", max_tokens=5)
        await client.post("/v1/completions", {})
        status, metrics = await client.get("/metrics")
        assert status == 200
        for line in (
            'megatron_carve_requests_total{path="/v1/completions",status="200"} 1.0',
            'megatron_carve_requests_total{path="/v1/completions",status="400"} 1.0',
            "megatron_carve_prompt_tokens_total 3.0",
            "megatron_carve_completion_tokens_total 5.0",
            "megatron_carve_choices_running 0.0",
        ):
            assert line in metrics.splitlines(), metrics
        assert "process_resident_memory_bytes" in metrics
        status, page = await client.get("/")
        assert status == 200 and "<textarea" in page
        assert "http://" not in page and "https://" not in page  # nothing from elsewhere

    answered(scenario)
