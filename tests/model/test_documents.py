"""Documents kept apart: each alone gives the same, in every layer that knows them, and nothing is learnt across."""

import json
from itertools import accumulate

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.models import hybrid_model, one_process
from support.train import losses, train

from megatron_carve.data.blend import indexed_blend
from megatron_carve.data.datasets import build_gpt_datasets
from megatron_carve.model.context.documents import Documents
from megatron_carve.recipe import RecipeError, load_recipe

ROWS = [[1, 37, 70, 20], [128], [64, 64]]
T = 128
DYNAMIC = {"short_convolution": "dynamic", "convolution_rank": 4}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def documents(rows: list[list[int]]) -> Documents:
    most = max(map(len, rows))
    starts = [[*accumulate([0, *lengths[:-1]]), *[T] * (most - len(lengths))] for lengths in rows]
    return Documents.of_rows(torch.tensor(starts, dtype=torch.int32), T)


def logits_and_gradient(model, tokens: torch.Tensor, weight: torch.Tensor, packed=None):
    """Logits [1, tokens, V], and the gradients of their weighted sum."""
    positions = torch.arange(tokens.shape[1])[None]
    out = model(tokens, positions, None, packed_seq_params=packed)
    return out, torch.autograd.grad((out * weight).sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (15, 0), "attention_convolution": "static"},
        {"num_query_groups": 2, "attention_convolution": "dynamic", "mixer": {"content_rank": 4, **DYNAMIC}},
    ],
)
def test_each_document_gives_what_it_gives_alone(options):
    model = hybrid_model("C-*-2-K-", length=len(ROWS) * T, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(0, 64, (1, len(ROWS) * T))
    weight = torch.randn(1, len(ROWS) * T, 64)
    together, gradients = logits_and_gradient(model, tokens, weight, documents(ROWS))
    lengths = [length for row in ROWS for length in row]
    parts = [
        logits_and_gradient(model, *of_document)
        for of_document in zip(tokens.split(lengths, 1), weight.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat([out for out, _ in parts], 1), rtol=1e-4, atol=2e-5)
    for name, found, *alone in zip(
        [name for name, p in model.named_parameters() if p.requires_grad],
        gradients, *(gradient for _, gradient in parts), strict=True,
    ):  # fmt: skip
        error = (found - sum(alone)).norm() / sum(alone).norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_boundaries_of_rows_are_boundaries_of_documents():
    packed = documents(ROWS)
    assert packed.cu_seqlens_q.unique().tolist() == [0, 1, 38, 108, 128, 256, 320, 384]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.packed().qkv_format == "thd"


@pytest.mark.slow
def test_the_token_after_a_document_is_not_learnt(tmp_path):
    """Documents of one letter each, in any order: their inside can be learnt, which comes next cannot."""
    letters = "abcdefgh"
    order = np.random.default_rng(0).integers(len(letters), size=400)
    (tmp_path / "letters.jsonl").write_text("\n".join(json.dumps({"text": 6 * letters[i]}) for i in order))
    words = [
        "debug", "data.text=letters.jsonl", "model.pattern=C-*-", "training.steps=60", "training.seq_length=64",
        "training.micro_batch_size=4", "training.global_batch_size=4", "training.eval_iters=2",
        "checkpoint.interval=null", "run.log_interval=1",
    ]  # fmt: skip
    train(tmp_path, *words, "data.documents=apart", "run.name=apart")
    # Were it asked for, the first of 7 tokens (6 letters and the end) would be a guess among 8: 0.3 nats of all.
    assert min(losses(tmp_path, "apart").values()) < 0.15 < np.log(8) / 7


def test_a_sample_says_where_its_documents_begin(tmp_path):
    prefix, eod = str(tmp_path / "numbers"), 99
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    texts = [[i, *range(60, 60 + i), eod] for i in range(1, 12)]
    for text in texts:
        builder.add_document(torch.tensor(text), [len(text)])
    builder.finalize(f"{prefix}.idx")
    dataset, _ = build_gpt_datasets(
        indexed_blend([prefix], split="1,0,0"), num_samples=(8, 0), seq_length=24, seed=1, eod=eod, vocab_size=100,
        cache_path=str(tmp_path / "cache"), is_built_on_rank=lambda: True, documents_apart=True,
    )  # fmt: skip
    for sample in (dataset[i] for i in range(8)):
        tokens, starts = sample["tokens"].tolist(), sample["cu_seqlens"]
        assert starts.shape == (25,) and starts.dtype == torch.int32
        first = [0] + [i + 1 for i, token in enumerate(tokens[:-1]) if token == eod]
        assert starts[starts < 24].tolist() == first
        assert sample["loss_mask"].tolist() == [float(token != eod) for token in tokens]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["data.text=null"], "is for data.text and data.indexed, whose sequences hold several; got neither"),
        (["model.pattern=C-G-"], "is known to the layers * - 2 C E K, got G in model.pattern 'C-G-'"),
        (["model.pattern=C-/C-"], "is known to the layers * - 2 C E K, got / in model.pattern 'C-/C-'"),
        (["megatron.cuda_graph_impl=local"], "has other shapes at every step"),
    ],
)
def test_what_documents_cannot_be_kept_apart_in_is_refused(words, complaint):
    with pytest.raises(RecipeError) as refused:
        load_recipe("debug", ["data.text=texts.jsonl", "data.documents=apart", "model.pattern=C-*-", *words])
    assert f"data.documents: apart {complaint}" in str(refused.value)
