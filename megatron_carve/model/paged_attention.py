"""Self attention in Megatron's dynamic inference context, whose keys and values lie in blocks.

Megatron has FlashAttention's kernels for that alone, which not every machine has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_carve.kernels import resolve_backend
from megatron_carve.model.requests import Requests, requests_of_step


class PagedAttention:
    """One layer's step.

    Args:
        context: a DynamicInferenceContext after its initialize_attention_state.
        layer_number: 1-based, of this pipeline stage.
        window: tokens that one attends to, itself included; None for all.
        attend: (query [B, heads, T, D], keys and values [B, groups, S, D], mask) -> [B, heads, T, D].
        attend_in_window: (query, keys, values, window), the queries being the last of those that have keys.
        scale: of the products of queries and keys.
        backend: of a token of every request: "torch", "triton" or "auto".
    """

    def __init__(
        self, context: Any, layer_number: int, window: int | None, attend: Callable[..., Tensor],
        attend_in_window: Callable[..., Tensor], *, scale: float, backend: str,
    ) -> None:  # fmt: skip
        self.context, self.window, self.scale, self.backend = context, window, scale, backend
        self.attend, self.attend_in_window = attend, attend_in_window
        self.requests: Requests = requests_of_step(context)
        keys, values, self.blocks = context.key_value_cache(layer_number)
        self.keys, self.values = keys.flatten(0, 1), values.flatten(0, 1)  # [places, groups, D]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, 1, heads, D], key and value [T, 1, groups, D] of a step's tokens, with their rotary embedding, to
        [T, 1, heads * D], zeros for padding. Keys and values are kept."""
        r, view = self.requests, self.context.gpu_view
        places = view.token_to_block_idx[: r.tokens] * self.context.block_size_tokens
        places = places + view.token_to_local_position_within_kv_block[: r.tokens]
        self.keys.index_copy_(0, places, key[:, 0])
        self.values.index_copy_(0, places, value[:, 0])
        out = []
        if r.decoding:
            out.append(self._next_tokens(query[: r.decoding, 0]))
        first = r.decoding
        for number, (start, length) in enumerate(zip(r.prompt_starts, r.prompt_lengths, strict=True)):
            out.append(self._prompt(self.blocks[r.decoding + number], start, query[first : first + length, 0]))
            first += length
        out.append(query.new_zeros(r.tokens - first, *query.shape[2:]))
        return torch.cat(out).flatten(1)[:, None]

    def _next_tokens(self, query: Tensor) -> Tensor:
        """A token of every request, [N, heads, D]; of fixed shapes, and reads nothing on the host."""
        blocks, last = self.blocks[: query.shape[0]], self.requests.positions[: query.shape[0], None]
        if resolve_backend(self.backend, query.device) == "triton":
            from megatron_carve.kernels.triton_backend.paged_attention import attend_to_blocks

            return attend_to_blocks(
                query, self.keys, self.values, blocks, last[:, 0], block_tokens=self.context.block_size_tokens,
                scale=self.scale, window=self.window,
            )  # fmt: skip
        length = self.context.active_attn_metadata["mha_metadata"].state_data["max_seqlen_k"]
        length = min(length, self.window or length)
        positions = last - length + 1 + torch.arange(length, device=query.device)
        mask = positions >= 0
        places = self._places(blocks, positions.clamp(min=0))
        keys, values = (x[places].transpose(1, 2) for x in (self.keys, self.values))
        return self.attend(query[:, :, None], keys, values, mask[:, None, None])[:, :, 0]

    def _prompt(self, blocks: Tensor, start: int, query: Tensor) -> Tensor:
        """The next tokens of one prompt, [T, heads, D]."""
        end = start + query.shape[0]
        first = 0 if self.window is None else max(0, start - self.window + 1)
        positions = torch.arange(first, end, device=query.device)
        places = self._places(blocks[None], positions[None])
        keys, values = (x[places].transpose(1, 2) for x in (self.keys, self.values))
        query = query.transpose(0, 1)[None]
        if self.window is not None:
            out = self.attend_in_window(query, keys, values, self.window)
        else:
            out = self.attend(query, keys, values, causal_lower_right(query.shape[2], keys.shape[2]))
        return out[0].transpose(0, 1)

    def _places(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Where the context keeps tokens of requests, [N, S], by their blocks, [N, blocks], and positions, [N, S]."""
        size = self.context.block_size_tokens
        # padding has no blocks, -1
        return blocks.clamp(min=0).gather(1, (positions // size).long()) * size + positions % size


@functools.cache
def flash_attention_serves() -> bool:
    """Whether Megatron can attend in a dynamic context by itself."""
    from megatron.core.transformer import attention
    from megatron.core.utils import is_fa_min_version

    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    # asked without the package, Megatron's question is an ImportError
    return find_spec("flash_attn") is not None and is_fa_min_version("2.7.3")
