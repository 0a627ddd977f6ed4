"""Attention by heads: what cannot be exchanged is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from support.models import config, groups, one_process

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
