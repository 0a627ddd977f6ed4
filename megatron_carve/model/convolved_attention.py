"""Self attention whose queries, keys and values pass a short convolution, of fixed taps or of dynamic ones."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_carve.kernels.surroundings import convolve_heads, dynamic_convolve_heads
from megatron_carve.kernels.wide_copy import contiguous
from megatron_carve.model.attention import KeyValueCache, WindowedSelfAttention
from megatron_carve.model.checkpoint import sharded_mixer_state
from megatron_carve.model.context.exchange import Exchange, PackedOrder, context_exchange, packed_boundaries
from megatron_carve.model.mixer_cache import keep_newest
from megatron_carve.model.mixers.base import mixer_config
from megatron_carve.model.mixers.parts import DynamicConvolution, ShortConvolution, replicated_parameter
from megatron_carve.patches import muon_parameters


class HeadConvolution(ShortConvolution):
    """A ShortConvolution alone, of attention's heads in the order of linear_qkv: neither SiLU nor norms."""

    def __init__(self, config: TransformerConfig, channels: int, *, head_dim: int, width: int) -> None:
        super().__init__(config, 0, channels, key_head_dim=head_dim, width=width, bias=False)

    def _convolve(self, x: Tensor, exchange: Exchange, *features: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return (convolve_heads(x, self.weight, **options),)


class DynamicHeadConvolution(DynamicConvolution):
    """HeadConvolution with dynamic taps; `group` heads are those of a group of queries, its key's and its value's."""

    def __init__(
        self, config: TransformerConfig, channels: int, *, head_dim: int, width: int, rank: int, group: int
    ) -> None:
        super().__init__(config, 0, channels, rank=rank, key_head_dim=head_dim, width=width, bias=False)
        self.group = group

    def _convolve(self, x: Tensor, exchange: Exchange, *features: Tensor, **options: Any) -> tuple[Tensor, ...]:
        options |= {"head_dim": self.key_head_dim, "group": self.group}
        return (dynamic_convolve_heads(x, features[0], self.weight, self.up, **options),)


class TapFeatures(nn.Module):
    """What dynamic taps are made of, rank features for queries, keys and values each: [T, B, hidden] -> [T, B, 3 rank].

    Every tensor-parallel rank makes all of them, of its own tokens under sequence parallelism, and uses them for its
    own heads, so that their gradients are sums over ranks.
    """

    def __init__(self, config: TransformerConfig, rank: int, tp_group: Any) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = replicated_parameter(config, torch.empty(3 * rank, config.hidden_size, **place))

    def forward(self, x: Tensor) -> Tensor:
        features = F.linear(x, self.weight)
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(features, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(features, group=self.tp_group)


class ConvolvedSelfAttention(WindowedSelfAttention):
    """WindowedSelfAttention with a short convolution of what linear_qkv puts out.

    It comes before norms of queries and keys, which bound the scores and would not any more, and before rotary
    positions: taps differ between the two channels of a pair that is turned, so that after it scores would depend on
    where a pair of tokens stands and not on their distance alone.

    Taps are `linear_conv_kernel_dim` in number, features of dynamic ones `convolution_rank` of config.mixer. Those are
    made of the layer's normalised tokens: the norm must be outside of linear_qkv.

    Under context parallelism ranks exchange their two pieces of the sequence for contiguous shards, as mixers by
    sequence do, and back.
    """

    kind = "attention's convolution"

    def __init__(
        self, config: TransformerConfig, *args: Any, convolution: Literal["static", "dynamic"], **options: Any
    ) -> None:
        super().__init__(config, *args, **options)
        muon_parameters.apply()  # for programs that know this layer through a spec alone
        mixer = mixer_config(config)
        self.backend = getattr(config, "mixer_backend", "auto")
        self.packed_order: PackedOrder = getattr(config, "mixer_packed_order", "document")
        self.exchange = context_exchange(self.pg_collection.cp, "sequence", 1)
        self.group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition + 2
        channels = self.linear_qkv_out_dim // self.world_size
        sizes = {"head_dim": self.hidden_size_per_attention_head, "width": mixer.conv_width}
        self.conv: HeadConvolution | DynamicHeadConvolution
        self.taps_proj: TapFeatures | None = None
        if convolution == "dynamic":
            self.conv = DynamicHeadConvolution(
                config, channels, rank=mixer.convolution_rank, group=self.group, **sizes
            )  # fmt: skip
            self.taps_proj = TapFeatures(config, mixer.convolution_rank, self.tp_group)
        else:
            self.conv = HeadConvolution(config, channels, **sizes)
        self.kept_tokens = (mixer.conv_width - 1, channels)
        self._packed: Any = None
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                self.conv.reset_parameters()
            if self.taps_proj is not None:
                assert config.init_method is not None
                config.init_method(self.taps_proj.weight)

    def forward(self, hidden_states, attention_mask, *args, packed_seq_params=None, **options):
        context = options.get("inference_context")
        if context is not None and not context.is_static_batching():
            raise NotImplementedError("inference_context: attention's convolution takes static batching, got dynamic")
        self._packed = packed_seq_params  # which upstream does not hand on to get_query_key_value_tensors
        return super().forward(
            hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **options
        )  # fmt: skip

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As upstream; the tokens begin, or continue across context-parallel ranks, as the call of forward says.

        Raises:
            NotImplementedError: attention_output_gate or fused_single_qkv_rope.
        """
        if output_gate or not split_qkv:
            name = "attention_output_gate" if output_gate else "fused_single_qkv_rope"
            raise NotImplementedError(f"ConvolvedSelfAttention: {name}")
        return self._queries_keys_values(hidden_states, self._packed)

    def next_queries_keys_values(self, hidden_states: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor, Tensor]:
        """Those of tokens that follow what the cache holds, which then holds their projections too."""
        return self._queries_keys_values(hidden_states, kept=cache.tokens)

    def rehearse(self, tokens: int, batch: int) -> None:
        """Forward and backward of the convolution, on zeros of T tokens, for what that needs to have compiled."""
        place = {"dtype": self.config.params_dtype, "device": self.conv.weight.device, "requires_grad": True}
        inputs = [torch.zeros(tokens, batch, self.conv.channels, **place)]
        if self.taps_proj is not None:
            inputs.append(torch.zeros(tokens, batch, self.taps_proj.weight.shape[0], **place))
        out = self._convolved(*inputs)
        torch.autograd.grad(out, [*inputs, *self.conv.parameters()], torch.zeros_like(out))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """As upstream; the convolution's parameters are divided as the rows of linear_qkv are."""
        of_convolution = sharded_mixer_state(
            self.conv, f"{prefix}conv.", sharded_offsets, metadata, tp_group=self.tp_group, split={}
        )
        return {**super().sharded_state_dict(prefix, sharded_offsets, metadata), **of_convolution}

    def _queries_keys_values(
        self, hidden_states: Tensor, packed: Any = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, B, heads, D] of queries, [T, B, groups, D] of keys and values; kept: see _convolved."""
        projected, _ = self.linear_qkv(hidden_states)
        features = [] if self.taps_proj is None else [self.taps_proj(hidden_states)]
        convolved = self._convolved(projected, *features, packed=packed, kept=kept)
        by_group = convolved.unflatten(-1, (-1, self.group, self.hidden_size_per_attention_head))
        query, key, value = by_group.split([self.group - 2, 1, 1], 3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return query, key, value

    def _convolved(
        self, projected: Tensor, *features: Tensor, packed: Any = None, kept: Tensor | None = None
    ) -> Tensor:
        """The convolution of linear_qkv's output, [T, B, channels], contiguous.

        Args:
            features: of dynamic taps, [T, B, 3 * rank].
            packed: Megatron's packed sequences, or Documents.
            kept: the tokens before, [B, taps - 1, channels], of a sequence that goes on; brought up to date.
        """
        order = self.exchange.order(projected.shape[0], packed, self.packed_order, projected.device)
        pieces = self.exchange.enter([(x, [x.shape[-1]]) for x in (projected, *features)], order)
        span = self.exchange.span(pieces[0], packed_boundaries(packed))
        x, *features_here = (piece.transpose(0, 1) for piece in pieces)
        (out,) = self.conv(x, self.exchange, span, self.backend, kept, *features_here)
        if kept is not None:
            keep_newest(kept, x)
        return self.exchange.leave(contiguous(out.transpose(0, 1)), order)
