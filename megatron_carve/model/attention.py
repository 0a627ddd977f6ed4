"""Self attention that remembers no more tokens than its window while a model generates, where it keeps them itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_carve.model.mixer_cache import sequences_of_call
from megatron_carve.model.paged_attention import PagedAttention, flash_attention_serves

# Queries that attend together at least, where there are as many: a narrow window makes no crowd of tiny products.
MIN_BLOCK = 128


class KeyValueCache(NamedTuple):
    """The keys and values that later tokens attend to; the token at position p is in slot p % W.

    W is the window, or what the context has room for where that is less.

    Attributes:
        keys, values: [B, groups, W, head dim]; keys with their rotary embedding.
        tokens: [B, taps - 1, channels], the last projected tokens before a short convolution; empty without one.
        position: [B] int64, of the next token: sequences need not be equally long.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    position: Tensor

    @property
    def slots(self) -> int:
        return self.keys.shape[2]


class WindowedSelfAttention(SelfAttention):
    """Megatron's SelfAttention with another cache in static inference contexts; trains as upstream. In dynamic ones it
    is upstream's where FlashAttention is installed, elsewhere PagedAttention.

    Upstream keeps every token, and where several tokens continue a sequence lets them see each other's future. Here
    the cache is a ring of the window's size, a prompt can come in pieces, and the step of one token has fixed shapes
    and reads nothing on the host, so that a CUDA graph can hold it.
    """

    kept_tokens = (0, 0)
    """Shape of a sequence's part in KeyValueCache.tokens."""

    def forward(self, hidden_states, attention_mask, *args, inference_context=None, rotary_pos_emb=None, **options):
        dynamic = inference_context is not None and not inference_context.is_static_batching()
        if inference_context is None or (dynamic and hidden_states.is_cuda and flash_attention_serves()):
            return super().forward(
                hidden_states, attention_mask, *args,
                inference_context=inference_context, rotary_pos_emb=rotary_pos_emb, **options,
            )  # fmt: skip
        self._check_inference()
        with torch.no_grad():
            if dynamic:
                query, key, value = self.get_query_key_value_tensors(hidden_states, None)
                return self.linear_proj(self._step_of_requests(inference_context, query, key, value, rotary_pos_emb))
            cache = self._cache(inference_context, hidden_states)
            query, key, value = self.next_queries_keys_values(hidden_states, cache)
            if query.shape[0] == 1:
                out = self._next_token(cache, query, key, value, rotary_pos_emb)
            else:
                out = self._next_tokens(cache, query, key, value, rotary_pos_emb, inference_context.sequence_len_offset)
            return self.linear_proj(out)

    def _step_of_requests(
        self, context: Any, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor | None
    ) -> Tensor:
        """The tokens of a step of a DynamicInferenceContext: [T, 1, ...] -> [T, 1, heads * D]."""
        if rotary is not None:
            angles = rotary[context.gpu_view.token_to_pos_ids[: query.shape[0]]]
            query, key = self._rotate(query, angles), self._rotate(key, angles)
        layer_number = self.layer_number - self._get_pp_layer_offset_for_inference()
        attention = PagedAttention(
            context, layer_number, self._window(), self._attend, self._attend_in_blocks, scale=self._scale(),
            backend=getattr(self.config, "mixer_backend", "auto"),
        )  # fmt: skip
        return attention(query, key, value)

    def next_queries_keys_values(self, hidden_states: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens that follow those in the cache: [T, B, heads, D], and [T, B, groups, D] twice."""
        return self.get_query_key_value_tensors(hidden_states, None)

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

    def _cache(self, context: Any, hidden_states: Tensor) -> KeyValueCache:
        sequences = sequences_of_call(context, hidden_states.shape[1])
        end = context.sequence_len_offset + hidden_states.shape[0]
        if end > context.max_sequence_length:
            raise ValueError(
                f"inference_context: expected at most max_sequence_length={context.max_sequence_length} tokens, got "
                f"{end}"
            )
        kept = context.key_value_memory_dict.get(self.layer_number)
        if kept is None:
            slots = min(self._window() or context.max_sequence_length, context.max_sequence_length)
            shape = self.num_query_groups_per_partition, slots, self.hidden_size_per_attention_head
            kept = (
                hidden_states.new_zeros(context.max_batch_size, *shape),
                hidden_states.new_zeros(context.max_batch_size, *shape),
                hidden_states.new_zeros(context.max_batch_size, *self.kept_tokens),
                hidden_states.new_zeros(context.max_batch_size, dtype=torch.int64),
            )
            context.key_value_memory_dict[self.layer_number] = kept
        cache = KeyValueCache(*(x[sequences] for x in kept))
        if context.sequence_len_offset == 0:
            cache.tokens.zero_()
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
        out = self._attend(query.permute(1, 2, 0, 3), cache.keys, cache.values, filled[:, None, None])
        return out.permute(2, 0, 1, 3).flatten(2)

    def _next_tokens(
        self, cache: KeyValueCache, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor | None, position: int
    ) -> Tensor:
        """T tokens of every sequence, all of which stand at `position`: [T, B, ...] -> [T, B, heads * D]."""
        end = position + query.shape[0]
        if rotary is not None:
            angles = rotary[position:end]
            query, key = self._rotate(query, angles), self._rotate(key, angles)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        window = self._window()
        if window is None:
            cache.keys[:, :, position:end], cache.values[:, :, position:end] = key, value
            mask = causal_lower_right(query.shape[2], end)
            out = self._attend(query, cache.keys[:, :, :end], cache.values[:, :, :end], mask)
        else:
            earlier = torch.arange(max(0, position - cache.slots + 1), position, device=key.device) % cache.slots
            keys = torch.cat([cache.keys[:, :, earlier], key], 2)
            values = torch.cat([cache.values[:, :, earlier], value], 2)
            kept = torch.arange(max(position, end - cache.slots), end, device=key.device) % cache.slots
            cache.keys[:, :, kept], cache.values[:, :, kept] = keys[:, :, -len(kept) :], values[:, :, -len(kept) :]
            out = self._attend_in_blocks(query, keys, values, window)
        cache.position.fill_(end)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_in_blocks(self, query: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
        """The last T of the tokens that have keys attend to `window` of them each; time and memory grow with both.

        A block of queries meets the keys of its rows and of the window before them: query [B, heads, T, D], keys and
        values [B, groups, before + T, D] -> [B, heads, T, D].
        """
        window = min(window, keys.shape[2])
        T, before = query.shape[2], keys.shape[2] - query.shape[2]
        rows = min(T, max(window, MIN_BLOCK))
        blocks = -(-T // rows)
        missing = window - 1 - before  # keys before the first, which nobody sees
        keys, values = (F.pad(x, (0, 0, missing, blocks * rows - T)) for x in (keys, values))
        row, column = (torch.arange(n, device=keys.device) for n in (rows, rows + window - 1))
        seen = (row[:, None] <= column) & (column < row[:, None] + window)
        there = torch.arange(blocks, device=keys.device)[:, None] * rows + column >= missing
        mask = (seen & there[:, None]).repeat_interleave(query.shape[0], 0)

        def divided(x: Tensor) -> Tensor:
            """[B, heads, ..., D] -> [blocks * B, heads, rows or rows + window - 1, D]."""
            return x.unfold(2, column.numel(), rows).permute(2, 0, 1, 4, 3).flatten(0, 1)

        query = F.pad(query, (0, 0, 0, blocks * rows - T)).unflatten(2, (blocks, rows)).permute(2, 0, 1, 3, 4)
        out = self._attend(query.flatten(0, 1), divided(keys), divided(values), mask[:, None])
        return out.unflatten(0, (blocks, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :T]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, keys, values, mask, scale=self._scale(), enable_gqa=query.shape[1] != keys.shape[1]
        )

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, angles, self.config, mscale=self._yarn_concentration_factor)

    def _scale(self) -> float:
        return self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
