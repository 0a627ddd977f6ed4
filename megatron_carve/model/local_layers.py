"""An RMSNorm for stacks without Transformer Engine; Megatron-Core's own refuses sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

try:  # NVIDIA's apex; the unrelated PyPI package of that name has no `normalization`
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
except ImportError:
    fused_rms_norm_affine = None


class RMSNorm(nn.Module):
    """RMSNorm over the hidden size, with NVIDIA apex's fused kernel when it is installed.

    The weight is marked so that Megatron sums its gradient over the tensor-parallel group when the sequence is
    spread over it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"normalization: layers without Transformer Engine support RMSNorm only, got {config.normalization!r}"
            )
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        fill = 0.0 if self.zero_centered else 1.0
        self.weight = nn.Parameter(torch.full((hidden_size,), fill, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron reads it there

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if fused_rms_norm_affine is not None and x.is_cuda:
            return fused_rms_norm_affine(x, weight, weight.shape, self.eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


class StandaloneRMSNorm(RMSNorm):
    """An RMSNorm where Transformer Engine's is a module of its own: its checkpoint has that module's extra state.

    Transformer Engine keeps settings of its FP8 recipe there and refuses a checkpoint without the entry.
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None:
        """There is nothing to set."""
