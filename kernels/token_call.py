"""What a step of one token of every sequence hands to a backend; see decoding.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .state import CarveState

# Sequences up to which Triton's programs may apply the maps of low rank themselves: each reads its head's anew.
FEW_SEQUENCES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCall:
    """One token of every sequence between a mixer's projections, with H key heads and HV value heads.

    Attributes:
        convolved: [N, D], queries H * K, keys H * K and values HV * V before the convolution.
        erase: logits [N, H * K], or None where the write gate also erases.
        write: logits [N, HV * V], [N, HV] or [N, H].
        write_gates: whose they are, "value_channels", "value_heads" or "key_heads".
        decay: raw, [N, H * K]; with decay_up features, [N, F].
        gate: of the output, [N, HV * V]; with gate_up features, [N, F]; None with the activation "none".
            Of all these a slice of a wider projection need not be copied; erase lies in the same as convolved.
        decay_up, gate_up: maps [H * K, F] and [HV * V, F], or None.
        gate_bias: [HV * V] beside gate_up.
        kept: [slots, W - 1, D], the last tokens before the convolution, oldest first; brought up to date.
        taps: [D, W], or None without convolution (W = 1). convolution_bias: [D] or None.
        key_heads: H.
        A_log: [H] or [H, K] float32. dt_bias: [H, K] float32.
        state: CARVE's, or GDN-2's S, [slots, HV, K, V] float32; brought up to date. Rows may lie apart, each is in one
            piece.
        rows: [N], which slots are the sequences', those below 0 nobody's, whose output is zero; None for all in order.
        positions: [N], tokens of the sequences before, which say where they are in a content chunk; then the state's
            count is neither read nor written.
        content_down, content_up: [R, V], [K, R] or None. erase_bias: [H, K] or None.
        erase_form, prediction, content_chunk, erase_scale: as `erase` and the others of the ops.
        norm_weight: [V], of the gated output norm. eps, activation: see gated_head_norm.
    """

    convolved: Tensor
    erase: Tensor | None
    write: Tensor
    write_gates: str
    decay: Tensor
    gate: Tensor | None
    decay_up: Tensor | None = None
    gate_up: Tensor | None = None
    gate_bias: Tensor | None = None
    kept: Tensor
    taps: Tensor | None
    convolution_bias: Tensor | None = None
    key_heads: int
    A_log: Tensor
    dt_bias: Tensor
    state: CarveState | tuple[Tensor]
    rows: Tensor | None = None
    positions: Tensor | None = None
    content_down: Tensor | None = None
    content_up: Tensor | None = None
    erase_bias: Tensor | None = None
    erase_form: str = "diagonal"
    prediction: str = "previous"
    content_chunk: int = 64
    erase_scale: float = 1.0
    norm_weight: Tensor
    eps: float
    activation: str

    @property
    def features(self) -> int:
        """F, or 1 without maps of low rank."""
        up = self.decay_up if self.decay_up is not None else self.gate_up
        return 1 if up is None else up.shape[1]


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm: its weight [D], what is added to the mean of squares, and whether its factor is weight + 1."""

    weight: Tensor
    eps: float
    zero_centered: bool = False
