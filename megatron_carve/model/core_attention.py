"""Megatron's core attention, of documents that are kept apart too, and its ways under context parallelism.

By heads: ranks exchange the tokens of their pieces of a sequence for heads, as mixers do (HeadExchange). Each attends,
with its share of the heads, as a rank alone would, and they exchange back. So do local layers, which know no other way,
and documents, which lie across the pieces anyhow.

By window: where Transformer Engine's layers would gather all keys and values (cp_comm_type all_gather), they attend
each piece of a joined sequence with what the window reaches of the one before (attend_by_window), if the window is no
longer than a piece. Other joined sequences take its own ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_carve.kernels.wide_copy import contiguous
from megatron_carve.model.context.documents import Documents
from megatron_carve.model.context.exchange import HeadExchange
from megatron_carve.model.context.windows import attend_by_window


def share_of_heads(config: TransformerConfig, *, tensor: int, context: int) -> TransformerConfig:
    """The configuration of attention that one of `context` ranks does by heads; `config` itself where that is one.

    Args:
        tensor, context: sizes of the parallel groups.

    Raises:
        ValueError: heads that cannot be divided, or options that need all of them on a rank.
    """
    if context == 1:
        return config
    assert config.num_query_groups is not None
    if config.num_query_groups % (tensor * context):
        raise ValueError(
            "num_query_groups: attention by heads expects a multiple of the tensor times the context parallel size = "
            f"{tensor} * {context}, got {config.num_query_groups}"
        )
    if config.softmax_type != "vanilla" or config.qk_clip:
        raise ValueError(
            "attention by heads under context parallelism: expected softmax_type vanilla without qk_clip, got "
            f"{config.softmax_type}, qk_clip {config.qk_clip}"
        )
    share = copy.copy(config)
    share.context_parallel_size = 1
    share.num_attention_heads //= context
    share.num_query_groups = config.num_query_groups // context
    return share


def attend_by_heads(
    exchange: HeadExchange, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor,
    value: Tensor, documents: Documents | None,
) -> Tensor:  # fmt: skip
    """What `attend` makes of whole sequences, for this rank's tokens and all heads.

    Args:
        attend: [T, B, heads / size, D] and [T, B, groups / size, D] twice, tokens in order -> [T, B, heads / size * D].
        query: [T / size, B, heads, D]; key and value: [T / size, B, groups, D].
        documents: says how tokens are divided over ranks; None for rows that are not packed.

    Returns:
        [T / size, B, heads * D].
    """
    if exchange.size == 1:
        return attend(query, key, value)
    order = exchange.order(query.shape[0], documents, "sequence", query.device)
    pieces = [(x.flatten(2), [x.shape[2] * x.shape[3]]) for x in (query, key, value)]
    q, k, v = (contiguous(x).unflatten(-1, (-1, query.shape[-1])) for x in exchange.enter(pieces, order))
    return exchange.leave(attend(q, k, v), order)


class LocalAttention(DotProductAttention):
    """Without Transformer Engine. Scores of a row's tokens with all of the row's are formed, as upstream's are."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **options: Any
    ) -> None:
        share = share_of_heads(config, tensor=pg_collection.tp.size(), context=pg_collection.cp.size())
        super().__init__(share, *args, pg_collection=pg_collection, **options)
        self.exchange = HeadExchange(pg_collection.cp)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
        packed_seq_params: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """As upstream; with Documents query is [rows * T, 1, heads, D], key and value [rows * T, 1, groups, D], the
        result [rows * T, 1, heads * D].

        Raises:
            ValueError: an attention_mask under context parallelism: it is of this rank's tokens.
        """
        upstream = super().forward

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if isinstance(packed_seq_params, Documents):
                return self._attend_to_documents(q, k, v, packed_seq_params)
            return upstream(q, k, v, attention_mask, *args, packed_seq_params=packed_seq_params, **options)

        if packed_seq_params is not None and not isinstance(packed_seq_params, Documents):
            return attend(query, key, value)  # which upstream refuses
        if self.exchange.size > 1 and packed_seq_params is None and attention_mask is not None:
            raise ValueError("attention_mask: local layers expect None under context parallelism, got a tensor")
        return attend_by_heads(self.exchange, attend, query, key, value, packed_seq_params)

    def _attend_to_documents(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        c = self.config
        if c.softmax_type != "vanilla":
            raise NotImplementedError(f"softmax_type={c.softmax_type} with data.documents=apart and local layers")
        windowed = is_layer_window_attention(c.window_size, c.window_attn_skip_freq, self.layer_number)
        mask = documents.mask(c.window_size[0] + 1 if windowed else None)
        q, k, v = (x.unflatten(0, (documents.rows, -1)).squeeze(2).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.attention_dropout.p if self.training else 0.0, scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1).flatten(1).unsqueeze(1)


if HAVE_TE:

    class TransformerEngineAttention(TEDotProductAttention):
        """Transformer Engine's, which gets documents as Megatron's packed sequences; shapes as for LocalAttention."""

        num_gqa_groups_per_partition: int

        def __init__(
            self, config: TransformerConfig, layer_number: int, *args: Any, pg_collection: ProcessGroupCollection,
            **options: Any,
        ) -> None:  # fmt: skip
            super().__init__(config, layer_number, *args, pg_collection=pg_collection, **options)
            self.exchange = HeadExchange(pg_collection.cp)
            windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
            gathers = self.exchange.size > 1 and self.cp_comm_type == "all_gather"
            self.window: int | None = config.window_size[0] + 1 if windowed and gathers else None

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **options: Any
        ) -> Tensor:
            upstream = super().forward
            if isinstance(packed_seq_params, Documents):
                packed = packed_seq_params.packed()

                def attend(*by_head: Tensor) -> Tensor:
                    tokens = (x.squeeze(1) for x in by_head)
                    out = upstream(*tokens, *args, packed_seq_params=packed, **options)
                    return out.reshape(out.shape[0], 1, -1)

                share = share_of_heads(self.config, tensor=self.tp_size, context=self.exchange.size)
                with self._as_one_rank(share.num_query_groups // self.tp_size):
                    return attend_by_heads(self.exchange, attend, query, key, value, packed_seq_params)
            if self.window and packed_seq_params is None and 2 * self.window <= query.shape[0]:

                def attend_pieces(*pieces: Tensor) -> Tensor:
                    return upstream(*pieces, *args, **options)

                with self._as_one_rank(self.num_gqa_groups_per_partition):
                    return attend_by_window(self.exchange.group, attend_pieces, query, key, value, self.window)
            return upstream(query, key, value, *args, packed_seq_params=packed_seq_params, **options)

        @contextmanager
        def _as_one_rank(self, groups: int) -> Iterator[None]:
            """As this layer is built without context parallelism, for so many query groups."""
            if self.exchange.size == 1:
                yield
                return
            context = self.cp_group, self.cp_global_ranks, self.cp_stream, self.cp_comm_type
            of_all = self.num_gqa_groups_per_partition
            self.set_context_parallel_group(None, None, None, self.cp_comm_type)
            self.num_gqa_groups_per_partition = groups
            try:
                yield
            finally:
                self.set_context_parallel_group(*context)
                self.num_gqa_groups_per_partition = of_all
