"""Attention under context parallelism: by heads, what cannot be exchanged is refused by name; by window, in values."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.models import config, groups, one_process
from support.parallel import places

from megatron_carve.model.context import windows
from megatron_carve.model.core_attention import LocalAttention, share_of_heads
from megatron_carve.recipe import load_recipe
from megatron_carve.run.preflight import choose_layers

REFUSED = [
    ({"num_query_groups": 2}, r"num_query_groups: .* context parallel size = 1 \* 4, got 2"),
    ({"softmax_type": "off-by-one"}, "expected softmax_type vanilla .* got off-by-one, qk_clip False"),
    ({"qk_clip": True}, "without qk_clip, got vanilla, qk_clip True"),
]


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


@pytest.mark.parametrize(("changes", "complaint"), REFUSED)
def test_what_ranks_cannot_share_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        share_of_heads(config(**changes), tensor=1, context=4)


def test_a_share_is_of_whole_sequences():
    whole = config(context_parallel_size=2, num_attention_heads=8, num_query_groups=4, hidden_size=64)
    share = share_of_heads(whole, tensor=2, context=2)
    assert (share.context_parallel_size, share.num_attention_heads, share.num_query_groups) == (1, 4, 2)
    assert (whole.context_parallel_size, whole.num_attention_heads, share.kv_channels) == (2, 8, 8)
    assert share_of_heads(whole, tensor=2, context=1) is whole


def test_a_mask_of_a_rank_s_tokens_is_refused():
    two = groups()
    two.cp = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    attention = LocalAttention(config(context_parallel_size=2), 1, None, "self", pg_collection=two)
    x = torch.randn(8, 1, 4, 8)
    with pytest.raises(ValueError, match="attention_mask: local layers expect None under context parallelism"):
        attention(x, x, x, torch.ones(1, 1, 8, 16, dtype=torch.bool))


def test_local_layers_need_heads_that_divide():
    words = ["model.pattern=C-*-", "parallel.context=2", "model.num_query_groups=1"]
    with pytest.raises(ValueError, match=r"model.num_query_groups: .* = 1 \* 2 with model.layers: local, got 1"):
        choose_layers(load_recipe("debug", words), "cpu")
    assert choose_layers(load_recipe("debug", words[:2]), "cpu") == "local"


def attend(query, key, value, window):
    """Causal, with a window: [T, B, heads, D] and [T, B, groups, D] twice -> [T, B, heads * D]."""
    q, k, v = (x.movedim(0, 2) for x in (query, key, value))
    places = torch.arange(len(query))
    back = places[:, None] - places
    out = F.scaled_dot_product_attention(q, k, v, (back >= 0) & (back < window), enable_gqa=True)
    return out.movedim(2, 0).flatten(2)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shorter", [0, 3])
def test_pieces_see_what_the_window_reaches(monkeypatch, size, shorter):
    """Ranks are threads here, in one autograd graph. A window as long as a piece, and a shorter one."""
    piece = 5
    window, tokens = piece - shorter, 2 * size * piece
    shapes = [(tokens, 2, heads, 8) for heads in (4, 2, 2)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(tokens, 2, 32, dtype=torch.float64)
    sent, meet = {}, threading.Barrier(size, timeout=60)

    def all_to_all(group, x, received, given):
        sent[group.rank()] = x.split(given)
        meet.wait()
        parts = [sent[other][group.rank()] for other in range(size)]
        meet.wait()
        assert [len(part) for part in parts] == received
        return torch.cat(parts)

    monkeypatch.setattr(windows, "all_to_all", all_to_all)

    def of_rank(rank):
        group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
        mine = (x[places(rank, size, [tokens])] for x in leaves)
        return windows.attend_by_window(group, functools.partial(attend, window=window), *mine, window)

    with ThreadPoolExecutor(size) as ranks:
        found = torch.cat(list(ranks.map(of_rank, range(size))))
    order = torch.cat([places(rank, size, [tokens]) for rank in range(size)])
    whole = attend(*leaves, window)
    torch.testing.assert_close(found, whole[order])
    expected = torch.autograd.grad((whole * weights).sum(), leaves)
    for gradient, truth in zip(torch.autograd.grad((found * weights[order]).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, truth)
