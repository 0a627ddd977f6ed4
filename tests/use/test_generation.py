"""Drawing tokens, and generating with models built here; the programs that do it with a checkpoint."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import aiohttp
import pytest
import torch
from support.chats import write_chat_tokenizer
from support.models import hybrid_model, one_process
from support.programs import assert_complaints, program
from support.serving import growth_over_1000_requests, mixed_requests, server_process
from support.train import train, train_on_text, train_ranks

from megatron_carve.data.tokenizer import load_tokenizer

VOCAB = 60  # of a model padded to 64


@pytest.fixture(scope="module")
def model():
    with one_process():
        model = hybrid_model("C-2*-", vocab_size=64, length=300, window_size=(16, 0)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        yield model


def whole(model, tokens):
    with torch.no_grad():
        return model(tokens[None], torch.arange(tokens.numel())[None], None)[0, -1, :VOCAB]


@pytest.mark.parametrize("prefill_tokens", [4096, 16])
def test_greedy_tokens_are_those_of_the_whole_model(model, prefill_tokens):
    from megatron_carve.use.generation import Sampling, generate

    prompts = [torch.randint(VOCAB, (n,)) for n in (1, 150, 30)]
    found = torch.stack(
        list(
            generate(
                model, prompts, max_new_tokens=25, sampling=Sampling(temperature=0), vocab_size=VOCAB,
                prefill_tokens=prefill_tokens,
            )
        ),
        1,
    )  # fmt: skip
    assert found.shape == (3, 25)
    for prompt, tokens in zip(prompts, found, strict=True):
        text = prompt
        for token in tokens:
            logits = whole(model, text)
            # of nearly equal logits either may be the largest
            assert logits[token] >= logits.max() - 1e-4
            text = torch.cat([text, token[None]])


def test_500_greedy_tokens_are_those_of_the_whole_model(model):
    from megatron_carve.use.generation import Sampling, generate

    prompt = torch.randint(VOCAB, (75,))
    sampling = Sampling(temperature=0)
    found = torch.cat(list(generate(model, [prompt], max_new_tokens=500, sampling=sampling, vocab_size=VOCAB)))
    text = torch.cat([prompt, found])[None]
    with torch.no_grad():
        logits = model(text, torch.arange(575)[None], None)[0, 74:-1, :VOCAB]
    assert (logits.gather(1, found[:, None])[:, 0] >= logits.max(1).values - 1e-4).all()
    assert (logits.argmax(1) == found).float().mean() > 0.99  # but for ties within rounding


def test_a_seed_gives_one_text_and_another_another(model):
    from megatron_carve.use.generation import Sampling, generate

    def text(seed):
        sampling = Sampling(seed=seed)
        prompts = [torch.tensor([1, 2, 3])]
        return torch.cat(list(generate(model, prompts, max_new_tokens=30, sampling=sampling, vocab_size=VOCAB)))

    assert torch.equal(text(5), text(5))
    assert not torch.equal(text(5), text(6))
    assert text(5).max() < VOCAB


def draws(sampling, logits, count=20_000):
    generator = torch.Generator().manual_seed(1)
    tokens = sampling.draw(logits.expand(count, -1), generator)
    return torch.bincount(tokens, minlength=logits.numel()) / count


def test_tokens_are_drawn_by_their_probabilities():
    from megatron_carve.use.generation import Sampling

    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25])
    logits = probabilities.log()

    def only(*kept, power=1.0):
        chosen = torch.zeros(5)
        chosen[list(kept)] = probabilities[list(kept)] ** power
        return chosen / chosen.sum()

    cases = [
        (Sampling(), only(0, 1, 2, 3, 4)),
        (Sampling(temperature=0.5), only(0, 1, 2, 3, 4, power=2.0)),
        (Sampling(top_k=2), only(1, 4)),
        (Sampling(top_k=9), only(0, 1, 2, 3, 4)),
        (Sampling(top_p=0.5), only(1, 4)),
        (Sampling(top_p=0.66), only(1, 4, 3)),
        (Sampling(top_p=0.01), only(1)),
        (Sampling(top_k=3, top_p=0.7), only(1, 4)),  # of the three 0.4 + 0.25 are 76 %
        (Sampling(temperature=0), only(1)),
        (Sampling(temperature=1e-40), only(1)),
        (Sampling(temperature=1e-310, top_p=0.9), only(1)),
    ]
    for sampling, expected in cases:
        found = draws(sampling, logits)
        assert (found[expected == 0] == 0).all(), sampling
        torch.testing.assert_close(found, expected, rtol=0, atol=0.015, msg=str(sampling))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"temperature": -1.0}, "temperature: expected a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
    ],
)
def test_values_out_of_range_are_refused(wrong, complaint):
    from megatron_carve.use.generation import Sampling

    with pytest.raises(ValueError, match=complaint):
        Sampling(**wrong)


def test_layers_that_lose_their_place_are_refused():
    from megatron_carve.use.generation import Memory

    model = SimpleNamespace(decoder=SimpleNamespace(layer_type_list=["C", "M", "-", "G"]))
    with pytest.raises(NotImplementedError, match="expected layers of C, 2, K, \\*, -, got G, M"):
        Memory(model, 1, 4, vocab_size=VOCAB)


def test_a_memory_that_is_full_says_so(model):
    from megatron_carve.use.generation import Memory

    memory = Memory(model, 1, 4, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="prompt: expected 1 to 4 tokens, got 5"):
        memory.read(0, torch.arange(5))
    with pytest.raises(ValueError, match="prompt: expected 1 to 4 tokens, got 0"):
        memory.read(0, torch.arange(0))
    with pytest.raises(ValueError, match=r"expected a prompt of every sequence to be read first, got \[0\] tokens"):
        memory.step(torch.tensor([1]))
    memory.read(0, torch.arange(3))
    memory.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="expected room for another token, got 4 tokens already"):
        memory.step(torch.tensor([1]))


TINY = """
inherit: debug
model: {pattern: C-*-2-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, attention_window: 16}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 60, seq_length: 64, micro_batch_size: 4, global_batch_size: 4}
checkpoint: {interval: 20}
data: {text: cats.txt}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_on_text(tmp_path_factory.mktemp("generate"), TINY, "the cat sat on the mat. " * 400, "run.name=one")


def test_the_program_continues_texts(folder):
    words = ["runs/one", "--prompt", "the cat", "--max-new-tokens", "40", "--seed", "3", "--temperature", "0.5"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    first = program(folder, "generate", *words)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before  # it reads alone
    assert len(first.stdout) > 20 and first.stdout.endswith("\n")
    assert "step 60: 7 tokens read in " in first.stderr and "40 generated for each of 1" in first.stderr
    assert program(folder, "generate", *words).stdout == first.stdout
    assert program(folder, "generate", *words, "--step", "20").stdout != first.stdout
    (folder / "prompt.txt").write_text("on the")
    several = program(folder, "generate", *words, "--prompt-file", "prompt.txt", "--prompt-ids", "116 104")
    assert [line for line in several.stdout.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3"]


@pytest.mark.long  # exporting takes such a run too, in every test run
def test_a_run_of_two_processes_generates_what_one_would(folder):
    """From one checkpoint, continued in another layout for no step at all, the same text comes."""
    words = ["tiny.yaml", "run.name=two", "checkpoint.load=runs/one", "training.steps=61", "training.lr=1e-12"]
    train_ranks(2, folder, *words, "parallel.tensor=2")
    words = ["--prompt", "the", "--max-new-tokens", "60", "--temperature", "0"]
    assert (
        program(folder, "generate", "runs/two", *words).stdout == program(folder, "generate", "runs/one", *words).stdout
    )


@pytest.mark.slow
def test_texts_end_at_a_stop_and_empty_prompts_begin_documents(folder):
    words = ["runs/one", "--temperature", "0.5", "--max-new-tokens", "60"]
    whole = program(folder, "generate", *words, "--prompt", "the cat").stdout
    stop = whole[10:12]
    ended = program(folder, "generate", *words, "--prompt", "the cat", "--stop", stop, "--stop", "not there").stdout
    assert ended == whole[: whole.index(stop)] + "\n"
    assert len(program(folder, "generate", *words, "--prompt", "").stdout) > 20
    long = program(folder, "generate", *words, "--prompt", "the cat sat on the mat. " * 40)  # trained on 64 tokens
    assert "960 tokens read" in long.stderr and len(long.stdout) > 20


@pytest.mark.slow
def test_heads_for_further_tokens_are_no_hindrance(folder):
    """Nor what the run asked of Megatron for training alone."""
    options = ["model.pattern=C-*-/C-", "megatron.recompute_granularity=selective", "training.steps=20"]
    train(folder, "tiny.yaml", "run.name=heads", *options)
    words = ["runs/heads", "--prompt", "the cat", "--temperature", "0"]
    assert len(program(folder, "generate", *words).stdout) > 20


@pytest.mark.slow
def test_a_stream_can_be_interrupted_or_cut_off(folder):
    command = [sys.executable, "-m", "megatron_carve.generate", "runs/one", "--prompt", "the", "--max-new-tokens"]
    run = subprocess.Popen(
        [*command, "100000"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs behind it
    )  # fmt: skip
    assert run.stdout is not None and run.stderr is not None
    run.stdout.read(5)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert b"Traceback" not in run.stderr.read()
    run = subprocess.Popen([*command, "100000"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.read(5)
    run.stdout.close()
    assert run.wait(timeout=60) == 141
    assert b"Traceback" not in run.stderr.read()


@contextlib.contextmanager
def serving(folder, run, *options):
    """The program `serve` with a run, and its address."""
    command = [sys.executable, "-P", "-m", "megatron_carve.serve", run, "--port", "0", "--max-requests", "16", *options]
    with server_process(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}) as started:
        yield started


@pytest.fixture
def server(folder):
    with serving(folder, "runs/one", "--max-sequence", "500") as started:
        yield started


@pytest.mark.slow
def test_a_server_gives_the_programs_texts(folder, server):
    process, address = server
    asked = {"prompt": "the cat", "max_tokens": 60, "temperature": 0, "model": "one", "n": 3}
    words = ["runs/one", "--prompt", "the cat", "--max-new-tokens", "60", "--temperature", "0"]
    wanted = program(folder, "generate", *words).stdout.removesuffix("\n")

    async def between_others():
        others = asyncio.create_task(mixed_requests(address, 100, seed=1, tokens=8, abandoned=400))
        async with aiohttp.ClientSession(address) as session, session.post("/v1/completions", json=asked) as answer:
            texts = [choice["text"] for choice in (await answer.json())["choices"]]
        await others
        return texts

    assert asyncio.run(between_others()) == [wanted] * 3
    assert "megatron_carve_choices_running 0.0" in metrics(address)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert process.stderr.read().endswith("\nstopped\n")


@pytest.mark.long
def test_a_server_keeps_nothing_of_1000_requests(server):
    process, address = server
    assert asyncio.run(growth_over_1000_requests(address, process.pid, tokens=8, abandoned=400)) < 5 * 2**20
    assert "megatron_carve_choices_running 0.0" in metrics(address)


@pytest.mark.long
def test_a_model_of_chats_answers_by_its_template(folder):
    """Trained on chats, with a tokenizer that is gone since: the run has a copy."""
    (folder / "words").mkdir()
    spec = write_chat_tokenizer(folder / "words")
    turns = [("user", "say {}"), ("assistant", "{} é!")]
    with (folder / "chats.jsonl").open("w") as file:
        for word in ["one", "two", "three", "four"] * 200:
            messages = [{"role": role, "content": content.format(word)} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = ["data.text=chats.jsonl", "data.loss_on=completion", f"data.tokenizer={spec}"]
    train(folder, "tiny.yaml", "run.name=chats", "training.steps=400", "checkpoint.interval=400", *data)
    shutil.rmtree(folder / "words")
    with serving(folder, "runs/chats") as (_, address):
        for word in ("two", "three"):
            body = {"messages": [{"role": "user", "content": f"say {word}"}], "temperature": 0}
            answer = asyncio.run(posted(f"{address}/v1/chat/completions", body))
            message = {"role": "assistant", "content": f"{word} é!"}
            wanted = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            assert answer["choices"] == [wanted]


async def posted(url, body):
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return await answer.json()


def metrics(address):
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        return answer.read().decode()


class Pieces:
    """A tokenizer whose tokens are pieces of text, a space in front of each word but the first."""

    vocab_size, eod = 100, 99

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids if i != self.eod)


class TestWriter:
    def written(self, text, capsys, tokenizer=None, **options):
        from megatron_carve.generate import Writer

        tokenizer = tokenizer or load_tokenizer("bytes")
        writer = Writer(tokenizer, **options)
        live = []
        ids = text if isinstance(text, list) else tokenizer.encode(text).tolist()
        for token in [*ids, tokenizer.eod, 65]:
            writer.add(token)
            live.append(capsys.readouterr().out)
        writer.finish()
        return live, capsys.readouterr().out

    def test_texts_come_as_soon_as_they_are_sure(self, capsys):
        live, rest = self.written("aü€b", capsys, live=True)
        assert live == ["a", "", "ü", "", "", "€", "b", "", ""]
        assert rest == "\n"

    def test_words_keep_their_spaces(self, capsys):
        live, rest = self.written([1, 2, 3], capsys, Pieces(), live=True)
        assert (live, rest) == (["w1", " w2", " w3", "", ""], "\n")

    def test_bytes_that_are_no_characters_come_too(self, capsys):
        live, rest = self.written([0xFF] * 30 + [65, 0xC3], capsys, live=True)
        assert "".join(live) + rest == "\ufffd" * 30 + "A\ufffd\n"
        assert live[8] == "\ufffd" * 6  # the last three may begin a character

    def test_what_may_be_a_stop_waits(self, capsys):
        live, rest = self.written("one END two ENDING", capsys, live=True, stop=["ENDI", "zz"])
        assert "".join(live) + rest == "one END two \n"
        assert live[4:8] == ["", "", "", "END "]

    def test_an_open_stop_is_printed_at_the_end(self, capsys):
        live, rest = self.written("so EN", capsys, live=True, stop=["END"])
        assert ("".join(live[:5]), "".join(live[5:]) + rest) == ("so ", "EN\n")

    def test_several_wait_for_their_turn(self, capsys):
        live, rest = self.written("one", capsys, live=False)
        assert ("".join(live), rest) == ("", "one\n")

    def test_ids_where_there_is_no_text(self, capsys):
        from megatron_carve.generate import Writer

        writer = Writer(None, live=True)
        for token in (5, 60, 7):
            writer.add(token)
        writer.finish()
        assert capsys.readouterr().out == "5 60 7\n"


def test_mistakes_end_in_one_line(folder):
    one = "runs/one"
    cases = [
        ([one], "expected a --prompt, --prompt-file or --prompt-ids, got none"),
        ([one, "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        ([one, "--prompt", "a", "--top-p", "2"], "top_p: expected a number above 0 and at most 1, got 2.0"),
        ([one, "--prompt-ids", "1 b"], "--prompt-ids: expected numbers with spaces between, got '1 b'"),
        ([one, "--prompt", "a", "--step", "5"], "expected a step with a checkpoint (20, 40, 60), got 5"),
        ([one, "--prompt-file", "none.txt"], "none.txt"),
        ([one, "--prompt", "a", "--device", "cuda"], "run.device: expected a GPU for cuda"),
        (["runs/none", "--prompt", "a"], "runs/none: expected the folder of a run"),
        # last, as this is found when Megatron has begun
        ([one, "--prompt-ids", "257"], "expected at least one token id, each from 0 to 256, got [257]"),
    ]
    assert_complaints(folder, "generate", cases)
