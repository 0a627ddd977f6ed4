"""Megatron's core attention, of documents that are kept apart too."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_carve.model.context.documents import Documents


class LocalAttention(DotProductAttention):
    """Without Transformer Engine. Scores of a row's tokens with all of the row's are formed, as upstream's are."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
        packed_seq_params: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """As upstream; with Documents query is [rows * T, 1, heads, D], key and value [rows * T, 1, groups, D], the
        result [rows * T, 1, heads * D]."""
        if not isinstance(packed_seq_params, Documents):
            return super().forward(
                query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **options
            )
        c = self.config
        if c.softmax_type != "vanilla":
            raise NotImplementedError(f"softmax_type={c.softmax_type} with data.documents=apart and local layers")
        windowed = is_layer_window_attention(c.window_size, c.window_attn_skip_freq, self.layer_number)
        mask = packed_seq_params.mask(c.window_size[0] + 1 if windowed else None)
        q, k, v = (x.unflatten(0, (packed_seq_params.rows, -1)).squeeze(2).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=self.attention_dropout.p if self.training else 0.0, scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1).flatten(1).unsqueeze(1)


if HAVE_TE:

    class TransformerEngineAttention(TEDotProductAttention):
        """Transformer Engine's, which gets documents as Megatron's packed sequences; shapes as for LocalAttention."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **options: Any
        ) -> Tensor:
            if not isinstance(packed_seq_params, Documents):
                return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **options)
            tokens = (x.squeeze(1) for x in (query, key, value))
            out = super().forward(*tokens, *args, packed_seq_params=packed_seq_params.packed(), **options)
            return out.reshape(out.shape[0], 1, -1)
