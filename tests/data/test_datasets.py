"""Indexed datasets and Megatron's GPT datasets of them: checks, splits, samples."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_carve.data import blend as blends
from megatron_carve.data import blocks
from megatron_carve.data.blend import Part, indexed_blend, require_known_ids, text_blend
from megatron_carve.data.datasets import SameSamples, build_gpt_datasets
from megatron_carve.data.text import Texts, prepare_folder
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


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


def test_entries_are_prefixes_or_weights_and_prefixes(indexed):
    a, b = indexed("a", [[1, 2]] * 10), indexed("b", [[3, 4]] * 30)

    def train(*entries):
        return indexed_blend(entries, split="80,20").train

    assert train(a) == (Part(a, 16, 0, 0.8),)
    assert train(f" {a} ") == train(a)
    assert train(a, b) == (Part(a, 16, 0, 0.8), Part(b, 48, 0, 0.8))  # as they have tokens
    assert train("0.3", a, "7", b) == (Part(a, 0.3, 0, 0.8), Part(b, 7, 0, 0.8))
    blend = indexed_blend(["1", a, "3", b], split="80,20")
    assert blend.validation == (Part(a, 1, 0.8, 1), Part(b, 3, 0.8, 1))
    assert blend.prefixes == [a, b]
    assert indexed_blend([a], split="1,0").validation == ()


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
            indexed_blend(entries, split="80,20")
        assert "\n" not in str(caught.value)


def test_every_set_needs_the_tokens_of_a_sample(indexed):
    ten = indexed("ten", [[i] * 5 for i in range(10)])
    one = indexed("one", [[1] * 100])

    def require(entries, split, seq_length):
        indexed_blend(entries, split=split).require_tokens(seq_length)

    require([ten], "80,20", 9)
    require([ten], "80,20,0", 9)
    with pytest.raises(ValueError, match=r"'80,20', .*ten gives 10 validation tokens \(2 sequences\), .*at least 11"):
        require([ten], "80,20", 10)
    # Megatron would look for an epoch of no tokens without end.
    with pytest.raises(ValueError, match=r"one gives 0 validation tokens \(0 sequences\)"):
        require([ten, one], "80,20", 1)
    for split in ("95", "a,b", "1,2,3,4", "0,0", "-1,2", "", "1;2"):
        with pytest.raises(ValueError, match=r"data\.split must be two or three weights"):
            require([ten], split, 1)


def gpt_datasets(blend, cache, num_samples, **options):
    arguments = {"seq_length": 32, "seed": 3, "eod": 256, "vocab_size": 257} | options
    return build_gpt_datasets(
        blend, num_samples=num_samples, cache_path=str(cache), is_built_on_rank=lambda: True, **arguments
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
        blend = indexed_blend([prefix], split="90,10")
        train, _ = gpt_datasets(blend, tmp_path / "index", (20, 2), seq_length=4)
        return {int(x) for sample in train for x in sample["tokens"]}

    prefix = indexed("data", [[i] * 5 for i in range(40)])
    assert drawn() <= set(range(40))
    indexed("data", [[100 + i] * 9 for i in range(10)])
    assert drawn() == set(range(100, 109))


def test_gpt_datasets_of_prepared_text(corpus, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    prepared = prepare(corpus, validation_fraction=0.2)
    train, validation = gpt_datasets(text_blend(prepared), tmp_path / "index", (20, 5))
    assert (train.index_split, validation.index_split) == (Split.train, Split.valid)
    content, cut = corpus.read_bytes(), prepared.train_bytes
    assert_windows(train, [*content[:cut], 256])
    assert_windows(validation, [*content[cut:], 256])
    order = [sample["tokens"][:8].tolist() for sample in train]
    again, _ = gpt_datasets(text_blend(prepared), tmp_path / "index", (20, 5))
    other, _ = gpt_datasets(text_blend(prepared), tmp_path / "index", (20, 5), seed=4)
    assert order == [sample["tokens"][:8].tolist() for sample in again]
    assert order != [sample["tokens"][:8].tolist() for sample in other]


def test_gpt_datasets_of_indexed_entries(indexed, tmp_path):
    documents = [[i + 1] * 100 for i in range(10)]
    prefix = indexed("ten", documents)
    train, validation = gpt_datasets(indexed_blend([prefix], split="80,20,0"), tmp_path / "index", (10, 5))
    seen = [{token for sample in part for token in sample["tokens"].tolist()} for part in (train, validation)]
    assert seen == [set(range(1, 9)), {9, 10}]
    assert all(torch.equal(sample["labels"][:-1], sample["tokens"][1:]) for sample in train)


def share_of(dataset, value, count):
    return np.mean([(dataset[i]["tokens"] == value).float().mean().item() for i in range(count)])


def test_sets_count_by_their_weights(indexed, tmp_path):
    low, high = indexed("low", [[1] * 500] * 10), indexed("high", [[2] * 500] * 10)
    blend = indexed_blend(["3", low, "1", high], split="50,50")
    train, validation = gpt_datasets(blend, tmp_path / "index", (100, 80))
    assert share_of(train, 1, 100) == pytest.approx(0.75, abs=0.02)
    assert share_of(validation, 1, 80) == pytest.approx(0.75, abs=0.02)
    # Without weights, by their tokens, and for as many epochs as it takes.
    larger = indexed("larger", [[3] * 500] * 30)
    train, _ = gpt_datasets(indexed_blend([low, larger], split="90,10"), tmp_path / "index", (2000, 1))
    assert len(train) >= 2000 > 20_000 / 32
    assert share_of(train, 3, 2000) == pytest.approx(0.75, abs=0.02)


@pytest.fixture
def folders(tmp_path):
    """Prepared folders of other bytes each, by name; the third without validation set."""

    def build(name, letter, fraction):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "{letter * 99}"}}\n' for _ in range(60)))
        return prepare_folder(tmp_path / name, Texts(path, BYTES, validation_fraction=fraction), progress=False).folder

    return build("one", "1", 0.5), build("two", "2", 0.1), build("three", "3", 0)


def test_prepared_folders_have_their_validation_sets(folders, tmp_path):
    one, two, three = folders
    blend = indexed_blend(["1", one, "4", two], split="95,5,0")
    train, validation = gpt_datasets(blend, tmp_path / "index", (100, 50))
    for dataset, count in ((train, 100), (validation, 50)):
        assert share_of(dataset, ord("2"), count) == pytest.approx(0.8 * 0.99, abs=0.02)
    assert indexed_blend([one, two], split="95,5,0").train[1].weight == 54 * 100
    with pytest.raises(
        ValueError, match=r"data\.indexed: .*/three was prepared without a validation set; give data\.v"
    ):
        indexed_blend([one, three], split="95,5,0")
    with pytest.raises(ValueError, match=r"data\.indexed: .*/three/train is a prefix beside prepared folders"):
        indexed_blend([one, f"{three}/train"], split="95,5,0")
    with pytest.raises(ValueError, match=r"data\.indexed: .* is a folder that `python -m megatron_carve\.prepare` did"):
        indexed_blend([str(tmp_path)], split="95,5,0")


def test_validation_data_of_their_own(folders, tmp_path):
    one, two, three = folders
    blend = indexed_blend([one, f"{two}/train"], split="95,5,0", validation=[three])
    train, validation = gpt_datasets(blend, tmp_path / "index", (300, 10))
    assert {int(token) for i in range(10) for token in validation[i]["tokens"]} == {ord("3"), 256}
    assert {int(token) for i in range(300) for token in train[i]["tokens"]} == {ord("1"), ord("2"), 256}
    # The same batches at every evaluation.
    again = SameSamples(validation, 10, 30)
    assert all(torch.equal(again[i]["tokens"], validation[i % 10]["tokens"]) for i in range(30))
    with pytest.raises(ValueError, match=r"data\.validation: .*absent\.bin does not exist"):
        indexed_blend([one], split="95,5,0", validation=[str(tmp_path / "absent")])


def test_counts_tell_what_a_run_sees(folders, indexed):
    one, two, _ = folders
    assert indexed_blend(["1", one, "3", two], split="95,5,0").counts(40_000, 32) == [
        "train: one/train: 30 documents, 3,000 tokens, 25.0% of the batches; the run sees 3.33 epochs of it",
        "train: two/train: 54 documents, 5,400 tokens, 75.0% of the batches; the run sees 5.56 epochs of it",
        "validation: one/validation: 30 documents, 3,000 tokens, 25.0% of the batches",
        "validation: two/validation: 6 documents, 600 tokens, 75.0% of the batches",
    ]
    ten = indexed("ten", [[i] * 5 for i in range(10)])
    assert indexed_blend([ten], split="80,20").counts(100, 4) == [
        "train: ten: 8 documents, 40 tokens; the run sees 2.5 epochs of it",
        "validation: ten: 2 documents, 10 tokens",
    ]


def test_ids_outside_the_vocabulary_are_found(tmp_path, monkeypatch):
    prefix = str(tmp_path / "ids")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.tensor([1, 2, 900, 3] * 100))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    require_known_ids([prefix], vocab_size=901)
    monkeypatch.setattr(blends, "_SAMPLE_TOKENS", 50)  # found in samples too
    with pytest.raises(
        ValueError, match=r"ids\.bin holds the token id 900, outside the vocabulary of 900; name the tok"
    ):
        require_known_ids([prefix], vocab_size=900)


def test_the_same_samples_again_and_again():
    from megatron.core.datasets.utils import Split

    again = SameSamples(list("abcdefg"), count=3, length=8)
    assert len(again) == 8 and "".join(again[i] for i in range(8)) == "abcabcab"
    assert again.split == Split.valid
