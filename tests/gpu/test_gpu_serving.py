"""The server on a GPU: a run trained there, whose texts are those of `generate`, also among many others."""

import asyncio
import sys

import aiohttp
import pytest
from support.programs import program
from support.serving import growth_over_1000_requests, mixed_requests, server_process
from support.train import train

pytestmark = pytest.mark.gpu

RUN = """
inherit: debug
model: {pattern: C-*-2-K-, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2, attention_window: 64}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 32, value_head_dim: 32, content_rank: 4}
training: {steps: 100, seq_length: 256, micro_batch_size: 8, global_batch_size: 8}
data: {text: cats.txt}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    (folder / "tiny.yaml").write_text(RUN)
    (folder / "cats.txt").write_text("the cat sat on the mat. a dog lay by the door. " * 800)
    train(folder, "tiny.yaml", "run.name=one")
    return folder


def test_texts_are_those_of_the_program_and_1000_requests_leave_nothing(folder):
    command = [sys.executable, "-P", "-m", "megatron_carve.serve", "runs/one", "--port", "0", "--device", "cuda"]
    words = ["runs/one", "--max-new-tokens", "100", "--temperature", "0"]
    alone = program(folder, "generate", *words, "--prompt", "a dog").stdout.removesuffix("\n")
    with server_process(command, cwd=folder) as (process, address):

        async def many():
            async with aiohttp.ClientSession(address) as session:
                others = asyncio.create_task(mixed_requests(address, 200, seed=1, tokens=100, abandoned=200))
                body = {"prompt": "a dog", "max_tokens": 100, "temperature": 0, "n": 16}
                async with session.post("/v1/completions", json=body) as answer:
                    texts = [choice["text"] for choice in (await answer.json())["choices"]]
                await others
                return texts

        assert asyncio.run(many()) == [alone] * 16
        assert asyncio.run(growth_over_1000_requests(address, process.pid, tokens=50, abandoned=200)) < 16 * 2**20
