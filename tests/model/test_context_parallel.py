"""Mixers over a context-parallel group: equal to one process, packed or not; what cannot be is refused by name.

Packed documents have random lengths and are compared with each document run alone.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.parallel import run_ranks

from megatron_carve.model.context import exchange as exchange_module
from megatron_carve.model.context.exchange import HeadExchange

WORKER = Path(__file__).parents[1] / "support" / "context_worker.py"


DYNAMIC = {"short_convolution": "dynamic", "convolution_rank": 3}
# Kind of mixer, whether documents are packed, the order in which they were divided, options.
LAYERS = [
    ("carve", False, "document", {}),
    ("gdn2", False, "document", {"conv_bias": True}),
    ("carve", True, "document", {"decay_projection": "full_rank", "output_gate_projection": "full_rank"}),
    ("carve", True, "document", {"erase": "delta", "output_gate_activation": "none"}),
    ("gdn2", True, "document", {"short_convolution": "none"}),
    ("carve", True, "sequence", {"conv_bias": True, "content_grad": "detached", "prediction": "decayed"}),
    ("gdn2", True, "sequence", {"conv_bias": True, **DYNAMIC}),
    ("kda", True, "document", {"negative_eigenvalues": True, **DYNAMIC}),
]


@pytest.mark.parametrize(
    ("processes", "method", "key_heads"),
    [
        (1, "auto", 2),
        (2, "heads", 4),
        pytest.param(4, "heads", 4, marks=pytest.mark.slow),
        (2, "auto", 3),
        pytest.param(4, "auto", 2, marks=pytest.mark.slow),
    ],
)
def test_group_equals_one_process(processes, method, key_heads):
    """Where the heads do not divide, "auto" is by sequence."""
    jobs = [
        {
            "kind": kind, "packed": packed, "order": order, "method": method, "key_heads": key_heads,
            "options": options, "seed": 10 * processes + i,
        }
        for i, (kind, packed, order, options) in enumerate(LAYERS)
    ]  # fmt: skip
    run_ranks(processes, WORKER, jobs)


def exchange(size: int) -> HeadExchange:
    return HeadExchange(SimpleNamespace(size=lambda: size, rank=lambda: 0))


def packed(ends: list[int]) -> SimpleNamespace:
    return SimpleNamespace(qkv_format="thd", cu_seqlens_q=torch.tensor(ends), cu_seqlens_q_padded=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [4, 1])
def test_what_a_rank_gets_by_heads(monkeypatch, dtype, width):
    """Each rank its share of every section, in one tensor: here what the first of two gives; and back."""
    monkeypatch.setattr(exchange_module, "all_to_all", lambda group, x: x.clone())
    two, tokens = exchange(2), 6
    order = two.order(tokens, None, "sequence", "cpu")
    whole = torch.randn(tokens, 2, 26 * width).to(dtype).requires_grad_()
    first, second = whole.split([16 * width, 10 * width], -1)
    sections = [[8 * width, 8 * width], [10 * width]]
    found = two.enter([(first, sections[0]), (second, sections[1])], order)
    for x, piece, sizes in zip(found, (first, second), sections, strict=True):
        shares = [section.chunk(2, -1) for section in piece.split(sizes, -1)]
        by_rank = torch.cat([torch.cat([share[rank] for share in shares], -1) for rank in range(2)])
        torch.testing.assert_close(x, by_rank[order.natural], rtol=0, atol=0)
        (d_whole,) = torch.autograd.grad(x.sum(), whole, retain_graph=True)
        torch.testing.assert_close(d_whole, torch.autograd.grad(piece.sum(), whole, retain_graph=True)[0])
    weights = torch.randn_like(found[0])
    (gradient,) = torch.autograd.grad(two.leave(found[0], order), found[0], two.leave(weights, order))
    torch.testing.assert_close(gradient, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "documents", "message"),
    [
        (5, None, "expected a length that 2 \\* context_parallel_size = 4 divides, got 10"),
        (8, [0, 8, 14, 16], "packed documents: expected lengths that .* = 4 divides, padding included, got 6, 2"),
        (8, [0, 8], "cu_seqlens: expected to end at the 16 tokens of all ranks, got 8"),
    ],
)
def test_orders_that_cannot_be_are_refused(tokens, documents, message):
    params = None if documents is None else packed(documents)
    with pytest.raises(ValueError, match=message):
        exchange(2).order(tokens, params, "document", "cpu")


def test_order_is_found_once_for_the_layers_of_a_step():
    params = packed([0, 8, 16])
    first = exchange(2).order(8, params, "document", "cpu")
    assert exchange(2).order(8, params, "document", "cpu") is first
    assert torch.equal(first.natural[first.pieces], torch.arange(16))
    # document 0 in pieces of two: rank 0 holds the first and the last, rank 1 those between
    assert first.natural[:8].tolist() == [0, 1, 8, 9, 10, 11, 2, 3]
