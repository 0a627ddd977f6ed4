"""Perplexity, needles in a haystack, and lm-evaluation-harness on a small run; all data is made here."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import hybrid_model, one_process, token_losses
from support.programs import assert_complaints, program
from support.train import train

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.use import needles

VOCAB = 64


@pytest.fixture(scope="module")
def model():
    with one_process():
        model = hybrid_model("C-2*-", vocab_size=VOCAB, length=300, window_size=(16, 0)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        yield model


class TestPerplexity:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(("length", "stride"), [(50, None), (50, 20), (50, 1), (200, None), (7, 3)])
    def test_every_token_is_predicted_once_from_enough_before_it(self, model, length, stride, batch):
        from megatron_carve.use.perplexity import text_perplexity, windows

        text = torch.randint(VOCAB, (121,))
        found = text_perplexity(model, text, length=length, stride=stride, text_bytes=240, batch=batch)
        nats, predicted = 0.0, []
        for start, end, first in windows(len(text), length, stride or length):
            assert 0 <= start < first < end and end - 1 - start <= length
            predicted += range(first, end)
            # as much before it as the stride leaves, or all there is
            assert first - start >= min(first, length - (stride or length) + 1)
            with torch.no_grad():
                losses = token_losses(model, text[None, start:end])[0]
            nats += losses[first - start - 1 :].double().sum().item()
        assert predicted == list(range(1, len(text)))
        assert found.tokens == 120
        assert found.nats == pytest.approx(nats, rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(nats / 120))
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 240)

    @pytest.mark.parametrize(
        ("wrong", "complaint"),
        [
            ({"length": 0}, "length: expected at least 1, got 0"),
            ({"stride": 6}, "stride: expected 1 to length=5, got 6"),
            ({"stride": 0}, "stride: expected 1 to length=5, got 0"),
            ({"batch": 0}, "batch: expected at least 1, got 0"),
            ({"ids": [1]}, "text: expected at least 2 tokens, got 1"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, model, wrong, complaint):
        from megatron_carve.use.perplexity import text_perplexity

        options = {"ids": [1, 2, 3], "length": 5, "text_bytes": 3, **wrong}
        with pytest.raises(ValueError, match=complaint):
            text_perplexity(model, options.pop("ids"), **options)


TEXT = " ".join(f"Sentence number {i} says that it is sentence {i}." for i in range(300))


def count(text):
    return len(load_tokenizer("bytes").encode(text))


class TestNeedles:
    @pytest.mark.parametrize("limit", [7, 1000, 32_000])
    def test_sizes_are_guessed_in_few_trials_and_nearly_fill_the_limit(self, limit):
        """Sentences of like lengths, and one among them that is longer than all others together."""
        for outsized in (0, 10**6):
            trials = []

            def size(n, outsized=outsized, trials=trials):
                trials.append(n)
                return 5 + 20 * n + (outsized if n > 300 else 0)

            found, tokens = needles._most(size, 5, limit)
            assert tokens == size(found) <= limit
            assert tokens >= limit - limit // 100 or size(found + 1) > limit
            assert len(trials) < 28

    @pytest.mark.parametrize("task", needles.TASKS)
    @pytest.mark.parametrize("length", [1000, 4096])
    def test_a_prompt_hides_the_answer_where_it_says(self, task, length):
        for depth in (0.0, 0.25, 1.0):
            sample = needles.make_sample(task, length, depth, seed=3, count_tokens=count, haystack=TEXT)
            assert length - 120 < sample.tokens <= length and sample.tokens == count(sample.prompt)
            hay = sample.prompt.removeprefix(needles.INTRODUCTION)
            hay, _, question = hay.rpartition("\n\n")
            assert hay.count(sample.answer) == 1
            assert sample.answer not in question
            place = hay.index(f"is {sample.answer}.") / len(hay)
            assert abs(place - depth) < 0.35 if length < 2000 else abs(place - depth) < 0.1
            # the key that is asked for is the one beside the answer
            key = question.removeprefix("Which code belongs to the ").partition("?")[0]
            assert f"The code of the {key} is {sample.answer}." in hay
            keys = re.findall(r"The code of the (\w+ \w+) is ", hay)
            assert len(keys) == len(set(keys)) == needles.TASKS[task].needles
            assert all(a in needles.ADJECTIVES and n in needles.NOUNS for a, n in (k.split() for k in keys))
            assert question.endswith(f"the code of the {key} is")

    def test_values_are_what_the_task_says(self):
        number = needles.make_sample("single_1", 1000, 0.5, 1, count).answer
        assert number.isdigit() and len(number) == 7
        assert len(needles.make_sample("single_3", 1000, 0.5, 1, count, TEXT).answer) == 36

    def test_a_seed_draws_one_question_and_another_another(self):
        first, again, other = (needles.make_sample("multikey_1", 2000, 0.5, s, count, TEXT) for s in (1, 1, 2))
        assert first == again
        assert first.answer != other.answer and first.prompt != other.prompt

    def test_answers_are_right_where_they_give_the_value(self):
        samples = [needles.make_sample("single_1", 1000, 0.5, s, count) for s in range(4)]
        generated = [f" {samples[0].answer}. And so on", " nothing", samples[2].answer, samples[2].answer]
        assert needles.accuracy(samples, generated) == 0.5

    @pytest.mark.parametrize(
        ("wrong", "complaint"),
        [
            ({"task": "single_9"}, "task: expected one of single_1, single_2, single_3, multikey_1, got 'single_9'"),
            ({"depth": 1.5}, "depth: expected 0 to 1, got 1.5"),
            ({"haystack": " "}, "haystack: expected a text with sentences for single_2, got none"),
            ({"length": 50}, "length: expected at least .* tokens, which the question of single_2 takes, got 50"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, wrong, complaint):
        options = {"task": "single_2", "length": 1000, "depth": 0.5, "haystack": TEXT, **wrong}
        with pytest.raises(ValueError, match=complaint):
            needles.make_sample(**options, seed=1, count_tokens=count)


def test_answers_are_put_to_their_questions(monkeypatch):
    """A model that reads finds every needle; one that is asked about texts as long and as many as it should be."""
    from megatron_carve import evaluate
    from megatron_carve.use import generation

    tokenizer = load_tokenizer("bytes")
    asked = []

    def generate(model, prompts, *, max_new_tokens, **options):
        texts = [tokenizer.decode(prompt.numpy()) for prompt in prompts]
        asked.extend(len(prompt) for prompt in prompts)
        answers = []
        for text in texts:
            key = text.rpartition("the code of the ")[2].removesuffix(" is")
            answers.append(re.search(rf"The code of the {key} is (\S+)\.", text)[1])
        rows = [tokenizer.encode(f" {answer}. and so on".ljust(max_new_tokens)) for answer in answers]
        yield from torch.from_numpy(np.stack(rows).T[:max_new_tokens].copy())

    monkeypatch.setattr(generation, "generate", generate)
    trained = SimpleNamespace(model=None, tokenizer=tokenizer, vocab_size=257)
    chosen = SimpleNamespace(samples=3, batch=2, seed=0)
    rows = evaluate._needles(trained, ["single_3", "multikey_1"], [700, 1500], TEXT, chosen)()["needles"]
    assert [row["accuracy"] for row in rows] == [1.0] * 20
    assert len(asked) == 60 and max(asked) <= 1500 and sum(580 < n <= 700 for n in asked) == 30


class TestHarness:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_scores_are_the_models_losses(self, model, batch):
        """Of continuations alone, whatever they are beside; greedy where every token is the likeliest."""
        from megatron_carve.use.harness import score

        trained = SimpleNamespace(model=model, device=torch.device("cpu"), vocab_size=VOCAB)
        lengths = [(3, 5), (70, 1), (1, 20), (9, 2), (40, 40)]
        texts = [torch.randint(VOCAB, (a + b,)) for a, b in lengths]
        for at in range(9, 11):  # the fourth's continuation becomes what greedy decoding gives
            positions = torch.arange(at)[None]
            texts[3][at] = model(texts[3][None, :at], positions, None)[0, -1].argmax()
        pairs = [(text[:a].tolist(), text[a:].tolist()) for text, (a, _) in zip(texts, lengths, strict=True)]
        found = score(trained, pairs, batch)
        for text, (a, _), (value, _) in zip(texts, lengths, found, strict=True):
            with torch.no_grad():
                expected = -token_losses(model, text[None])[0, a - 1 :].double().sum().item()
            assert value == pytest.approx(expected, rel=1e-5)
        assert [greedy for _, greedy in found] == [False, False, False, True, False]

    @pytest.mark.parametrize(
        ("until", "expected"),
        [([".", ""], "on the mat"), (["mat", "the"], "on "), ([], "on the mat. then"), ("zz", "on the mat. then")],
    )
    def test_texts_end_before_what_ends_them(self, monkeypatch, until, expected):
        from megatron_carve.use import generation, harness

        tokenizer = load_tokenizer("bytes")
        ids = [*tokenizer.encode("on the mat. then").tolist(), tokenizer.eod, 65]
        asked = {}

        def generate(model, prompts, **options):
            asked.update(options)
            yield from (torch.tensor([i]) for i in ids)

        monkeypatch.setattr(generation, "generate", generate)
        trained = SimpleNamespace(model=None, tokenizer=tokenizer, vocab_size=257)
        assert harness.continue_until(trained, ["sat "], {"until": until, "max_gen_toks": 30}) == [expected]
        assert asked["max_new_tokens"] == 30 and asked["sampling"].temperature == 0

    @pytest.mark.parametrize(
        ("options", "tokens", "temperature"),
        [
            ({}, 256, 0.0),
            ({"max_new_tokens": 7}, 7, 0.0),
            ({"max_tokens": 8, "temperature": 0.5}, 8, 0.5),
            ({"do_sample": False, "temperature": 0.5}, 256, 0.0),
            ({"do_sample": True}, 256, 1.0),
            ({"max_gen_toks": 0}, None, None),
        ],
    )
    def test_options_are_those_of_the_harness(self, monkeypatch, options, tokens, temperature):
        from megatron_carve.use import generation, harness

        asked = []
        monkeypatch.setattr(generation, "generate", lambda *_, **given: asked.append(given) or [torch.tensor([65])])
        trained = SimpleNamespace(model=None, tokenizer=load_tokenizer("bytes"), vocab_size=257)
        assert harness.continue_until(trained, ["sat "], options) == ["" if tokens is None else "A"]
        found = [(given["max_new_tokens"], given["sampling"].temperature) for given in asked]
        assert found == ([] if tokens is None else [(tokens, temperature)])

    def test_a_continuation_that_joins_the_context_is_scored(self, monkeypatch):
        """By a tokenizer that writes "ab" as one token; and a context of blanks begins as an empty one does."""
        from megatron_carve.use import harness

        ids = {"ab": 2, "a": 0, "b": 1, " ": 3, "c": 4}

        def encode(text):
            found = []
            while text:
                piece = next(p for p in ids if text.startswith(p))
                found.append(ids[piece])
                text = text.removeprefix(piece)
            return np.array(found)

        trained = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode, eod=9))
        model = harness.language_model(trained)
        assert model._encode_pair("ca", "b") == ([4], [2])
        assert model._encode_pair("a", "b") == ([9], [2])
        assert model._encode_pair("c", "b") == ([4], [1])
        assert model._encode_pair("  ", "b") == ([9], [3, 3, 1])
        with pytest.raises(ValueError, match="pairs: expected a token at least of context and continuation"):
            harness.score(trained, [([1], [])])


RECIPE = """
inherit: debug
model: {pattern: C-*-2-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, attention_window: 16}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 60, seq_length: 64, micro_batch_size: 4, global_batch_size: 4}
data: {text: cats.txt}
"""
CATS = "the cat sat on the mat. " * 400
# As the harness's own tasks are written.
TASK = """
task: cats_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: FOLDER/{data}.jsonl}}}}
test_split: test
output_type: {type}
"""
CHOICE = (
    TASK.format(name="choice", data="choice", type="multiple_choice")
    + """\
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""
)
ROLLING = (
    TASK.format(name="perplexity", data="texts", type="loglikelihood_rolling")
    + """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
)
GENERATE = (
    TASK.format(name="generate", data="generate", type="generate_until")
    + """\
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["."], max_gen_toks: 40}
metric_list: [{metric: exact_match}]
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "cats.txt").write_text(CATS)
    (folder / "hay.txt").write_text(TEXT)
    train(folder, "tiny.yaml", "run.name=cats")
    train(folder, "debug", "run.name=recall", "training.steps=1")
    tasks = folder / "tasks"
    tasks.mkdir()
    nowhere = TASK.format(name="nowhere", data="nowhere", type="loglikelihood_rolling")
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE), ("nowhere", nowhere)):
        (tasks / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    lines = {
        "choice": [{"context": "the cat", "choices": [" sat on the mat.", "#q8&% zz |}~"], "label": 0}] * 3,
        "texts": [{"text": CATS[:300]}, {"text": CATS[24:100]}],
        "generate": [{"context": "the cat", "target": "x"}] * 2,
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_perplexity_and_needles_of_a_run(folder):
    done = program(
        folder, "evaluate", "runs/cats", "--tasks", "perplexity,single_1,multikey_1", "--text", "cats.txt",
        "--haystack", "hay.txt", "--needle-lengths", "600,1200", "--samples", "2", "--batch", "2", "--out", "out",
    )  # fmt: skip
    results = json.loads((folder / "out" / "results.json").read_text())
    found = results["perplexity"]
    assert results["step"] == 60 and found["tokens"] == len(CATS) - 1 and found["length"] == 64
    # the run's own summary measured the same text, with other windows
    validation = json.loads((folder / "runs" / "cats" / "summary.json").read_text())["final_validation"]
    assert found["nats_per_token"] == pytest.approx(validation["validation_loss"], rel=0.05)
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] * (len(CATS) - 1) / len(CATS) / math.log(2))
    rows = results["needles"]
    assert [(r["task"], r["length"]) for r in rows[::5]] == [
        ("single_1", 600), ("single_1", 1200), ("multikey_1", 600), ("multikey_1", 1200),
    ]  # fmt: skip
    assert {r["depth"] for r in rows} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(r["accuracy"] == 0 for r in rows)  # it knows nothing but cats
    assert np.asarray(Image.open(folder / "out" / "needles.png").convert("L")).std() > 10
    for said in ("perplexity of cats.txt", "needles found", "single_1", "multikey_1", "1200"):
        assert said in done.stdout


@pytest.mark.slow
def test_tasks_of_the_harness_on_data_made_here(folder):
    names = "cats_choice,cats_perplexity,cats_generate"
    words = ["--tasks", names, "--include-path", "tasks", "--batch", "2", "--out", "h"]
    done = program(folder, "evaluate", "runs/cats", *words)
    results = json.loads((folder / "h" / "results.json").read_text())["harness"]
    assert results["cats_choice"]["acc,none"] == 1.0
    assert 0 < results["cats_perplexity"]["bits_per_byte,none"] < 5
    assert results["cats_generate"]["exact_match,none"] == 0.0
    assert "cats_choice" in done.stdout and "bits_per_byte" in done.stdout


@pytest.mark.long
def test_what_was_found_stays_when_a_later_task_fails(folder):
    words = ["--tasks", "perplexity,cats_nowhere", "--text", "cats.txt", "--include-path", "tasks", "--out", "some"]
    done = program(folder, "evaluate", "runs/cats", *words, check=False)
    assert done.returncode != 0 and "nowhere.jsonl" in done.stderr
    assert "perplexity of cats.txt" in done.stdout
    assert json.loads((folder / "some" / "results.json").read_text()).keys() == {"run", "step", "perplexity"}


@pytest.mark.slow
def test_a_mistake_in_a_later_task_is_found_before_the_first_one_begins(folder):
    words = ["--tasks", "perplexity,single_1", "--text", "cats.txt", "--needle-lengths", "600,20"]
    done = program(folder, "evaluate", "runs/cats", *words, check=False)
    assert done.returncode == 2 and "error: length: expected at least" in done.stderr
    assert "perplexity" not in done.stdout and "tokens, depth" not in done.stderr


@pytest.mark.slow
def test_mistakes_end_in_one_line(folder):
    cats, single = "runs/cats", ["--tasks", "single_1"]
    cases = [
        ([cats, "--tasks", "perplexity"], "--text: perplexity needs a text file, got none"),
        ([cats, "--tasks", "needles"], "--haystack: single_2, single_3, multikey_1 hide needles in a text file"),
        ([cats, "--tasks", "lambda_openai"], "there is no task 'lambda_openai' here or in lm-evaluation-harness; did"),
        ([cats, *single, "--needle-lengths", "1k"], "--needle-lengths: expected numbers with commas between, got '1k'"),
        ([cats, "--tasks", " ,"], "--tasks: expected at least one, got ' ,'"),
        ([cats, *single, "--samples", "0"], "--samples: expected at least 1, got 0"),
        (["runs/none", *single], "runs/none: expected the folder of a run"),
        (["runs/recall", *single], "was trained on generated tokens, which are no text"),
    ]
    assert_complaints(folder, "evaluate", cases)
    too_short = program(folder, "evaluate", cats, *single, "--needle-lengths", "20", check=False)
    assert too_short.returncode == 2
    assert "error: length: expected at least" in too_short.stderr
