"""The CARVE and GDN-2 ops: chunk form for training and prefill, token by token for decoding.

Letters: B batch, T tokens, H key heads, HV value heads (a multiple of H; value head j uses key head j // (HV // H)),
K and V head widths, R content rank, N sequences (B, or the number of packed ones).

Per head, with the state S in R^{K x V} and the output scale s, GDN-2 is

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,    o_t = s * S_t^T q_t

and CARVE erases by decay, then writes the difference to what the state holds under the key:

    S_t = Diag((1 - b_t) * exp g_t) S_{t-1} + w_t k_t (v_t - P_t^T k_t)^T,      P_t = S_{t-1}, or S_{t-1} decayed

Dtypes: q, k, v share float16, bfloat16, float32 or float64; the other float inputs have that dtype or, beside a 16-bit
one, float32. States are float32, or float64 for float64 inputs, and so is the computation, under autocast too (call
backward outside it, as torch advises); o has the dtype of v.
"""

from typing import Any

from torch import Tensor

from .backends import (
    require_triton_convolution,
    require_triton_dynamic_taps,
    require_triton_support,
    require_triton_width,
    resolve_backend,
)
from .call import OpCall
from .checks import check_call
from .state import CarveState, state_shapes
from .torch_backend import recurrent, reference

__all__ = [
    "CarveState",
    "OpCall",
    "chunk_carve",
    "chunk_gdn2",
    "recurrent_carve",
    "recurrent_gdn2",
    "require_triton_convolution",
    "require_triton_dynamic_taps",
    "require_triton_support",
    "require_triton_width",
    "resolve_backend",
    "run_chunk",
    "run_recurrent",
    "state_shapes",
]


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
    Linear Attention" (arXiv 2605.22791), computed in its chunk (WY) form. One number per head as b and the same as w
    make it Kimi Delta Attention (arXiv 2510.26692).

    Args:
        q, k: queries and keys, [B, T, H, K], L2-normalised by the caller.
        v: values, [B, T, HV, V].
        g: log-decay per key channel, natural logarithm, <= 0, [B, T, H, K]. Down to -inf (forget everything).
        b: erase gate per key channel, in [0, 1], or up to 2 where negative eigenvalues are wanted, [B, T, H, K], or
            one number per head, [B, T, H].
        w: write gate, [B, T, HV, V], or one scalar per head, [B, T, HV].
        scale: output scale s; K ** -0.5 if None.
        initial_state: S to start from, [N, HV, K, V]; zeros if None. It is not modified.
        output_final_state: also return S after the last token of each sequence.
        cu_seqlens: boundaries of packed sequences, [N + 1], int32 or int64, from 0 to T, nondecreasing; needs B = 1.
            The torch backend reads them on the host. Triton does not wait for their values: tokens behind the last one
            have outputs and gradients of zero.
        A_log, dt_bias: [H] or [H, K], and [H, K], float32 (float64 beside float64). Where they are given, g is the raw
            decay x, [B, T, H, K], and the log-decay is -exp(A_log) * softplus(x + dt_bias), formed in the kernels.
            A_log above 70 counts as 70, beyond which float32 does not go and a token forgets everything.
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
    call = OpCall(
        op="gdn2", q=q, k=k, v=v, g=g, b=b, w=w, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
        gate_logits=gate_logits, erase_scale=erase_scale, backend=backend,
    )  # fmt: skip
    return run_chunk(call)


def chunk_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase_logits: Tensor,
    w: Tensor,
    content_down: Tensor | None,
    content_up: Tensor | None,
    *,
    erase: str = "diagonal",
    prediction: str = "previous",
    content_chunk: int = 64,
    content_grad: str = "full",
    erase_bias: Tensor | None = None,
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

    "CARVE: Content-Aware Recurrent with Value Efficiency for Chunk-Parallel Linear Attention" (arXiv 2606.27229),
    equations 5 to 10. The recurrence is in the package docstring; its erase gate sees the content written before:

        b_t = sigmoid(erase_logits_t + erase_bias + U tanh(D m)),
        m = mean of S_t^T q_t over the content chunk before (without s), 0 in the first

    Content chunks are counted from each sequence's own start. Without content (D and U None) and with the prediction
    "decayed" this is Kimi Delta Attention with the log-decay g + log(1 - b) and beta = w.

    Args:
        q, k: queries and keys, [B, T, H, K], L2-normalised by the caller.
        v: values, [B, T, HV, V].
        g: log-decay per key channel, natural logarithm, <= 0, [B, T, H, K]. Down to -inf (forget everything).
        erase_logits: erase gate before bias, content term and sigmoid, [B, T, H, K].
        w: write gate, one scalar per head, [B, T, HV].
        content_down: D, [R, V] for all heads or [HV, R, V]; None for no content.
        content_up: U, [K, R] or [HV, K, R], as content_down.
        erase: "diagonal", the paper's decay by 1 - b, or "delta", which erases along the key as GDN-2 does:
            S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + w_t k_t v_t^T.
        prediction: what the diagonal form's write is the difference to: "previous" (equation 5), the state before this
            token's decay, or "decayed" (appendix E), after it.
        content_chunk: tokens in a content chunk, a positive multiple of 64 below 2**31. Part of the model.
        content_grad: "full", or "detached" to let no gradient into the mean where it enters the gate.
        erase_bias: [H, K], float32 (float64 beside float64), added to the erase logits; None for zeros.
        erase_scale: upper end of the erase gate of "delta", above 0 and at most 2; above 1 the transition may have
            negative eigenvalues. 1 with "diagonal".
        scale: output scale s, not 0; K ** -0.5 if None.
        initial_state: state of an earlier call to continue from; it is not modified. The torch backend reads its
            counts on the host.
        output_final_state: also return the state after the last token of each sequence. Any split of a sequence into
            calls, of either CARVE op, computes what one call computes.
        cu_seqlens: boundaries of packed sequences, [N + 1], int32 or int64, from 0 to T, nondecreasing; needs B = 1.
            The torch backend reads them on the host. Triton does not wait for their values: tokens behind the last one
            have outputs and gradients of zero.
        A_log, dt_bias: [H] or [H, K], and [H, K], float32 (float64 beside float64). Where they are given, g is the raw
            decay x, [B, T, H, K], and the log-decay is -exp(A_log) * softplus(x + dt_bias), formed in the kernels.
            A_log above 70 counts as 70, beyond which float32 does not go and a token forgets everything.
        gate_logits: w is a logit, it stands for sigmoid(w).
        backend: "torch" (any device, the reference), "triton" or "auto" (see resolve_backend).

    Returns:
        o, [B, T, HV, V] in the dtype of v, and the final CarveState or None.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
        NotImplementedError: the backend does not exist for this device, or lacks the widths or the dtype (see
            require_triton_support).
    """
    call = OpCall(
        op="carve", q=q, k=k, v=v, g=g, b=erase_logits, w=w, content_down=content_down, content_up=content_up,
        erase=erase, prediction=prediction, content_chunk=content_chunk, content_grad=content_grad,
        erase_bias=erase_bias, erase_scale=erase_scale, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
        gate_logits=gate_logits, backend=backend,
    )  # fmt: skip
    return run_chunk(call)


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
    state_rows: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet-2 token by token, for decoding.

    Arguments, results and errors are those of chunk_gdn2, and so are the values up to rounding. Runs under
    torch.no_grad: the results carry no gradient. With inplace_state the state is written into initial_state, which
    must be contiguous, and is returned as the final state.

    With state_rows, [B] int64, one token of every sequence goes on in place from that row of initial_state, which may
    have more rows, and these lie apart; no two sequences share one. A row below 0 marks padding: its o is zero. (The
    torch backend wants the first to be none.)
    """
    call = OpCall(
        op="gdn2", q=q, k=k, v=v, g=g, b=b, w=w, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
        gate_logits=gate_logits, erase_scale=erase_scale, inplace_state=inplace_state,
        state_rows=state_rows, backend=backend,
    )  # fmt: skip
    return run_recurrent(call)


def recurrent_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase_logits: Tensor,
    w: Tensor,
    content_down: Tensor | None,
    content_up: Tensor | None,
    *,
    erase: str = "diagonal",
    prediction: str = "previous",
    content_chunk: int = 64,
    content_grad: str = "full",
    erase_bias: Tensor | None = None,
    erase_scale: float = 1.0,
    scale: float | None = None,
    initial_state: CarveState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_logits: bool = False,
    inplace_state: bool = False,
    state_rows: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CarveState | None]:
    """CARVE token by token, for decoding.

    Arguments, results and errors are those of chunk_carve, and so are the values up to rounding. Runs under
    torch.no_grad: the results carry no gradient, and content_grad is checked but has no effect. With inplace_state the
    state is written into the tensors of initial_state, which must be contiguous, and is returned as the final state.
    state_rows: see recurrent_gdn2; of S, mean and partial, while count is [B].
    """
    call = OpCall(
        op="carve", q=q, k=k, v=v, g=g, b=erase_logits, w=w, content_down=content_down, content_up=content_up,
        erase=erase, prediction=prediction, content_chunk=content_chunk, content_grad=content_grad,
        erase_bias=erase_bias, erase_scale=erase_scale, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
        gate_logits=gate_logits, inplace_state=inplace_state,
        state_rows=state_rows, backend=backend,
    )  # fmt: skip
    return run_recurrent(call)


def run_chunk(call: OpCall) -> tuple[Tensor, Any]:
    """What chunk_gdn2 or chunk_carve does, of the arguments in a call; results and errors as there."""
    check_call(call)
    if resolve_backend(call.backend, call.q.device) == "torch":
        return reference.chunk_op(call)
    from .triton_backend import chunk_ops  # Triton is imported only when asked for

    require_triton_support(
        call.op, call.q.dtype, call.q.shape[3], call.v.shape[3], erase=call.erase, content=call.has_content
    )
    return chunk_ops.chunk_op(call)


def run_recurrent(call: OpCall) -> tuple[Tensor, Any]:
    """What recurrent_gdn2 or recurrent_carve does, of the arguments in a call; results and errors as there."""
    check_call(call)
    if resolve_backend(call.backend, call.q.device) == "torch":
        return recurrent.recurrent_op(call)
    from .triton_backend import decode

    require_triton_support("recurrent", call.q.dtype, call.q.shape[3], call.v.shape[3])
    return decode.recurrent_op(call)
