"""The layer that all mixers share: projections, short convolution, decay, gated output norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_carve.kernels import CarveState, OpCall, run_chunk, run_recurrent, state_shapes
from megatron_carve.kernels.wide_copy import contiguous, split_sections
from megatron_carve.model.checkpoint import sharded_mixer_state
from megatron_carve.model.config import MixerConfig, MixerOptions
from megatron_carve.model.context.exchange import PackedOrder, Span, context_exchange, packed_boundaries
from megatron_carve.model.context.state_passing import chunk_on_span
from megatron_carve.model.mixer_cache import MixerCache, keep_newest, mixer_cache
from megatron_carve.model.mixers.dynamic import mix_requests
from megatron_carve.model.mixers.parts import (
    DynamicConvolution,
    GatedHeadNorm,
    HeadParallelLinear,
    LogDecay,
    PlainActivation,
    ShortConvolution,
    orthogonalize_apart,
)
from megatron_carve.model.variants import VARIANTS, MixerKind
from megatron_carve.patches import mixed_precision_groups, muon_parameters

# The projection's sections that pass the short convolution: the first ones, in this order.
CONVOLVED = ("query", "key", "value")


@dataclass
class MixerSubmodules:
    """The two large projections, which differ between Transformer Engine and local layers."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass(frozen=True)
class MixerInputs:
    """What the recurrence of one layer consumes, in [batch, time, heads, channels]; decay and gates as projected; erase
    is the write gate, [batch, time, heads], where that also erases."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    erase: Tensor
    write: Tensor


class LinearAttentionMixer(MegatronModule):
    """Base of the mixers, used as `self_attention` of a Megatron TransformerLayer.

    Args:
        config: Megatron's configuration. Sizes come from its linear_* fields, options from its `mixer` field
            when it has one.
        submodules: the projections.
        layer_number: 1-based, global.
        options: MixerOptions by name; they win over `config.mixer`.
        pg_collection: Megatron's process groups; `tp` and `cp` are used.

    `config.mixer_backend` ("auto", "triton" or "torch") goes to the op, the convolution and the norms. With
    `config.mixer_recompute` the convolution, the norms of queries and keys and the op run again in the backward, from
    the projections, instead of being kept. `config.mixer_context` says how a context-parallel group shares a layer's
    work (see exchange.py), `config.mixer_packed_order` how packed sequences were divided over it ("document", as
    Megatron does, or "sequence").

    Raises:
        ValueError: sizes that do not fit each other or the parallel groups.
    """

    kind: ClassVar[MixerKind]

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerSubmodules,
        layer_number: int | None = None,
        *,
        options: dict[str, Any] | None = None,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        # Here, so that they also hold in programs that know this package through a spec alone: the decay stays float32
        # in a 16-bit model, which Megatron's distributed optimizer does not save rightly by itself; Muon is for maps.
        mixed_precision_groups.apply()
        muon_parameters.apply()
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset or 0
        self.mixer = mixer_config(config, options)
        self.mixer.check_kind(self.kind)
        self.tp_group = pg_collection.tp
        self.tp_size = self.tp_group.size()
        self.exchange = context_exchange(
            pg_collection.cp, getattr(config, "mixer_context", "auto"), self.mixer.num_key_heads // self.tp_size
        )
        self.mixer.check_parallel(self.tp_size, self.exchange.shares)
        if getattr(config, "fp8", None):
            self.mixer.check_fp8(self.kind, config.hidden_size, self.tp_size)
        self.backend = getattr(config, "mixer_backend", "auto")
        self.recompute = getattr(config, "mixer_recompute", False)
        self.packed_order: PackedOrder = getattr(config, "mixer_packed_order", "document")
        self.sections = self.mixer.projection_sections(self.kind)
        self.local_sizes = {s.name: s.size // self.tp_size for s in self.sections}
        low_rank = {"decay": self.mixer.decay_projection, "gate": self.mixer.output_gate_projection}
        self.features = {"taps", *(name for name, made in low_rank.items() if made == "low_rank")}
        shared = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, sum(s.size for s in self.sections), **shared,
            init_method=config.init_method, gather_output=False, skip_bias_add=False, tp_comm_buffer_name="fc1",
            name=None if name is None else f"{name}.in_proj",
        )  # fmt: skip
        orthogonalize_apart(self.in_proj.weight, list(self.local_sizes.values()))
        self._build_head_parameters()
        self.out_proj = build_module(
            submodules.out_proj, self.mixer.value_dim, config.hidden_size, **shared,
            init_method=config.output_layer_init_method, input_is_parallel=True, skip_bias_add=True,
            tp_comm_buffer_name="fc2", name=None if name is None else f"{name}.out_proj",
        )  # fmt: skip
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                self.reset_parameters()
            self.reset_replicated_parameters()

    def _build_head_parameters(self) -> None:
        """Everything that belongs to heads, sharded over the tensor-parallel group by heads."""
        c, tp = self.mixer, self.tp_size
        key_channels = self.local_sizes["key"]
        self.conv: ShortConvolution | PlainActivation = PlainActivation(key_channels, key_head_dim=c.key_head_dim)
        if c.short_convolution != "none":
            sizes: dict[str, Any] = {"key_head_dim": c.key_head_dim, "width": c.conv_width, "bias": c.conv_bias}
            channels = key_channels, self.local_sizes["value"]
            if c.short_convolution == "dynamic":
                self.conv = DynamicConvolution(self.config, *channels, rank=c.convolution_rank, **sizes)
            else:
                self.conv = ShortConvolution(self.config, *channels, **sizes)
        by_channel = VARIANTS[self.kind].sees_state
        self.decay = LogDecay(self.config, c.num_key_heads // tp, c.key_head_dim, by_channel=by_channel)
        if c.decay_projection == "low_rank":
            self.decay_up = HeadParallelLinear(self.config, c.value_head_dim, c.key_dim // tp, bias=False)
        if c.has_low_rank_gate:
            self.gate_up = HeadParallelLinear(self.config, c.value_head_dim, c.value_dim // tp, bias=True)
        self.out_norm = GatedHeadNorm(self.config, c.value_head_dim, c.output_gate_activation, self.tp_group)

    def reset_parameters(self) -> None:
        """Initialise all but the two projections, which initialise themselves."""
        self.conv.reset_parameters()
        self.decay.reset_parameters()
        for up in (getattr(self, "decay_up", None), getattr(self, "gate_up", None)):
            if up is not None:
                up.reset_parameters(self.config.init_method)

    def reset_replicated_parameters(self) -> None:
        """Initialise what every tensor-parallel rank holds and draws at random, with random numbers that all share."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, inference_context=None,
        packed_seq_params=None, **positional: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Mix tokens.

        Args:
            hidden_states: [T, B, hidden]; T is divided by the context-parallel size, and by the tensor-parallel size
                under sequence parallelism.
            inference_context: Megatron's StaticInferenceContext or None. Then hidden_states are the next tokens of
                its sequences, which go on from what it holds of this layer, or begin where its sequence_len_offset is
                0; what it holds is brought up to date. One token takes the recurrent op, in place and without
                reading a value on the host (a CUDA graph can hold it), more take the chunk op. Without gradients.
                Or its DynamicInferenceContext, to which this layer is one of Mamba: see dynamic.py; B is 1 then.
            packed_seq_params: Megatron's packed sequences (`thd`, B = 1) or None.
            positional: rotary embeddings and the like, which a recurrence has no use for.

        Returns:
            ([T, B, hidden], None), as Megatron's attention modules do.
        """
        cu_seqlens = packed_boundaries(packed_seq_params)
        if inference_context is not None:
            self._check_inference(packed_seq_params)
        projected, _ = self.in_proj(hidden_states)
        return self.out_proj(self._between_projections(projected, cu_seqlens, packed_seq_params, inference_context))

    def rehearse(self, tokens: int, batch: int) -> None:
        """Forward and backward between the projections, on zeros, for what that needs to have compiled.

        Args:
            tokens, batch: of the projection's output, [T, B, sections]; all ranks of a layer call it with the same.
        """
        projected = torch.zeros(
            tokens, batch, sum(self.local_sizes.values()), dtype=self.config.params_dtype,
            device=next(self.parameters()).device, requires_grad=True,
        )  # fmt: skip
        out = self._between_projections(projected)
        inputs = [projected, *(p for p in self.parameters() if p.requires_grad)]
        torch.autograd.grad(out, inputs, torch.zeros_like(out), allow_unused=True)

    def _between_projections(
        self, projected: Tensor, cu_seqlens: Tensor | None = None, packed_seq_params=None, inference_context=None
    ) -> Tensor:
        """From the fused projection, [T, B, sections], to what out_proj takes; see forward."""
        order = self.exchange.order(projected.shape[0], packed_seq_params, self.packed_order, projected.device)
        pieces, gate = self._pieces(projected)
        mine = self.exchange.enter(pieces, order)
        span = self.exchange.span(mine[0], cu_seqlens)
        if inference_context is not None and not inference_context.is_static_batching():
            with torch.no_grad():
                out = mix_requests(self, inference_context, mine)
        elif inference_context is not None:
            out = self._recurrence_from(self.cache(inference_context, mine[0]), span, *mine)
        elif self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._recurrence, span, *mine, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._recurrence(span, *mine)
        out = self.exchange.leave(out.transpose(0, 1).flatten(-2), order).unflatten(-1, (-1, out.shape[-1]))
        # The norm takes [B, T, H, V], in whichever order they lie in memory.
        gate = None if gate is None else gate.unflatten(-1, out.shape[-2:]).transpose(0, 1)
        out = self.out_norm(out.transpose(0, 1), gate, self.backend).transpose(0, 1)
        return out.flatten(-2).contiguous()

    def _pieces(self, projected: Tensor) -> tuple[list[tuple[Tensor, list[int]]], Tensor | None]:
        """From the fused projection [T, B, sections]: what the recurrence needs, by sections, and the output gate.

        Queries, keys and values stay in one piece, for the convolution. All pieces come from one split, so that their
        gradients are put together once.
        """
        convolved = [self.local_sizes[name] for name in CONVOLVED]
        others = {name: size for name, size in self.local_sizes.items() if name not in CONVOLVED}
        first, *rest = split_sections(projected, [sum(convolved), *others.values()])
        part = self.whole_features(dict(zip(others, rest, strict=True)))
        decay, gate = self.raw_decay_and_gate(part["decay"], part.get("gate"))
        erase = [part["erase"]] if "erase" in part else []
        by_token = [(x, [x.shape[-1]]) for x in (decay, *erase, part["write"], *self._features(part.get("taps")))]
        return [(first, convolved), *by_token], gate

    def whole_features(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sections of the projection, [..., size] by name: of those that every tensor-parallel rank needs whole, the
        features that maps and taps are made of, the parts of all ranks, from one call."""
        spread = [name for name in part if name in self.features]
        if self.tp_size == 1 or not spread:
            return part
        mine = [part[name] for name in spread]
        of_all = all_gather_last_dim_from_tensor_parallel_region(torch.cat(mine, -1), group=self.tp_group)
        by_rank = of_all.unflatten(-1, (self.tp_size, -1)).split([x.shape[-1] for x in mine], -1)
        return part | {name: x.flatten(-2) for name, x in zip(spread, by_rank, strict=True)}

    def _features(self, features: Tensor | None) -> list[Tensor]:
        """Those that dynamic taps are made of, [T, B, 3 * rank], once for each share of the heads: every one needs
        all."""
        if features is None:
            return []
        return [features.repeat(1, 1, self.exchange.shares) if self.exchange.shares > 1 else features]

    def _recurrence(self, span: Span, *pieces: Tensor) -> Tensor:
        """From exchanged pieces to the op's output, [B, T, HV, V]; what recomputation computes twice."""
        return self.mix(self.op_inputs(pieces, span), span)

    @torch.no_grad()
    def _recurrence_from(self, cache: MixerCache, span: Span, *pieces: Tensor) -> Tensor:
        """As _recurrence, of tokens that follow those in the cache, which then holds these too."""
        inputs = self.op_inputs(pieces, span, cache.tokens)
        keep_newest(cache.tokens, pieces[0].transpose(0, 1))
        return _go_on(self.op_call(inputs), cache.state)

    def cache(self, context: Any, tokens: Tensor) -> MixerCache:
        """What a static inference context holds of this layer, for [T, B, any] of tokens in the layer's dtype."""
        channels = sum(self.local_sizes[name] for name in CONVOLVED)
        heads, (K, V) = self.mixer.num_value_heads // self.tp_size, (self.mixer.key_head_dim, self.mixer.value_head_dim)
        return mixer_cache(
            context, self.layer_number or 0, tokens.shape[1], ((self.mixer.taps - 1, channels), tokens.dtype),
            state_shapes(VARIANTS[self.kind].op, heads, K, V), tokens.device,
        )  # fmt: skip

    def _check_inference(self, packed_seq_params: Any) -> None:
        if packed_seq_params is not None:
            raise NotImplementedError(f"{type(self).__name__}: packed sequences with an inference_context")
        if self.exchange.size > 1:
            raise NotImplementedError(f"{type(self).__name__}: context parallelism with an inference_context")

    def op_inputs(
        self, pieces: Sequence[Tensor], span: Span, tokens_before: Tensor | None = None,
        convolve: Callable[..., Sequence[Tensor]] | None = None,
    ) -> MixerInputs:  # fmt: skip
        """Exchanged pieces, [T, B, channels], as the op takes them.

        Args:
            tokens_before: see ShortConvolution.forward.
            convolve: in place of this layer's convolution, [B, T, channels] and features to q, k and v.
        """
        convolved, decay, *gates = (x.transpose(0, 1) for x in pieces)
        features = [gates.pop()] if self.mixer.short_convolution == "dynamic" else []
        *erase, write = gates
        if convolve is None:
            q, k, v = self.conv(convolved, self.exchange, span, self.backend, tokens_before, *features)
        else:
            q, k, v = convolve(convolved, *features)
        by_key = (-1, self.mixer.key_head_dim)
        return MixerInputs(
            q=q.unflatten(-1, by_key),
            k=k.unflatten(-1, by_key),
            v=v.unflatten(-1, (-1, self.mixer.value_head_dim)),
            g=decay.unflatten(-1, by_key),
            erase=erase[0].unflatten(-1, by_key) if erase else write,
            write=write,
        )

    def raw_decay_and_gate(self, decay: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Expand the low-rank sections, from all of their features."""
        if self.mixer.decay_projection == "low_rank":
            # The op takes batch entry after batch entry: here little has to be brought into that order.
            decay = self.decay_up(contiguous(decay.transpose(0, 1))).transpose(0, 1)
        if gate is not None and self.mixer.output_gate_projection == "low_rank":
            gate = self.gate_up(gate)
        return decay, gate

    def mix(self, inputs: MixerInputs, span: Span) -> Tensor:
        """The variant's gates and op, [B, T, HV, V]."""
        return chunk_on_span(span, self.op_call(inputs))

    def op_call(self, inputs: MixerInputs) -> OpCall:
        """The call of the variant's op, without states and packing."""
        raise NotImplementedError

    def shared_options(self) -> dict[str, Any]:
        """What the calls of all variants say: the decay's parameters, and gates given as logits."""
        gates = {"gate_logits": True, "erase_scale": self.erase_scale, "backend": self.backend}
        return self.decay(self.exchange) | gates

    @property
    def erase_scale(self) -> float:
        """Upper end of the erase gate's range."""
        return 2.0 if self.mixer.negative_eigenvalues else 1.0

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Megatron's distributed-checkpoint description; fused tensors are stored by named section."""
        convolved = {name: self.local_sizes[name] for name in CONVOLVED}
        return sharded_mixer_state(
            self, prefix, sharded_offsets, metadata,
            tp_group=self.tp_group,
            split={
                "in_proj.weight": self.local_sizes,
                **{f"conv.{name}": convolved for name in ("weight", "bias", "up")},
            },
        )  # fmt: skip


def _go_on(call: OpCall, state: tuple[Tensor, ...]) -> Tensor:
    """o of a call that starts from a state, its tensors [B, ...] by state_shapes, which is brought up to date."""
    before: Any = CarveState(*state) if call.op == "carve" else state[0]
    if call.q.shape[1] == 1:
        return run_recurrent(replace(call, initial_state=before, inplace_state=True))[0]
    o, after = run_chunk(replace(call, initial_state=before, output_final_state=True))
    for old, new in zip(state, after if call.op == "carve" else [after], strict=True):
        old.copy_(new)
    return o


def mixer_config(config: TransformerConfig, options: dict[str, Any] | None = None) -> MixerConfig:
    """Sizes from Megatron's linear_* fields; options from `options`, then `config.mixer`, then the defaults."""
    known = set(MixerOptions.__dataclass_fields__)
    chosen = {**(getattr(config, "mixer", None) or {}), **(options or {})}
    if unknown := sorted(set(chosen) - known):
        raise ValueError(f"mixer options: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return MixerConfig(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_head_dim=config.linear_key_head_dim,
        value_head_dim=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        **chosen,
    )
