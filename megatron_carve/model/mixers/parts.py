"""The small modules of a mixer whose parameters a tensor-parallel rank holds for its own heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_carve.kernels.surroundings import convolve_qkv, dynamic_convolve_qkv, gated_head_norm
from megatron_carve.model.context.exchange import Exchange, Span
from megatron_carve.model.context.state_passing import with_tokens_before
from megatron_carve.patches.muon_parameters import BY_ELEMENT

# Range of the initial step sizes softplus(dt_bias), and of exp(A_log).
STEP_RANGE = (0.001, 0.1)
A_RANGE = (1.0, 16.0)


def tensor_parallel_parameter(config: TransformerConfig, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter sharded over tensor-parallel ranks on axis 0.

    The marks make Megatron count it once in gradient norms and shard it in checkpoints.
    """
    data = torch.empty(*shape, dtype=dtype or config.params_dtype, device=torch.cuda.current_device())
    parameter = nn.Parameter(data)
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter


def by_element(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, marked as one that Adam updates where Muon updates linear maps."""
    setattr(parameter, BY_ELEMENT, True)
    return parameter


def orthogonalize_apart(weight: nn.Parameter, sections: list[int]) -> None:
    """Mark a fused weight [sum of sections, in], so that Muon takes every section for a map of its own, as it does with
    attention's queries, keys and values."""
    setattr(weight, "is_qkv", True)  # noqa: B010  Megatron reads both there
    setattr(weight, "qkv_split_shapes", sections)  # noqa: B010


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU over this rank's channels, [B, T, D], and the norm of queries and keys.

    D is the key_channels of q, as many of k, and the value_channels of v, which come back apart.
    """

    def __init__(
        self, config: TransformerConfig, key_channels: int, value_channels: int, *, key_head_dim: int, width: int,
        bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.key_channels, self.key_head_dim = key_channels, key_head_dim
        self.channels = 2 * key_channels + value_channels
        self.weight = by_element(tensor_parallel_parameter(config, self.channels, width))
        self.bias = tensor_parallel_parameter(config, self.channels) if bias else None

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(width), as torch's convolutions; the bias starts at zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, exchange: Exchange, span: Span, backend: str, tokens_before: Tensor | None = None,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """x holds the tokens and the heads' channels that the exchange gave to this context-parallel rank.

        Args:
            features: of a DynamicConvolution, [B, T, 3 * rank].
            tokens_before: [B, width - 1, D] the tokens that x continues, or None where it begins, or where a shard of
                the span's group continues another's.
        """
        cu_seqlens, before = span.cu_seqlens, 0
        if tokens_before is not None:
            before = tokens_before.shape[1]
            x = torch.cat([tokens_before, x], 1)
        elif span.group is not None:
            before = self.weight.shape[1] - 1
            x, cu_seqlens = with_tokens_before(x, span, before)
        if before:  # those tokens give no output
            features = tuple(F.pad(part, (0, 0, before, 0)) for part in features)
        mixed = self._convolve(x, exchange, *features, cu_seqlens=cu_seqlens, backend=backend)
        return tuple(part[:, before:] for part in mixed)

    def _convolve(self, x: Tensor, exchange: Exchange, *features: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return convolve_qkv(x, self._share(self.weight, exchange), **self._sections(exchange), **options)

    def _sections(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "bias": None if self.bias is None else self._share(self.bias, exchange),
            "key_channels": self.key_channels // exchange.shares,
            "key_head_dim": self.key_head_dim,
        }

    def _share(self, parameter: Tensor, exchange: Exchange) -> Tensor:
        if exchange.shares == 1:
            return parameter
        sections = parameter.split([self.key_channels, self.key_channels, self.channels - 2 * self.key_channels])
        return torch.cat([exchange.share(section) for section in sections])


class DynamicConvolution(ShortConvolution):
    """ShortConvolution whose taps depend on the token, beside the token itself; source: arXiv 2606.03825.

    Of the features of queries, keys and values, `rank` each, `up` makes what is added to the taps of every channel.
    """

    def __init__(self, config: TransformerConfig, key_channels: int, value_channels: int, *, rank: int, **sizes: Any):
        super().__init__(config, key_channels, value_channels, **sizes)
        self.up = tensor_parallel_parameter(config, *self.weight.shape, rank)

    def reset_parameters(self) -> None:
        """As ShortConvolution; no token has taps of its own yet."""
        super().reset_parameters()
        nn.init.zeros_(self.up)

    def _convolve(self, x: Tensor, exchange: Exchange, *features: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weight, up = (self._share(parameter, exchange) for parameter in (self.weight, self.up))
        return dynamic_convolve_qkv(x, features[0], weight, up, **self._sections(exchange), **options)


class PlainActivation(nn.Module):
    """SiLU and the norm of queries and keys where there is no convolution; used as ShortConvolution is."""

    def __init__(self, key_channels: int, *, key_head_dim: int) -> None:
        super().__init__()
        self.key_channels, self.key_head_dim = key_channels, key_head_dim

    def reset_parameters(self) -> None:
        """It has none."""

    def forward(
        self, x: Tensor, exchange: Exchange, span: Span, backend: str, tokens_before: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """As ShortConvolution.forward; no token depends on those before."""
        return convolve_qkv(  # with one tap of 1
            x, x.new_ones(x.shape[2], 1), key_channels=self.key_channels // exchange.shares,
            key_head_dim=self.key_head_dim, backend=backend,
        )  # fmt: skip


def replicated_parameter(config: TransformerConfig, data: Tensor) -> nn.Parameter:
    """A parameter that every tensor-parallel rank holds and uses for its own heads alone, so that its gradient is a sum
    over ranks: Megatron forms it where the parameter is marked as sequence-parallel and sequence parallelism is on;
    elsewhere the parameter is used through summed_over_ranks."""
    parameter = nn.Parameter(data)
    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron reads it there
    return parameter


def summed_over_ranks(parameter: Tensor, config: TransformerConfig, group: Any) -> Tensor:
    """A replicated_parameter as it is, its gradient summed over the ranks where Megatron does not."""
    if config.sequence_parallel or group.size() == 1:
        return parameter
    return copy_to_tensor_model_parallel_region(parameter, group=group)


class GatedHeadNorm(nn.Module):
    """RMSNorm per head times activation(gate), if there is a gate. The weight [V] is shared by all heads."""

    def __init__(self, config: TransformerConfig, head_dim: int, activation: str, tp_group: Any) -> None:
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.eps, self.activation = config.layernorm_epsilon, activation
        ones = torch.ones(head_dim, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = replicated_parameter(config, ones)

    def forward(self, x: Tensor, gate: Tensor | None, backend: str) -> Tensor:
        weight = summed_over_ranks(self.weight, self.config, self.tp_group)
        return gated_head_norm(x, gate, weight, eps=self.eps, activation=self.activation, backend=backend)


class HeadParallelLinear(nn.Module):
    """Replicated input features -> this rank's heads. [..., in] -> [..., out/tp]."""

    def __init__(self, config: TransformerConfig, in_features: int, local_out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = tensor_parallel_parameter(config, local_out_features, in_features)
        self.bias = tensor_parallel_parameter(config, local_out_features) if bias else None

    def reset_parameters(self, init_method: Callable[[Tensor], object]) -> None:
        init_method(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Float32Parameters(nn.Module):
    """A module whose parameters stay float32 in a model that is cast to 16 bits.

    Their changes in a training step are far below bfloat16's resolution at their size, so a cast would freeze them.
    """

    def _apply(self, fn, recurse=True):
        """Follow moves between devices, ignore casts."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(device=moved.device)

        return super()._apply(move, recurse)


class LogDecay(Float32Parameters):
    """The parameters A_log, [H] or of every channel [H*K], and dt_bias [H*K] of this rank's heads, with which the ops
    form the decay."""

    def __init__(self, config: TransformerConfig, local_heads: int, key_head_dim: int, *, by_channel: bool) -> None:
        super().__init__()
        self.heads = local_heads
        channels = local_heads * key_head_dim
        rates = channels if by_channel else local_heads
        self.A_log = tensor_parallel_parameter(config, rates, dtype=torch.float32)
        self.dt_bias = tensor_parallel_parameter(config, channels, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """exp(A_log) uniform in [1, 16]; softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        with torch.no_grad():
            self.A_log.uniform_(*A_RANGE).log_()
            step = self.dt_bias.uniform_(*map(math.log, STEP_RANGE)).exp_()
            step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The ops' arguments beside a raw decay, of this context-parallel rank's share of the heads."""
        A_log = self.A_log if self.A_log.shape[0] == self.heads else self.A_log.unflatten(0, (self.heads, -1))
        dt_bias = self.dt_bias.unflatten(0, (self.heads, -1))
        return {"A_log": exchange.share(A_log), "dt_bias": exchange.share(dt_bias)}


class EraseBias(Float32Parameters):
    """The bias [H*K] of the erase logits of this rank's heads, of CARVE."""

    def __init__(self, config: TransformerConfig, local_heads: int, key_head_dim: int, *, initial: float) -> None:
        super().__init__()
        self.heads, self.initial = local_heads, initial
        self.bias = tensor_parallel_parameter(config, local_heads * key_head_dim, dtype=torch.float32)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, self.initial)

    def forward(self, exchange: Exchange) -> Tensor:
        """[H, K] of this context-parallel rank's share of the heads."""
        return exchange.share(self.bias.unflatten(0, (self.heads, -1)))
