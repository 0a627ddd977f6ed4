"""The CARVE and GDN-2 ops: chunk form for training and prefill, token by token for decoding.

Letters: B batch, T tokens, H key heads, HV value heads (a multiple of H; value head j uses key head j // (HV // H)),
K and V head widths, R content rank, N sequences (B, or the number of packed ones).

Per head, with the state S in R^{K x V} and the output scale s:

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = s * S_t^T q_t

Dtypes: q, k, v share float16, bfloat16, float32 or float64; the other float inputs have that dtype or, beside a 16-bit
one, float32. States are float32, or float64 for float64 inputs, and so is the computation, under autocast too (call
backward outside it, as torch advises); o has the dtype of v.
"""

from typing import Any

import torch
from torch import Tensor

from . import recurrent, reference
from .backends import require_triton_convolution, require_triton_support, resolve_backend
from .checks import check_carve, check_erase_scale, check_gdn2, check_in_place, check_raw_decay
from .gates import plain_decay, plain_erase_gate
from .state import CarveState

__all__ = [
    "CarveState",
    "chunk_carve",
    "chunk_gdn2",
    "recurrent_carve",
    "recurrent_gdn2",
    "require_triton_convolution",
    "require_triton_support",
    "resolve_backend",
]


def _recurrent_ops(backend: str, q: Tensor, v: Tensor) -> Any:
    """The module with a backend's recurrent ops; Triton is imported only when asked for."""
    if backend == "torch":
        return recurrent
    from . import decode

    require_triton_support("recurrent", q.dtype, q.shape[3], v.shape[3])
    return decode


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_logits: bool = False,
    erase_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 over whole sequences, differentiable in every float input and the initial state.

    The recurrence is in the package docstring; it is the one of "Gated DeltaNet-2: Decoupling Erase and Write in
    Linear Attention" (arXiv 2605.22791), computed in its chunk (WY) form.

    Args:
        q, k: queries and keys, [B, T, H, K], L2-normalised by the caller.
        v: values, [B, T, HV, V].
        g: log-decay per key channel, natural logarithm, <= 0, [B, T, H, K]. Down to -inf (forget everything).
        b: erase gate per key channel, in [0, 1], or up to 2 where negative eigenvalues are wanted, [B, T, H, K].
        w: write gate, [B, T, HV, V], or one scalar per head, [B, T, HV].
        scale: output scale s; K ** -0.5 if None.
        initial_state: S to start from, [N, HV, K, V]; zeros if None. It is not modified.
        output_final_state: also return S after the last token of each sequence.
        cu_seqlens: boundaries of packed sequences, [N + 1], int32 or int64, from 0 to T, nondecreasing; needs B = 1.
            The torch backend reads them on the host.
        A_log, dt_bias: [H] and [H, K], float32 (float64 beside float64). Where they are given, g is the raw decay x,
            [B, T, H, K], and the log-decay is -exp(A_log) * softplus(x + dt_bias), formed in the kernels.
        gate_logits: b and w are logits: b stands for erase_scale * sigmoid(b), w for sigmoid(w).
        erase_scale: upper end of an erase gate given as logits, above 0 and at most 2.
        backend: "torch" (any device, the reference), "triton" or "auto" (see resolve_backend).

    Returns:
        o, [B, T, HV, V] in the dtype of v, and the final state, [N, HV, K, V], or None.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
        NotImplementedError: the backend does not exist for this device, or lacks the widths or the dtype (see
            require_triton_support).
    """
    check_gdn2(q, k, v, g, b, w, initial_state=initial_state, cu_seqlens=cu_seqlens)
    check_raw_decay(A_log, dt_bias, q)
    check_erase_scale(erase_scale)
    options: dict[str, Any] = {
        "scale": _scale(scale, q), "initial_state": initial_state, "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    if resolve_backend(backend, q.device) == "triton":
        from . import chunk

        options |= {"A_log": A_log, "dt_bias": dt_bias, "gate_logits": gate_logits, "erase_scale": erase_scale}
        return chunk.chunk_gdn2(q, k, v, g, b, w, **options)
    g, b, w = _plain_gdn2(g, b, w, A_log, dt_bias, gate_logits, erase_scale)
    return reference.chunk_gdn2(q, k, v, g, b, w, **options)


def chunk_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase_logits: Tensor,
    w: Tensor,
    content_down: Tensor,
    content_up: Tensor,
    *,
    content_chunk: int = 64,
    content_grad: str = "full",
    erase_scale: float = 1.0,
    scale: float | None = None,
    initial_state: CarveState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_logits: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, CarveState | None]:
    """CARVE over whole sequences, differentiable in every float input and the floats of the initial state.

    GDN-2's recurrence with one write scalar per head and an erase gate that sees the content already written:

        b_t = erase_scale * sigmoid(erase_logits_t + U D m),
        m = mean of o over the previous content chunk, 0 before the first

    after "CARVE: Content-Aware Recurrent with Value Efficiency for Chunk-Parallel Linear Attention" (arXiv
    2606.27229; its full text was not available, so where and how m enters is this package's reading). Content chunks
    are counted from each sequence's own start. With content_up = 0 the result is that of chunk_gdn2 with
    b = erase_scale * sigmoid(erase_logits): bit for bit on the torch backend, within rounding on Triton, whose two ops
    have kernels of their own.

    Args:
        q, k: queries and keys, [B, T, H, K], L2-normalised by the caller.
        v: values, [B, T, HV, V].
        g: log-decay per key channel, natural logarithm, <= 0, [B, T, H, K]. Down to -inf (forget everything).
        erase_logits: erase gate before content term and sigmoid, [B, T, H, K].
        w: write gate, one scalar per head, [B, T, HV].
        content_down: D, [HV, R, V].
        content_up: U, [HV, K, R].
        content_chunk: tokens in a content chunk, a positive multiple of 64 below 2**31. Part of the model.
        content_grad: "full", or "detached" to let no gradient into the mean where it enters the gate.
        erase_scale: upper end of the erase gate, above 0 and at most 2; above 1 the transition may have negative
            eigenvalues.
        scale: output scale s; K ** -0.5 if None. The mean is of the scaled output, before it is cast to v's dtype.
        initial_state: state of an earlier call to continue from; it is not modified. Its counts are read on the host.
        output_final_state: also return the state after the last token of each sequence. Any split of a sequence into
            calls, of either CARVE op, computes what one call computes.
        cu_seqlens: boundaries of packed sequences, [N + 1], int32 or int64, from 0 to T, nondecreasing; needs B = 1.
            The torch backend reads them on the host.
        A_log, dt_bias: [H] and [H, K], float32 (float64 beside float64). Where they are given, g is the raw decay x,
            [B, T, H, K], and the log-decay is -exp(A_log) * softplus(x + dt_bias), formed in the kernels.
        gate_logits: w is a logit, it stands for sigmoid(w).
        backend: "torch" (any device, the reference), "triton" or "auto" (see resolve_backend).

    Returns:
        o, [B, T, HV, V] in the dtype of v, and the final CarveState or None.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
        NotImplementedError: the backend does not exist for this device, or lacks the widths or the dtype (see
            require_triton_support).
    """
    check_carve(
        q, k, v, g, erase_logits, w, content_down, content_up,
        content_chunk=content_chunk, content_grad=content_grad, erase_scale=erase_scale,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_raw_decay(A_log, dt_bias, q)
    options: dict[str, Any] = {
        "content_chunk": content_chunk, "content_grad": content_grad, "erase_scale": erase_scale,
        "scale": _scale(scale, q), "initial_state": initial_state, "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    if resolve_backend(backend, q.device) == "triton":
        from . import chunk

        options |= {"A_log": A_log, "dt_bias": dt_bias, "gate_logits": gate_logits}
        return chunk.chunk_carve(q, k, v, g, erase_logits, w, content_down, content_up, **options)
    g, w = plain_decay(g, A_log, dt_bias), torch.sigmoid(w) if gate_logits else w
    return reference.chunk_carve(q, k, v, g, erase_logits, w, content_down, content_up, **options)


def recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_logits: bool = False,
    erase_scale: float = 1.0,
    inplace_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 token by token, for decoding.

    Arguments, results and errors are those of chunk_gdn2, and so are the values up to rounding. Runs under
    torch.no_grad: the results carry no gradient. With inplace_state the state is written into initial_state, which
    must be contiguous, and is returned as the final state.
    """
    check_gdn2(q, k, v, g, b, w, initial_state=initial_state, cu_seqlens=cu_seqlens)
    check_raw_decay(A_log, dt_bias, q)
    check_erase_scale(erase_scale)
    if inplace_state:
        check_in_place(initial_state)
    with torch.no_grad():
        g, b, w = _plain_gdn2(g, b, w, A_log, dt_bias, gate_logits, erase_scale)
    return _recurrent_ops(resolve_backend(backend, q.device), q, v).recurrent_gdn2(
        q, k, v, g, b, w,
        scale=_scale(scale, q), initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, inplace_state=inplace_state,
    )  # fmt: skip


def recurrent_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase_logits: Tensor,
    w: Tensor,
    content_down: Tensor,
    content_up: Tensor,
    *,
    content_chunk: int = 64,
    content_grad: str = "full",
    erase_scale: float = 1.0,
    scale: float | None = None,
    initial_state: CarveState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_logits: bool = False,
    inplace_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, CarveState | None]:
    """CARVE token by token, for decoding.

    Arguments, results and errors are those of chunk_carve, and so are the values up to rounding. Runs under
    torch.no_grad: the results carry no gradient, and content_grad is checked but has no effect. With inplace_state the
    state is written into the tensors of initial_state, which must be contiguous, and is returned as the final state.
    """
    check_carve(
        q, k, v, g, erase_logits, w, content_down, content_up,
        content_chunk=content_chunk, content_grad=content_grad, erase_scale=erase_scale,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_raw_decay(A_log, dt_bias, q)
    if inplace_state:
        check_in_place(initial_state)
    with torch.no_grad():
        g, w = plain_decay(g, A_log, dt_bias), torch.sigmoid(w) if gate_logits else w
    return _recurrent_ops(resolve_backend(backend, q.device), q, v).recurrent_carve(
        q, k, v, g, erase_logits, w, content_down, content_up,
        content_chunk=content_chunk, erase_scale=erase_scale, scale=_scale(scale, q), initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, inplace_state=inplace_state,
    )  # fmt: skip


def _plain_gdn2(
    g: Tensor, b: Tensor, w: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, gate_logits: bool, erase_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay and gates as the reference takes them."""
    w = torch.sigmoid(w) if gate_logits else w
    return plain_decay(g, A_log, dt_bias), plain_erase_gate(b, gate_logits, erase_scale), w


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
