"""The step of one token of every sequence: residual layers in few launches, where their modules are plain."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_carve.kernels import resolve_backend
from megatron_carve.kernels.decoding import add_product, normed_product
from megatron_carve.kernels.token_call import Norm
from megatron_carve.model.local_layers import RMSNorm
from megatron_carve.model.mixers.base import LinearAttentionMixer
from megatron_carve.model.mixers.next_token import is_hooked, is_one_token, mix_next_token, mixes_in_one_launch

NORMED_LINEAR: tuple[type, ...] = ()
ROW_LINEAR: tuple[type, ...] = (RowParallelLinear,)
if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    NORMED_LINEAR, ROW_LINEAR = (TELayerNormColumnParallelLinear,), (RowParallelLinear, TERowParallelLinear)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DecodingLayer(TransformerLayer):
    """A TransformerLayer, that of an MLP alone included, which in a step of one token of every sequence computes a
    mixer and an MLP of SiLU-gated units from its modules' weights, in a few launches each.

    Where a module is none of the plain ones that are known here (quantised or adapted weights, biases, hooks), and in
    everything but such a step, it is upstream's.
    """

    def _forward_attention(self, hidden_states, *args, inference_context=None, **options):
        mixer = self.self_attention
        mixes = isinstance(mixer, LinearAttentionMixer) and options.get("packed_seq_params") is None
        if mixes and self._decodes(hidden_states, inference_context):
            first, last = normed_linear(self.input_layernorm, mixer.in_proj), row_linear(mixer.out_proj)
            if first and last and mixes_in_one_launch(mixer) and isinstance(self.cross_attention, IdentityOp):
                x = hidden_states.flatten(0, 1)
                mixed = mix_next_token(mixer, inference_context, x, partial(first.product, backend=self._backend))
                return last.add(x, mixed, self._backend).view_as(hidden_states), None
        return super()._forward_attention(hidden_states, *args, inference_context=inference_context, **options)

    def _forward_mlp(self, hidden_states, inference_context=None, **options):
        if type(self.mlp) is MLP and self._decodes(hidden_states, inference_context) and is_silu_gated(self.mlp):
            first = normed_linear(self.pre_mlp_layernorm, self.mlp.linear_fc1)
            last = row_linear(self.mlp.linear_fc2)
            if first and last:
                x = hidden_states.flatten(0, 1)
                return last.add(x, first.product(x, self._backend, gated=True), self._backend).view_as(hidden_states)
        return super()._forward_mlp(hidden_states, inference_context, **options)

    @property
    def _backend(self) -> str:
        return getattr(self.config, "mixer_backend", "auto")

    def _decodes(self, hidden_states: Tensor, context: Any) -> bool:
        """Whether this is a step of one token of every sequence that Triton can take."""
        c = self.config
        return (
            context is not None
            and not (self.training or torch.is_grad_enabled())
            and hidden_states.dtype in DTYPES
            and not (c.fp8 or c.fp4 or c.fp32_residual_connection or c.sequence_parallel)
            and not c.inference_fuse_tp_communication
            and resolve_backend(self._backend, hidden_states.device) == "triton"
            and is_one_token(context, hidden_states)
        )


class NormedLinear(NamedTuple):
    """A projection and the RMSNorm before it."""

    norm: Norm
    weight: Tensor

    def product(self, x: Tensor, backend: str, gated: bool = False) -> Tensor:
        """[N, in] -> [N, out], gated half as many."""
        return normed_product(x, self.norm, self.weight, gated=gated, backend=backend)


class RowLinear(NamedTuple):
    """A projection back to the hidden size; `weight` where no other rank has a part of it."""

    module: Any
    weight: Tensor | None

    def add(self, hidden: Tensor, x: Tensor, backend: str) -> Tensor:
        """The sum of hidden, [N, hidden], and the projection of x, [N, in]."""
        if self.weight is None:
            return hidden + self.module(x[None])[0][0]
        return add_product(hidden, x, self.weight, backend=backend)


def normed_linear(norm: Any, linear: Any) -> NormedLinear | None:
    """What a column-parallel projection with the RMSNorm before it computes, or None where that is not known."""
    if type(linear) in NORMED_LINEAR and isinstance(norm, IdentityOp):
        if linear.normalization != "RMSNorm" or linear.use_bias or not _is_plain(linear, linear.layer_norm_weight):
            return None
        return NormedLinear(Norm(linear.layer_norm_weight, linear.eps, linear.zero_centered_gamma), linear.weight)
    if type(linear) is ColumnParallelLinear and isinstance(norm, RMSNorm) and not is_hooked(norm):
        if linear.bias is not None or linear.gather_output or not _is_plain(linear, norm.weight):
            return None
        return NormedLinear(Norm(norm.weight, norm.eps, norm.zero_centered), linear.weight)
    return None


def row_linear(linear: Any) -> RowLinear | None:
    """A row-parallel projection without bias, or None."""
    if type(linear) not in ROW_LINEAR or not _is_plain(linear):
        return None
    if linear.bias is not None and linear.bias.numel():
        return None
    alone = linear.config.tensor_model_parallel_size == 1
    return RowLinear(linear, linear.weight if alone else None)


def is_silu_gated(mlp: Any) -> bool:
    """Whether an MLP's units are SiLU(a) * b."""
    c = mlp.config
    return (
        c.gated_linear_unit
        and mlp.activation_func is F.silu
        and c.activation_func_clamp_value is None
        and not c.glu_linear_offset
        and not c.use_te_activation_func
        and not is_hooked(mlp)
    )


def _is_plain(linear: Any, *others: Tensor) -> bool:
    """Whether a projection is x W^T of parameters as they are, in one dtype, which nobody watches or replaces."""
    weights = (linear.weight, *others)
    return not is_hooked(linear) and all(
        type(w) in (Tensor, nn.Parameter) and w.is_contiguous() and w.dtype == linear.weight.dtype in DTYPES
        for w in weights
    )
