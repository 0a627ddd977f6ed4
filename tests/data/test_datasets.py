"""Indexed datasets and Megatron's GPT datasets of them: checks, splits, samples."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_carve.data import blocks
from megatron_carve.data.datasets import (
    SameSamples,
    build_gpt_datasets,
    indexed_prefixes,
    require_indexed_tokens,
    require_known_ids,
)
from megatron_carve.data.text import prepare_text
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
LINES = "".join(f"line {i}: naïve — 日本語 🙂 {'x' * (i % 7)}\n" for i in range(200))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(LINES.encode())
    return path


@pytest.fixture
def prepare(tmp_path):
    def call(path, **options):
        return prepare_text(path, BYTES, tmp_path / "cache", progress=False, **options)

    return call


@pytest.fixture
def indexed(tmp_path):
    def build(name, documents):
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for document in documents:
            builder.add_item(torch.tensor(document))
            builder.end_document()
        builder.finalize(prefix + ".idx")
        return prefix

    return build


def test_indexed_prefixes_are_returned(indexed):
    a, b = indexed("a", [[1, 2]]), indexed("b", [[3]])
    for entries in ([a], [a, b], [a, b, a], ["0.3", a, "7", b], [f" {a} "]):
        assert indexed_prefixes(entries) == entries


def test_indexed_refusals(indexed, tmp_path):
    a = indexed("a", [[1, 2]])
    (tmp_path / "half.bin").write_bytes(b"x")
    (tmp_path / "hollow.bin").write_bytes(b"")
    (tmp_path / "wrong.bin").write_bytes(b"x")
    (tmp_path / "wrong.idx").write_bytes(b"x" * 100)
    (tmp_path / "cut.bin").write_bytes(b"x")
    (tmp_path / "cut.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:36])
    for entries, message in [
        ([], "must name at least one dataset"),
        ([f"{tmp_path}/absent"], r"absent\.bin does not exist"),
        ([f"{tmp_path}/half"], r"half\.idx does not exist"),
        ([f"{tmp_path}/hollow"], r"hollow\.bin is empty"),
        ([f"{tmp_path}/wrong"], r"wrong\.idx is not an index file"),
        ([f"{tmp_path}/cut"], r"cut\.idx is not an index file .* or is cut short"),
        ([a + ".bin"], r"a\.bin must be given without \.bin"),
        (["0.5", a, a, "0.5"], rf"'{a}' is not a weight"),
        (["0", a], "weight '0' must be positive"),
        (["nan", a], "weight 'nan' must be positive and finite"),
    ]:
        with pytest.raises(ValueError, match=rf"data\.indexed.*{message}") as caught:
            indexed_prefixes(entries)
        assert "\n" not in str(caught.value)


def test_require_indexed_tokens(indexed):
    ten = indexed("ten", [[i] * 5 for i in range(10)])
    one = indexed("one", [[1] * 100])
    require_indexed_tokens([ten], split="80,20", seq_length=9)
    require_indexed_tokens([ten], split="80,20,0", seq_length=9)
    with pytest.raises(ValueError, match=r"ten gives 10 validation tokens \(2 of its 10 sequences\), .*at least 11"):
        require_indexed_tokens([ten], split="80,20", seq_length=10)
    with pytest.raises(ValueError, match=r"ten gives 5 test tokens \(1 of its 10 sequences\)"):
        require_indexed_tokens([ten], split="70,20,10", seq_length=9)
    # Megatron would look for an epoch of no tokens without end.
    with pytest.raises(ValueError, match=r"one gives 0 validation tokens \(0 of its 1 sequences\)"):
        require_indexed_tokens([ten, one], split="80,20", seq_length=1)
    for split in ("95", "a,b", "1,2,3,4", "0,0", "-1,2", "", "1;2"):
        with pytest.raises(ValueError, match=r"data\.split must be two or three weights"):
            require_indexed_tokens([ten], split=split, seq_length=1)


def gpt_datasets(source, cache, num_samples, **options):
    arguments = {"split": None, "seq_length": 32, "seed": 3, "eod": 256, "vocab_size": 257} | options
    return build_gpt_datasets(
        source, num_samples=num_samples, cache_path=str(cache), is_built_on_rank=lambda: True, **arguments
    )


def assert_windows(dataset, stream, length=32):
    """The dataset's samples are the stream's windows of length + 1, each once."""
    found = set()
    for sample in dataset:
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
        assert sample["loss_mask"].tolist() == [1.0] * length
        assert sample["position_ids"].tolist() == list(range(length))
        found.add((*sample["tokens"].tolist(), sample["labels"][-1].item()))
    count = (len(stream) - 1) // length
    assert len(dataset) == count
    assert found == {tuple(stream[i * length : (i + 1) * length + 1]) for i in range(count)}


def test_indexed_data_written_anew_at_the_same_prefix_are_sampled_anew(indexed, tmp_path):
    def drawn():
        train, _, _ = gpt_datasets([prefix], tmp_path / "index", (20, 2, 0), split="90,10", seq_length=4)
        return {int(x) for sample in train for x in sample["tokens"]}

    prefix = indexed("data", [[i] * 5 for i in range(40)])
    assert drawn() <= set(range(40))
    indexed("data", [[100 + i] * 9 for i in range(10)])
    assert drawn() == set(range(100, 109))


def test_gpt_datasets_of_prepared_text(corpus, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    prepared = prepare(corpus, validation_fraction=0.2)
    train, validation, test = gpt_datasets(prepared, tmp_path / "index", (20, 5, 0))
    assert test is None
    assert (train.index_split, validation.index_split) == (Split.train, Split.valid)
    content, cut = corpus.read_bytes(), prepared.train_bytes
    assert_windows(train, [*content[:cut], 256])
    assert_windows(validation, [*content[cut:], 256])
    order = [sample["tokens"][:8].tolist() for sample in train]
    again, _, _ = gpt_datasets(prepared, tmp_path / "index", (20, 5, 0))
    other, _, _ = gpt_datasets(prepared, tmp_path / "index", (20, 5, 0), seed=4)
    assert order == [sample["tokens"][:8].tolist() for sample in again]
    assert order != [sample["tokens"][:8].tolist() for sample in other]


def test_gpt_datasets_of_indexed_entries(indexed, tmp_path):
    documents = [[i + 1] * 100 for i in range(10)]
    prefix = indexed("ten", documents)
    train, validation, test = gpt_datasets([prefix], tmp_path / "index", (10, 5, 0), split="80,20,0")
    assert test is None
    seen = [{token for sample in part for token in sample["tokens"].tolist()} for part in (train, validation)]
    assert seen == [set(range(1, 9)), {9, 10}]
    assert all(torch.equal(sample["labels"][:-1], sample["tokens"][1:]) for sample in train)

    low, high = indexed("low", [[1] * 5000]), indexed("high", [[2] * 5000])
    blended, _, _ = gpt_datasets(["3", low, "1", high], tmp_path / "index", (100, 1, 0), split="1,0")
    share = np.mean([sample["tokens"][0].item() == 1 for sample in (blended[i] for i in range(100))])
    assert share == pytest.approx(0.75, abs=0.02)


def test_gpt_datasets_want_a_split_for_indexed_entries_alone(indexed, corpus, prepare, tmp_path):
    with pytest.raises(ValueError, match=r"data\.split is needed with data\.indexed"):
        gpt_datasets([indexed("a", [[1] * 100])], tmp_path, (1, 1, 0))
    with pytest.raises(ValueError, match=r"data\.split applies to data\.indexed only, got '9,1'"):
        gpt_datasets(prepare(corpus), tmp_path, (1, 1, 0), split="9,1")


def test_ids_outside_the_vocabulary_are_found(tmp_path, monkeypatch):
    from megatron_carve.data import datasets as data

    prefix = str(tmp_path / "ids")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.tensor([1, 2, 900, 3] * 100))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    require_known_ids([prefix], vocab_size=901)
    monkeypatch.setattr(data, "_SAMPLE_TOKENS", 50)  # found in samples too
    with pytest.raises(
        ValueError, match=r"ids\.bin holds the token id 900, outside the vocabulary of 900; name the tok"
    ):
        require_known_ids(["0.5", prefix], vocab_size=900)


def test_the_same_samples_again_and_again():
    from megatron.core.datasets.utils import Split

    again = SameSamples(list("abcdefg"), count=3, length=8)
    assert len(again) == 8 and "".join(again[i] for i in range(8)) == "abcabcab"
    assert again.split == Split.valid
