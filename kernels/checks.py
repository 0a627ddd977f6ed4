"""Argument checks of the public ops: every message names the argument, what was expected and what came."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .state import CarveState

CHUNK_TOKENS = 64
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONTENT_GRADS = ("full", "detached")
ACTIVATIONS = ("silu", "sigmoid")


def check_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check everything about a GDN-2 call that can be checked without reading values from the device."""
    _check_tokens(q, k, v)
    _check_like(q, g=g, b=b)
    _check_tensor("w", w, q)
    if tuple(w.shape) not in (tuple(v.shape), tuple(v.shape[:3])):
        expected = f"[B, T, HV, V] = {_show(v.shape)} or [B, T, HV] = {_show(v.shape[:3])}"
        raise ValueError(f"w: expected shape {expected}, got {_show(w.shape)}")
    rows = _check_cu_seqlens(cu_seqlens, q)
    if initial_state is not None:
        shape = (rows, v.shape[2], q.shape[3], v.shape[3])
        _check_state("initial_state", initial_state, "[N, HV, K, V]", shape, q)


def check_carve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase_logits: Tensor,
    w: Tensor,
    content_down: Tensor,
    content_up: Tensor,
    *,
    content_chunk: int,
    content_grad: str,
    erase_scale: float,
    initial_state: CarveState | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check everything about a CARVE call that can be checked without reading values from the device."""
    _check_tokens(q, k, v)
    _check_like(q, g=g, erase_logits=erase_logits)
    value_heads, value_dim, key_dim = v.shape[2], v.shape[3], q.shape[3]
    _check_tensor("w", w, q)
    _check_shape("w", w, "[B, T, HV]", tuple(v.shape[:3]))
    _check_tensor("content_down", content_down, q)
    _check_tensor("content_up", content_up, q)
    if content_down.ndim != 3 or content_down.shape[1] < 1:
        raise ValueError(f"content_down: expected shape [HV, R, V] with R >= 1, got {_show(content_down.shape)}")
    rank = content_down.shape[1]
    _check_shape("content_down", content_down, "[HV, R, V]", (value_heads, rank, value_dim))
    _check_shape("content_up", content_up, "[HV, K, R]", (value_heads, key_dim, rank))
    _check_content_options(content_chunk, content_grad)
    check_erase_scale(erase_scale)
    rows = _check_cu_seqlens(cu_seqlens, q)
    if initial_state is not None:
        _check_carve_state(initial_state, rows, q, v)


def check_raw_decay(A_log: Tensor | None, dt_bias: Tensor | None, q: Tensor) -> None:
    """Check the parameters of a raw decay: both or neither, in the dtype that the op computes in."""
    if A_log is None and dt_bias is None:
        return
    if A_log is None or dt_bias is None:
        missing, given = ("A_log", "dt_bias") if A_log is None else ("dt_bias", "A_log")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    _check_state("A_log", A_log, "[H]", (q.shape[2],), q)
    _check_state("dt_bias", dt_bias, "[H, K]", (q.shape[2], q.shape[3]), q)


def check_erase_scale(erase_scale: float) -> None:
    if isinstance(erase_scale, bool) or not isinstance(erase_scale, int | float) or not 0 < erase_scale <= 2:
        raise ValueError(f"erase_scale: expected a number above 0 and at most 2, got {erase_scale!r}")


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, key_channels: int, key_head_dim: int, cu_seqlens: Tensor | None
) -> None:
    """Check everything about a call of convolve_qkv that can be checked without reading values from the device."""
    _check_first("x", x, "[B, T, D]")
    channels = x.shape[2]
    _check_tensor("weight", weight, x, like="x")
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        expected = f"[D, W] with D = {channels} and W at least 1"
        raise ValueError(f"weight: expected shape {expected}, got {_show(weight.shape)}")
    if bias is not None:
        _check_tensor("bias", bias, x, like="x")
        _check_shape("bias", bias, "[D]", (channels,))
    if key_channels < 1 or 2 * key_channels >= channels:
        expected = f"at least 1 and less than half of D = {channels}"
        raise ValueError(f"key_channels: expected {expected}, got {key_channels}")
    if key_head_dim < 1 or key_channels % key_head_dim:
        raise ValueError(f"key_head_dim: expected a divisor of key_channels = {key_channels}, got {key_head_dim}")
    _check_cu_seqlens(cu_seqlens, x, like="x")


def check_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str) -> None:
    """Check a call of gated_head_norm."""
    _check_first("x", x, "[B, T, H, V]")
    _check_tensor("gate", gate, x, like="x")
    _check_shape("gate", gate, "[B, T, H, V]", tuple(x.shape))
    _check_tensor("weight", weight, x, like="x")
    _check_shape("weight", weight, "[V]", (x.shape[3],))
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_in_place(state: Tensor | CarveState | None) -> None:
    """Check the initial state of a call that updates it."""
    if state is None:
        raise ValueError("initial_state: expected one to update with inplace_state=True, got None")
    parts = {"": state} if isinstance(state, Tensor) else {f".{name}": x for name, x in state._asdict().items()}
    for name, part in parts.items():
        if not part.is_contiguous():
            expected = "expected a contiguous tensor with inplace_state=True"
            raise ValueError(f"initial_state{name}: {expected}, got strides {part.stride()}")


def read_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Copy the boundaries of the packed sequences to the host (this waits for the device) and check their values."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {ends[0]}")
    if ends[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected to end at T = {tokens}, got {ends[-1]}")
    for index, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(f"cu_seqlens: expected nondecreasing values, got {end} after {start} at index {index + 1}")
    return ends


def read_counts(count: Tensor, content_chunk: int) -> list[int]:
    """Copy a CarveState's token counts to the host (this waits for the device) and check their values."""
    counts = count.tolist()
    for row, value in enumerate(counts):
        if not 0 <= value < content_chunk:
            expected = f"0 <= count < content_chunk = {content_chunk}"
            raise ValueError(f"initial_state.count: expected {expected}, got {value} in row {row}")
    return counts


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the tensors that set the sizes B, T, H, HV, K, V."""
    _check_first("q", q, "[B, T, H, K]")
    _check_tensor("k", k, q, dtypes=(q.dtype,))
    _check_shape("k", k, "[B, T, H, K]", tuple(q.shape))
    _check_tensor("v", v, q, dtypes=(q.dtype,))
    batch, tokens, heads, _ = q.shape
    if v.ndim != 4 or 0 in v.shape or tuple(v.shape[:2]) != (batch, tokens):
        expected = f"[B, T, HV, V] with B = {batch}, T = {tokens}, HV and V at least 1"
        raise ValueError(f"v: expected shape {expected}, got {_show(v.shape)}")
    if v.shape[2] % heads:
        raise ValueError(f"v: expected HV to be a multiple of H = {heads}, got HV = {v.shape[2]}")


def _check_first(name: str, tensor: Tensor, letters: str) -> None:
    """Check the tensor that the others follow in device and dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected dtype {_names(FLOAT_DTYPES)}, got {_name(tensor.dtype)}")
    if tensor.ndim != len(letters.split(",")) or 0 in tensor.shape:
        raise ValueError(f"{name}: expected shape {letters}, every size at least 1, got {_show(tensor.shape)}")


def _check_like(q: Tensor, **tensors: Tensor) -> None:
    """Check key-side tensors, which share the shape of q."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, q)
        _check_shape(name, tensor, "[B, T, H, K]", tuple(q.shape))


def _check_tensor(
    name: str, tensor: Tensor, q: Tensor, dtypes: Sequence[torch.dtype] | None = None, *, like: str = "q"
) -> None:
    """Check type, device and dtype beside q, named `like`; gates may stay in float32 beside narrower q, k, v."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} (that of {like}), got {tensor.device}")
    if dtypes is None:
        dtypes = (q.dtype,) if q.dtype in (torch.float32, torch.float64) else (q.dtype, torch.float32)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {_names(dtypes)}, got {_name(tensor.dtype)}")


def _check_shape(name: str, tensor: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {letters} = {_show(expected)}, got {_show(tensor.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor, *, like: str = "q") -> int:
    """Check the form of cu_seqlens and return N, the number of sequences."""
    if cu_seqlens is None:
        return q.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected dtype int32 or int64, got {_name(cu_seqlens.dtype)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {_show(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected device {q.device} (that of {like}), got {cu_seqlens.device}")
    if q.shape[0] != 1:
        raise ValueError(f"{like}: expected B = 1 with cu_seqlens (packed sequences), got B = {q.shape[0]}")
    return cu_seqlens.shape[0] - 1


def _check_state(name: str, state: Tensor, letters: str, shape: tuple[int, ...], q: Tensor) -> None:
    """Check one float part of a state, held in the dtype that the op computes in."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _check_tensor(name, state, q, dtypes=(dtype,))
    _check_shape(name, state, letters, shape)


def _check_carve_state(state: CarveState, rows: int, q: Tensor, v: Tensor) -> None:
    if not isinstance(state, CarveState):
        raise ValueError(f"initial_state: expected a CarveState, got {type(state).__name__}")
    value_heads, value_dim, key_dim = v.shape[2], v.shape[3], q.shape[3]
    _check_state("initial_state.S", state.S, "[N, HV, K, V]", (rows, value_heads, key_dim, value_dim), q)
    _check_state("initial_state.mean", state.mean, "[N, HV, V]", (rows, value_heads, value_dim), q)
    _check_state("initial_state.partial", state.partial, "[N, HV, V]", (rows, value_heads, value_dim), q)
    _check_tensor("initial_state.count", state.count, q, dtypes=(torch.int64,))
    _check_shape("initial_state.count", state.count, "[N]", (rows,))


def _check_content_options(content_chunk: int, content_grad: str) -> None:
    # bool is an int to Python
    whole = isinstance(content_chunk, int) and not isinstance(content_chunk, bool)
    if not whole or content_chunk < 1 or content_chunk % CHUNK_TOKENS:
        raise ValueError(f"content_chunk: expected a positive multiple of {CHUNK_TOKENS}, got {content_chunk!r}")
    if content_chunk >= 2**31:
        raise ValueError(f"content_chunk: expected less than 2**31, got {content_chunk}")
    if content_grad not in CONTENT_GRADS:
        raise ValueError(f"content_grad: expected one of {', '.join(CONTENT_GRADS)}, got {content_grad!r}")


def _show(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_name(dtype) for dtype in dtypes)
