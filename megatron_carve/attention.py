"""Self attention that remembers no more tokens than its window while a model generates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_carve.mixer_cache import sequences_of_call


class KeyValueCache(NamedTuple):
    """The keys and values that later tokens attend to; the token at position p is in slot p % W.

    W is the window, or what the context has room for where that is less.

    Attributes:
        keys, values: [B, groups, W, head dim]; keys with their rotary embedding.
        position: [B] int64, of the next token: sequences need not be equally long.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    @property
    def slots(self) -> int:
        return self.keys.shape[2]


class WindowedSelfAttention(SelfAttention):
    """Megatron's SelfAttention with another cache in static inference contexts; trains as upstream.

    Upstream keeps every token, and where several tokens continue a sequence lets them see each other's future. Here
    the cache is a ring of the window's size, a prompt can come in pieces, and the step of one token has fixed shapes
    and reads nothing on the host, so that a CUDA graph can hold it.
    """

    def forward(self, hidden_states, attention_mask, *args, inference_context=None, rotary_pos_emb=None, **options):
        if inference_context is None or not inference_context.is_static_batching():
            return super().forward(
                hidden_states, attention_mask, *args,
                inference_context=inference_context, rotary_pos_emb=rotary_pos_emb, **options,
            )  # fmt: skip
        self._check_inference()
        with torch.no_grad():
            query, key, value = self.get_query_key_value_tensors(hidden_states, None)
            cache = self._cache(inference_context, key)
            if query.shape[0] == 1:
                out = self._next_token(cache, query, key, value, rotary_pos_emb)
            else:
                out = self._next_tokens(cache, query, key, value, rotary_pos_emb, inference_context.sequence_len_offset)
            return self.linear_proj(out)

    def _check_inference(self) -> None:
        c = self.config
        unknown = {
            "attention_output_gate": c.attention_output_gate,
            "apply_query_key_layer_scaling": c.apply_query_key_layer_scaling,
            "softmax_type": c.softmax_type != "vanilla",
            "no_rope_freq": c.no_rope_freq,
            "flash_decode": c.flash_decode,
        }
        if chosen := [name for name, value in unknown.items() if value]:
            raise NotImplementedError(f"WindowedSelfAttention: {', '.join(chosen)} with an inference_context")

    def _cache(self, context: Any, key: Tensor) -> KeyValueCache:
        sequences = sequences_of_call(context, key.shape[1])
        end = context.sequence_len_offset + key.shape[0]
        if end > context.max_sequence_length:
            raise ValueError(
                f"inference_context: expected at most max_sequence_length={context.max_sequence_length} tokens, got "
                f"{end}"
            )
        kept = context.key_value_memory_dict.get(self.layer_number)
        if kept is None:
            slots = min(self._window() or context.max_sequence_length, context.max_sequence_length)
            shape = context.max_batch_size, key.shape[2], slots, key.shape[3]
            kept = (
                key.new_zeros(shape),
                key.new_zeros(shape),
                torch.zeros(context.max_batch_size, dtype=torch.int64, device=key.device),
            )
            context.key_value_memory_dict[self.layer_number] = kept
        cache = KeyValueCache(*(x[sequences] for x in kept))
        if context.sequence_len_offset == 0:
            cache.position.zero_()
        return cache

    def _window(self) -> int | None:
        """Tokens that one token attends to, itself included; None for all."""
        c = self.config
        if not is_layer_window_attention(c.window_size, c.window_attn_skip_freq, self.layer_number):
            return None
        return c.window_size[0] + 1

    def _next_token(
        self, cache: KeyValueCache, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor | None
    ) -> Tensor:
        """One token of every sequence: query [1, B, heads, D], key and value [1, B, groups, D] -> [1, B, heads * D]."""
        if rotary is not None:
            angles = rotary[cache.position]  # every sequence has its own: sequences take the place of time
            query, key = (self._rotate(x.transpose(0, 1), angles).transpose(0, 1) for x in (query, key))
        slot = (cache.position % cache.slots)[:, None, None, None].expand(-1, key.shape[2], 1, key.shape[3])
        cache.keys.scatter_(2, slot, key.permute(1, 2, 0, 3))
        cache.values.scatter_(2, slot, value.permute(1, 2, 0, 3))
        filled = torch.arange(cache.slots, device=key.device) <= cache.position[:, None]
        cache.position.add_(1)
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), cache.keys, cache.values, filled[:, None, None], scale=self._scale(),
            enable_gqa=query.shape[2] != key.shape[2],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).flatten(2)

    def _next_tokens(
        self, cache: KeyValueCache, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor | None, position: int
    ) -> Tensor:
        """T tokens of every sequence, all of which stand at `position`: [T, B, ...] -> [T, B, heads * D]."""
        tokens = query.shape[0]
        if rotary is not None:
            angles = rotary[position : position + tokens]
            query, key = self._rotate(query, angles), self._rotate(key, angles)
        if self._window() is None:
            return self._all_so_far(cache, query, key, value, position)
        before = min(position, cache.slots - 1)
        if before:
            slots = torch.arange(position - before, position, device=key.device) % cache.slots
            key = torch.cat([cache.keys[:, :, slots].permute(2, 0, 1, 3), key])
            value = torch.cat([cache.values[:, :, slots].permute(2, 0, 1, 3), value])
            # As many queries that nobody asked for keep causal masks and windows what they are in training.
            query = torch.cat([query.new_zeros(before, *query.shape[1:]), query])
        last = min(tokens, cache.slots)
        slots = torch.arange(position + tokens - last, position + tokens, device=key.device) % cache.slots
        cache.keys[:, :, slots] = key[-last:].permute(1, 2, 0, 3)
        cache.values[:, :, slots] = value[-last:].permute(1, 2, 0, 3)
        cache.position.fill_(position + tokens)
        out = self.core_attention(
            query.contiguous(), key.contiguous(), value.contiguous(), None, attn_mask_type=self.attn_mask_type
        )
        return out[before:]

    def _all_so_far(self, cache: KeyValueCache, query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
        """_next_tokens, rotated, that attend to every earlier token."""
        end = position + query.shape[0]
        cache.keys[:, :, position:end] = key.permute(1, 2, 0, 3)
        cache.values[:, :, position:end] = value.permute(1, 2, 0, 3)
        cache.position.fill_(end)
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), cache.keys[:, :, :end], cache.values[:, :, :end],
            causal_lower_right(query.shape[0], end), scale=self._scale(),
            enable_gqa=query.shape[2] != key.shape[2],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).flatten(2)

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, angles, self.config, mscale=self._yarn_concentration_factor)

    def _scale(self) -> float:
        return self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
