"""Examples to fine-tune with: which tokens are learned, and how examples are packed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.chats import TEMPLATE, write_chat_tokenizer

from megatron_carve.data import blocks, text
from megatron_carve.data.blend import indexed_blend, text_blend
from megatron_carve.data.examples import example
from megatron_carve.data.packing import PackedExamples, packed
from megatron_carve.data.text import Texts, prepare_folder
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(write_chat_tokenizer(tmp_path_factory.mktemp("chat")))


def test_the_completion_and_the_end_are_learned():
    found = example({"prompt": "naïve?", "completion": " yes"}, BYTES, "here")
    assert found.ids.tolist() == [*"naïve? yes".encode(), 256]
    assert found.learned.tolist() == [0] * 7 + [1] * 5
    assert found.text_bytes == 11


def test_messages_of_the_assistant_are_learned(chat):
    turns = [("user", "hi <eos>"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    found = example({"messages": [{"role": role, "content": content} for role, content in turns]}, chat, "here")
    tokens = chat._model.convert_ids_to_tokens(found.ids.tolist())
    assert tokens[0] == "<|user|>" and tokens.count("<|end|>") == 4 and tokens[-1] == "<eos>"
    learned = "".join(token for token, mask in zip(tokens, found.learned, strict=True) if mask)
    assert learned == "hello<|end|>ciao<|end|><eos>"
    # Where the user has the last word, nothing says that the conversation ends.
    found = example({"messages": [{"role": role, "content": content} for role, content in turns[:3]]}, chat, "here")
    tokens = chat._model.convert_ids_to_tokens(found.ids.tolist())
    assert "".join(t for t, mask in zip(tokens, found.learned, strict=True) if mask) == "hello<|end|>"


def lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r"line 2 has no key 'completion', nor 'messages'; found: 'prompt'$"),
        ({"text": "a"}, r"line 2 has no key 'prompt', nor 'messages'; found: 'text'$"),
        ({"prompt": "a", "completion": None}, r"line 2: 'completion' must be a string, got NoneType$"),
        ({"messages": []}, r"line 2: 'messages' must be a list of messages, got \[\]$"),
        ({"messages": ["hi"]}, r"line 2: message 1 must have a role and a content, got 'hi'$"),
        ({"messages": [{"role": "user", "content": 1}]}, r"line 2: message 1: 'content' must be a string, got int$"),
        ({"messages": [{"role": "user", "content": "hi"}]}, r"line 2: none of the messages has the role 'assistant'"),
        ("[]", r"line 2 is a JSON list; one JSON object per line is expected$"),
    ],
)
def test_refused_examples(chat, tmp_path, record, message):
    path = lines(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, record])
    with pytest.raises(ValueError, match=rf"^data\.text: {re.escape(str(path))} {message}"):
        prepare_folder(tmp_path / "out", Texts(path, chat, examples=True), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


def test_examples_need_json_lines_and_messages_a_template(chat, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt is not JSON lines, in which examples are given"):
        prepare_folder(tmp_path / "out", Texts(tmp_path / "a.txt", BYTES, examples=True), progress=False)
    messages = {"messages": [{"role": "assistant", "content": "hi"}]}
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'bytes' has no chat template, which messages need"):
        example(messages, BYTES, "here")
    rewriting = TEMPLATE.replace("<|{{ m.role", "{{ messages|length }}<|{{ m.role")
    chat._model.chat_template, kept = rewriting, chat._model.chat_template
    try:
        with pytest.raises(ValueError, match=r"here: the chat template writes message 2 differently by what follows"):
            example({"messages": [{"role": "user", "content": "a"}, *messages["messages"]]}, chat, "here")
        chat._model.chat_template = "{{ raise_exception('Roles must alternate') }}"
        with pytest.raises(ValueError, match=r"here: the chat template refuses the messages: Roles must alternate"):
            example(messages, chat, "here")
    finally:
        chat._model.chat_template = kept


@pytest.fixture
def examples(tmp_path):
    path = lines(tmp_path / "qa.jsonl", [{"prompt": "q" * (i % 13), "completion": str(i)} for i in range(200)])
    return prepare_folder(tmp_path / "qa", Texts(path, BYTES, validation_fraction=0.1, examples=True), progress=False)


def test_masks_lie_beside_the_tokens(examples, tmp_path, monkeypatch):
    for prefix, tokens in (
        (examples.train_prefix, examples.train_tokens),
        (examples.validation_prefix, examples.validation_tokens),
    ):
        mask = np.fromfile(f"{prefix}.mask", dtype=np.uint8)
        ids = np.concatenate([np.array(sequence) for sequence in IndexedDataset(prefix)])
        assert mask.size == ids.size == tokens
        assert np.array_equal(mask == 0, ids == ord("q"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 512)
    monkeypatch.setattr(text, "_BYTES_PER_WORKER", 1)
    texts = Texts(tmp_path / "qa.jsonl", BYTES, validation_fraction=0.1, examples=True)
    shared = prepare_folder(tmp_path / "two", texts, workers=2, progress=False)
    for file in Path(examples.folder).iterdir():
        assert (Path(shared.folder) / file.name).read_bytes() == file.read_bytes(), file.name
    few = lines(tmp_path / "few.jsonl", [{"prompt": "qq", "completion": "1"}, {"prompt": "q", "completion": "23"}])
    few = prepare_folder(tmp_path / "few", Texts(few, BYTES, examples=True), progress=False)
    masks = [np.fromfile(f"{few.folder}/{split}.mask", dtype=np.uint8).tolist() for split in ("train", "validation")]
    assert masks == [[0, 0, 1, 1], [0, 1, 1, 1]]  # the last, held out, has taken its mask along


def packing(examples, count, seq_length=40):
    return PackedExamples(
        [examples.train_prefix], seq_length=seq_length, num_samples=count, seed=5, eod=256, split="train"
    )


def test_sequences_hold_whole_examples_and_learn_completions(examples):
    dataset = packing(examples, 60)
    assert len(dataset) == 60
    whole = {tuple(sequence) for sequence in IndexedDataset(examples.train_prefix)}
    for sample in dataset:
        ids = [*sample["tokens"].tolist(), sample["labels"][-1].item()]
        assert sample["tokens"].tolist()[1:] == sample["labels"].tolist()[:-1]
        parts, rest = [], []
        for token in ids:
            rest.append(token)
            if token == 256:
                parts, rest = [*parts, tuple(rest)], []
        assert rest == [] and {part for part in parts if part != (256,)} <= whole
        filled = len(ids) - sum(len(part) for part in parts if part != (256,))
        labels, mask = sample["labels"].numpy(), sample["loss_mask"].numpy()
        expected = labels != ord("q")
        expected[len(labels) - filled :] = False
        assert np.array_equal(mask == 1, expected)


def test_examples_apart_tell_where_they_begin(examples):
    from megatron_carve.data.datasets import build_gpt_datasets

    options = {"seq_length": 40, "seed": 5, "eod": 256}
    joined = packing(examples, 60)
    apart = PackedExamples([examples.train_prefix], num_samples=60, split="train", documents_apart=True, **options)
    for one, other in zip(joined, apart, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in ("tokens", "labels"))
        ids = [*one["tokens"].tolist(), one["labels"][-1].item()]
        starts = [0, *[i + 1 for i in range(39) if ids[i] == 256 and (ids[i + 1] != 256 or ids[i - 1] != 256)]]
        found = [start for start in other["cu_seqlens"].tolist() if start < 40]
        assert found == starts
        ends = [*starts[1:], 40]
        assert other["position_ids"].tolist() == [i for a, b in zip(starts, ends, strict=True) for i in range(b - a)]
        assert other["max_seqlen"] == max(b - a for a, b in zip(starts, ends, strict=True))
        expected = one["loss_mask"].clone()
        expected[[start - 1 for start in starts[1:]]] = 0
        assert np.array_equal(other["loss_mask"], expected)
    # In the form that Megatron's dataset has.
    blend = indexed_blend([examples.folder], split="95,5,0", examples=True)
    theirs, _ = build_gpt_datasets(
        blend, num_samples=(5, 5), vocab_size=257, cache_path=f"{examples.folder}/index", is_built_on_rank=lambda: True,
        documents_apart=True, **options,
    )  # fmt: skip
    form = {key: (value.dtype, value.shape) for key, value in theirs[0].items()}
    assert {key: (value.dtype, value.shape) for key, value in apart[0].items()} == form


def test_every_epoch_has_every_example_once():
    lengths = np.random.default_rng(0).integers(1, 60, 1000)
    found, epochs = packed(lengths, 64, seed=1), []
    for _ in range(2):
        seen, sequences = 0, []
        while seen < 1000:
            sequences.append(next(found))
            seen += len(sequences[-1])
        assert sorted(number for sequence in sequences for number in sequence) == list(range(1000))
        assert all(lengths[sequence].sum() <= 64 for sequence in sequences)
        assert (
            lengths.sum() / (64 * len(sequences)) > 0.93
        )  # little is filled up, though half of them are longer than half a sequence
        epochs.append(sequences)
    assert epochs[0] != epochs[1]
    assert epochs[0][0] == next(packed(lengths, 64, seed=1)) != next(packed(lengths, 64, seed=2))


def test_examples_longer_than_a_sequence_lose_their_end(tmp_path):
    path = lines(tmp_path / "long.jsonl", [{"prompt": "q" * 10, "completion": "1" * 90}] * 3)
    found = prepare_folder(tmp_path / "out", Texts(path, BYTES, validation_fraction=0, examples=True), progress=False)
    (sample,) = packing(found, 1, seq_length=30)
    assert sample["labels"].tolist() == [*b"q" * 9, *b"1" * 21]
    assert sample["loss_mask"].tolist() == [0] * 9 + [1] * 21
    assert text_blend(found, found).counts(60, 30)[0] == (
        "train: out/train: 3 documents, 303 tokens, 3 of them longer than a sequence; "
        "the run sees up to 0.645 epochs of it"
    )


def test_examples_and_texts_are_not_confused(examples, tmp_path):
    path = lines(tmp_path / "text.jsonl", [{"text": "words"}] * 30)
    texts = prepare_folder(tmp_path / "texts", Texts(path, BYTES), progress=False).folder
    assert indexed_blend([examples.folder], split="95,5,0", examples=True).examples
    for entries, wants, message in [
        ([examples.folder], False, r"qa/train holds examples, of which data\.loss_on must be completion"),
        ([texts], True, r"texts/train holds no examples, but data\.loss_on is completion"),
        (["1", examples.folder, "2", examples.folder], True, r"count alike, expected no weights"),
        ([examples.train_prefix], True, r"are given as prepared folders, or with data\.validation beside them"),
    ]:
        with pytest.raises(ValueError, match=rf"^data\.indexed: .*{message}"):
            indexed_blend(entries, split="95,5,0", examples=wants)
