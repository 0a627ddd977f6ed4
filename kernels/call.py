"""One call of an op: its tensors, options and state, as every backend takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import CarveState


@dataclass(frozen=True, kw_only=True, eq=False)
class OpCall:
    """What a public op was given. Its attributes are the op's arguments, documented there; in addition:

    Attributes:
        op: "gdn2" or "carve".
        b: the erase gate of GDN-2 (its logits with gate_logits), the erase logits of CARVE.
        inplace_state, state_rows: of the recurrent ops alone.

    One made of another by dataclasses.replace is checked anew when an op takes it.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    content_down: Tensor | None = None
    content_up: Tensor | None = None
    erase_bias: Tensor | None = None
    erase: str = "diagonal"
    prediction: str = "previous"
    content_chunk: int = 64
    content_grad: str = "full"
    erase_scale: float = 1.0
    gate_logits: bool = False
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    scale: float | None = None
    initial_state: Tensor | CarveState | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None
    inplace_state: bool = False
    state_rows: Tensor | None = None
    backend: str = "auto"

    @property
    def output_scale(self) -> float:
        """s, by which outputs are multiplied."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def erases_by_decay(self) -> bool:
        """CARVE's diagonal erase: 1 - b is part of the decay, and the write gate also erases what it replaces."""
        return self.op == "carve" and self.erase == "diagonal"

    @property
    def predicts_before_decay(self) -> bool:
        """The delta write takes the difference to what the state holds before this token's decay."""
        return self.erases_by_decay and self.prediction == "previous"

    @property
    def has_content(self) -> bool:
        return self.content_down is not None

    @property
    def detached(self) -> bool:
        """No gradient flows through the mean of the content chunk before."""
        return self.content_grad == "detached"

    @property
    def sequences(self) -> int:
        """N: of the batch, or packed."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """Of states, and of the computation."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
