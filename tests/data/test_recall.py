"""The recall task: answers, draws, streams and refusals."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split

from megatron_carve.data.recall import RecallDataset, RecallTask


def recall(**options):
    return RecallDataset(**({"seq_length": 64, "num_samples": 50, "seed": 5, "split": "train"} | options))


def digest(dataset, order):
    parts = {i: dataset[i] for i in order}
    return hashlib.sha256(b"".join(t.numpy().tobytes() for i in sorted(parts) for t in parts[i].values())).hexdigest()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_overwrites": 7},
        {"seq_length": 65, "num_overwrites": 1},
        {"num_pairs": 1, "num_keys": 1, "seq_length": 4},
        {"num_pairs": 12, "num_keys": 3, "num_values": 5, "num_overwrites": 9, "seq_length": 101},
    ],
)
def test_answers_agree_with_a_dictionary(sizes):
    dataset = recall(**sizes)
    task = dataset.task
    assigned_again = 0
    for sample in dataset:
        tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
        assert tokens[1:] == labels[:-1]
        sequence = [*tokens, labels[-1]]
        memory = {}
        for at in range(0, 2 * task.num_pairs, 2):
            key, value = sequence[at : at + 2]
            assert 0 <= key < task.num_keys <= value < task.num_keys + task.num_values
            assigned_again += key in memory
            memory[key] = value
        assert len(memory) == task.num_pairs - task.num_overwrites
        assert sequence[2 * task.num_pairs] == task.separator == task.vocab_size - 1
        expected_mask = [0.0] * task.seq_length
        for at in range(2 * task.num_pairs + 1, task.seq_length, 2):
            assert sequence[at + 1] == memory[sequence[at]]
            expected_mask[at] = 1.0
        if task.seq_length % 2:
            assert sequence[-1] in memory
        assert sample["loss_mask"].tolist() == expected_mask
        assert sum(expected_mask) == task.num_answers > 0
        assert sample["position_ids"].tolist() == list(range(task.seq_length))
        assert {name: tensor.dtype for name, tensor in sample.items()} == {
            "tokens": torch.int64,
            "labels": torch.int64,
            "loss_mask": torch.float32,
            "position_ids": torch.int64,
        }
    assert assigned_again == len(dataset) * task.num_overwrites


def test_draws_every_key_value_and_pair_evenly():
    dataset = recall(num_samples=600, num_pairs=6, num_keys=8, num_values=4, num_overwrites=2, seq_length=72)
    samples = [sample["tokens"].numpy() for sample in dataset]
    keys = np.bincount(np.concatenate([s[0:12:2] for s in samples]), minlength=8) / (600 * 6)
    values = np.bincount(np.concatenate([s[1:12:2] for s in samples]) - 8, minlength=4) / (600 * 6)
    assert keys == pytest.approx(np.full(8, 1 / 8), abs=0.025)
    assert values == pytest.approx(np.full(4, 1 / 4), abs=0.04)
    asked, again, place = np.zeros(4), np.zeros(6), []
    for sample in samples:
        pairs = sample[0:12:2].tolist()
        order = list(dict.fromkeys(pairs))
        for at, key in enumerate(pairs):
            seen = len(set(pairs[:at]))
            again[at] += key in pairs[:at]
            if key in pairs[:at] and seen > 1:
                place.append(order.index(key) / (seen - 1))
        for key in sample[13::2]:
            asked[order.index(key)] += 1
    # Queries ask for any key, overwriting pairs are any but the first, and they overwrite any key seen before.
    assert asked / asked.sum() == pytest.approx(np.full(4, 1 / 4), abs=0.02)
    assert again / 600 == pytest.approx([0.0, *[2 / 5] * 5], abs=0.09)
    assert np.mean(place) == pytest.approx(0.5, abs=0.06)


def test_samples_do_not_depend_on_order_or_global_state():
    first = digest(recall(), range(50))
    np.random.seed(1)
    torch.manual_seed(1)
    assert digest(recall(), reversed(range(50))) == first
    state = np.random.get_state()[1].tolist()
    assert digest(recall(num_samples=1000), range(50)) == first
    assert np.random.get_state()[1].tolist() == state


def test_samples_are_not_shared_between_reads():
    dataset = recall()
    kept = {name: tensor.clone() for name, tensor in dataset[0].items()}
    for tensor in dataset[0].values():
        tensor.fill_(0)
    assert all(torch.equal(dataset[0][name], kept[name]) for name in kept)


def test_is_the_same_in_another_process():
    code = (
        "import hashlib, torch; from megatron_carve.data.recall import RecallDataset\n"
        "d = RecallDataset(seq_length=64, num_samples=50, seed=5, split='train', num_overwrites=3)\n"
        "samples = [d[i] for i in reversed(range(50))][::-1]\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for s in samples for t in s.values())).hexdigest())"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "12"},
    )
    assert shown.stdout.strip() == digest(recall(num_overwrites=3), range(50)), shown.stderr


def test_streams_are_disjoint():
    drawn = [
        tuple(sample["tokens"].tolist())
        for seed in (5, 6)
        for split in ("train", "validation")
        for sample in recall(seed=seed, split=split, num_samples=100)
    ]
    assert len(set(drawn)) == 400


def test_attributes():
    dataset = recall(num_keys=20, num_values=7, num_pairs=3, num_samples=9)
    assert dataset.vocab_size == 28
    assert dataset.chance_loss == pytest.approx(1.9459101490553132)
    assert len(dataset) == 9
    assert dataset.split is Split.train
    assert recall(split="validation").split is Split.valid
    for index in (-1, 9):
        with pytest.raises(IndexError, match=rf"index {index} is outside \[0, 9\)"):
            dataset[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 0}, r"num_keys must be at least 1, got 0"),
        ({"num_values": 1}, r"num_values must be at least 2, got 1"),
        ({"num_pairs": 0}, r"num_pairs must be at least 1, got 0"),
        ({"num_pairs": 32}, r"num_pairs 32 needs a seq_length of at least 66 .*, got 64"),
        ({"num_pairs": 4, "num_keys": 3}, r"num_pairs 4 with num_overwrites 0 needs 4 different keys, .*num_keys is 3"),
        ({"num_pairs": 4, "num_overwrites": 4}, r"num_overwrites must be at least 0 and below num_pairs 4, got 4"),
        ({"num_overwrites": -1}, r"num_overwrites must be at least 0 and below num_pairs 16, got -1"),
    ],
)
def test_task_refusals(options, message):
    with pytest.raises(ValueError, match=rf"^data\.recall\.{message}"):
        RecallTask(**({"seq_length": 64} | options))
    with pytest.raises(ValueError, match=rf"^data\.recall\.{message}"):
        recall(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": -1}, r"num_samples must not be negative, got -1"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
        ({"split": "test"}, r"split must be one of train, validation, got 'test'"),
    ],
)
def test_dataset_refusals(options, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        recall(**options)


def test_smallest_sequence_has_one_answer():
    assert RecallTask(seq_length=10, num_pairs=4).num_answers == 1
    with pytest.raises(ValueError, match=r"num_pairs 4 needs a seq_length of at least 10"):
        RecallTask(seq_length=9, num_pairs=4)
