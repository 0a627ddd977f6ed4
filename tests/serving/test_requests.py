"""What is wrong with a request is said in one line, which names the field, in OpenAI's form."""

import asyncio
import json

import pytest
from support.engine import Parrot
from support.serving import served

from megatron_carve.serving.protocol import ApiError, Chat, Completion, parse

STOP = "stop: expected a text that is not empty, or a list of such"
HELLO = '"messages": [{"role": "user", "content": "hi"}]'


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (Completion, "{", "the body is not JSON: "),
        (Completion, "", "the body is not JSON: "),
        (Completion, "[" * 10_000, "the body is not JSON: "),
        (Completion, b'{"prompt": "\xff"}', "the body is not JSON: "),
        (Completion, r'{"prompt": "\ud800"}', "the body is not JSON: "),
        (Completion, "[]", "body: input should be an object, got []"),
        (Completion, "{}", "prompt: expected this field, which is missing"),
        (Completion, '{"prompt": "a", "bogus": 3}', "bogus: unknown field"),
        (Completion, '{"prompt": null}', "prompt: expected a text, token ids, or a list of these, got None"),
        (Completion, '{"prompt": []}', "prompt: expected 1 to 128 prompts, got 0"),
        (Completion, '{"prompt": [[]]}', "prompt: expected a text, token ids, or a list of these, got [[]]"),
        (Completion, '{"prompt": [1, "a"]}', "prompt: expected a text, token ids, or a list of these, got [1, 'a']"),
        (Completion, '{"prompt": [true]}', "prompt: expected a text, token ids, or a list of these, got [True]"),
        (Completion, '{"prompt": "a", "max_tokens": "3"}', "max_tokens: input should be a valid integer, got '3'"),
        (Completion, '{"prompt": "a", "n": 0}', "n: input should be greater than or equal to 1, got 0"),
        (Completion, '{"prompt": "a", "temperature": NaN}', "temperature: input should be a finite number, got nan"),
        (Completion, '{"prompt": "a", "temperature": true}', "temperature: input should be a valid number, got True"),
        (Completion, '{"prompt": "a", "top_p": 0}', "top_p: input should be greater than 0, got 0"),
        (Completion, '{"prompt": "a", "n": 129}', "n: input should be less than or equal to 128, got 129"),
        (
            Completion, '{"prompt": ["a", "b"], "n": 65}',
            "n: expected at most 128 choices of all prompts together, got 130",
        ),
        (Completion, '{"prompt": "a", "seed": -1}', "seed: input should be greater than or equal to 0, got -1"),
        (Completion, '{"prompt": "a", "logprobs": 21}', "logprobs: input should be less than or equal to 20, got 21"),
        (Completion, '{"prompt": "a", "stop": 7}', f"{STOP}, got 7"),
        (Completion, '{"prompt": "a", "stop": [""]}', f"{STOP}, got ['']"),
        (Completion, json.dumps({"prompt": "a", "stop": ["x"] * 17}), "stop: expected at most 16 texts, got 17"),
        (Completion, '{"prompt": "a", "best_of": 2}', "best_of: only None or 1 is served, got 2"),
        (Completion, '{"prompt": "a", "suffix": "b"}', "suffix: this is not served, got 'b'"),
        (Completion, '{"prompt": "a", "presence_penalty": 0.5}', "presence_penalty: this is not served, got 0.5"),
        (
            Completion, '{"prompt": "a", "echo": true, "logprobs": 1}',
            "echo: log-probabilities of a prompt are not served; leave out echo or logprobs",
        ),
        (
            Completion, '{"prompt": "a", "stream_options": {"include_usage": true}}',
            "stream_options: expected with stream alone",
        ),
        (Chat, '{"messages": []}', "messages: list should have at least 1 item after validation, not 0, got []"),
        (Chat, '{"messages": [{"role": "user"}]}', "messages.0.content: expected this field, which is missing"),
        (
            Chat, '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            'messages.0.content: expected a text, or parts {"type": "text", "text": TEXT}, got '
            "[{'type': 'image_url'}]",
        ),
        (Chat, f'{{{HELLO}, "tools": [{{}}]}}', "tools: this is not served, got [{}]"),
        (Chat, f'{{{HELLO}, "top_logprobs": 2}}', "top_logprobs: expected with logprobs alone"),
        (
            Chat, f'{{{HELLO}, "max_tokens": 2, "max_completion_tokens": 2}}',
            "max_tokens: expected this or max_completion_tokens, got both",
        ),
        (
            Chat, f'{{{HELLO}, "response_format": {{"type": "json_object"}}}}',
            "response_format.type: only 'text' is served, got 'json_object'",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(kind, body, message):
    with pytest.raises(ApiError) as raised:
        parse(kind, body if isinstance(body, bytes) else body.encode())
    found = str(raised.value)
    # What is wrong with JSON the library that reads it says in its own words.
    assert found.startswith(message) if message.endswith(": ") else found == message
    assert raised.value.status == 400
    field = message.partition(":")[0]
    assert raised.value.param == (None if field in ("the body is not JSON", "body") else field)


def test_what_clients_send_by_habit_is_taken():
    neutral = (
        '"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "x", "stream": false, "n": null'
    )
    parse(Completion, f'{{"prompt": "a", "best_of": 1, "suffix": null, "temperature": 1, {neutral}}}'.encode())
    parse(Chat, f'{{{HELLO}, "tools": [], "response_format": {{"type": "text"}}, {neutral}}}'.encode())


def test_errors_have_their_status_and_openais_form():
    async def scenario(client):
        async def error(status, path, body, **options):
            found, answer = await client.post(path, body, **options)
            assert found == status, answer
            assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}
            return answer["error"]

        completions = "/v1/completions"
        wrong = await error(400, completions, {"prompt": "a", "max_tokens": "x"})
        assert wrong["type"] == "invalid_request_error" and wrong["param"] == "max_tokens"
        wrong = await error(404, completions, {"prompt": "a", "model": "gpt"})
        assert wrong["code"] == "model_not_found" and wrong["message"] == "model: only 'parrot' is served, got 'gpt'"
        wrong = await error(400, completions, {"prompt": "a" * 90, "max_tokens": 11})
        assert wrong["code"] == "context_length_exceeded" and wrong["param"] == "prompt"
        assert wrong["message"].endswith(
            "expected at most 100 tokens of a prompt and its continuation together, got 90 + 11"
        )
        assert (await error(400, completions, {"prompt": "a" * 100}))["code"] == "context_length_exceeded"
        assert (await error(400, completions, {"prompt": "a", "max_tokens": 10**30}))[
            "code"
        ] == "context_length_exceeded"
        wrong = await error(400, completions, {"prompt": [1, 300]})
        assert wrong["message"] == "prompt: expected token ids from 0 to 256, got 300"
        assert (await error(400, completions, {"prompt": [7, 7, 7]}))["message"] == "prompt: nobody wants these tokens"
        assert (await error(400, completions, {"prompt": "a", "stream": True, "n": 0}))["param"] == "n"
        wrong = await error(413, completions, {"prompt": "a" * 2**20})
        assert wrong["code"] == "body_too_large"
        async with client.session.post(
            completions, data=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
        ) as a:
            assert a.status == 415 and "application/json, got 'text/plain'" in (await a.json())["error"]["message"]
        assert (await error(404, "/v1/embeddings", {}))["message"] == "POST /v1/embeddings: not found"
        assert (await error(405, "/v1/models", {}))["message"] == "POST /v1/models: method not allowed"
        async with client.session.post("/v1/models", json={}) as refused:
            assert refused.headers["Allow"] == "GET,HEAD"
        # One of two that cannot be: the other does not go on.
        assert (await error(400, completions, {"prompt": ["a", [7, 7, 7]]}))[
            "message"
        ] == "prompt: nobody wants these tokens"
        await client.until_free()
        # and the connections and the server are as they were
        assert (await client.complete("ab", max_tokens=2))["choices"][0]["text"] == "ab"

    async def run():
        async with served(Parrot(max_sequence=100)) as client:
            await scenario(client)

    asyncio.run(run())
