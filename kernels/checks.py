"""Argument checks of the public ops: every message names the argument, what was expected and what came."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .call import OpCall
from .state import CarveState

CHUNK_TOKENS = 64
# A_log above this counts as this: exp(A_log) of 2.5e30 a token forgets everything, and float32 still holds what it
# multiplies.
LARGEST_A_LOG = 70.0
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ERASES = ("diagonal", "delta")
PREDICTIONS = ("previous", "decayed")
CONTENT_GRADS = ("full", "detached")
ACTIVATIONS = ("silu", "sigmoid", "none")


def check_call(call: OpCall) -> None:
    """Check everything about a call that can be checked without reading values from the device."""
    _check_tokens(call.q, call.k, call.v)
    _check_like(call.q, g=call.g)
    rows = _check_cu_seqlens(call.cu_seqlens, call.q)
    if call.state_rows is not None:
        rows = _check_state_rows(call)
    _check_raw_decay(call)
    _check_scale(call.scale)
    if call.op == "gdn2":
        _check_gdn2(call, rows)
    else:
        _check_carve(call, rows)
    if call.inplace_state:
        check_in_place(call.initial_state, by_row=call.state_rows is not None)


def _check_state_rows(call: OpCall) -> int:
    """Check which rows of a state are the sequences'; how many rows there are."""
    assert call.state_rows is not None
    if not call.inplace_state or call.cu_seqlens is not None or call.q.shape[1] != 1:
        raise ValueError(
            "state_rows: expected one token of every sequence and inplace_state=True, got "
            f"T = {call.q.shape[1]}, inplace_state={call.inplace_state}"
        )
    _check_tensor("state_rows", call.state_rows, call.q, dtypes=(torch.int64,))
    _check_shape("state_rows", call.state_rows, "[B]", (call.q.shape[0],))
    if call.initial_state is None:
        raise ValueError("initial_state: expected one with state_rows, got None")
    return call.initial_state[0].shape[0] if isinstance(call.initial_state, tuple) else call.initial_state.shape[0]


def _check_gdn2(call: OpCall, rows: int) -> None:
    q, v = call.q, call.v
    _check_one_of("b", call.b, q, {"[B, T, H, K]": q.shape, "[B, T, H]": q.shape[:3]})
    _check_one_of("w", call.w, q, {"[B, T, HV, V]": v.shape, "[B, T, HV]": v.shape[:3]})
    _check_erase_scale(call.erase_scale)
    if call.initial_state is not None:
        _check_state("initial_state", call.initial_state, "[N, HV, K, V]", _state_shape(call, rows), q)


def _check_carve(call: OpCall, rows: int) -> None:
    q, v = call.q, call.v
    _check_like(q, erase_logits=call.b)
    _check_tensor("w", call.w, q)
    _check_shape("w", call.w, "[B, T, HV]", tuple(v.shape[:3]))
    for name, value, known in (
        ("erase", call.erase, ERASES), ("prediction", call.prediction, PREDICTIONS),
        ("content_grad", call.content_grad, CONTENT_GRADS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    _check_erase_scale(call.erase_scale)
    if call.erases_by_decay and call.erase_scale != 1:
        raise ValueError(
            f"erase_scale: expected 1 with erase='diagonal', which decays by 1 - b, got {call.erase_scale!r}"
        )
    _check_content(call)
    if call.erase_bias is not None:
        _check_state("erase_bias", call.erase_bias, "[H, K]", (q.shape[2], q.shape[3]), q)
    if call.scale == 0:  # the state's mean would be lost
        raise ValueError(f"scale: expected a number other than 0, got {call.scale!r}")
    if call.initial_state is not None:
        _check_carve_state(call.initial_state, rows, call)


def _check_content(call: OpCall) -> None:
    """Check D and U, for all heads or one a head, and the length of content chunks."""
    q, v, down, up = call.q, call.v, call.content_down, call.content_up
    if (down is None) != (up is None):
        missing, given = ("content_down", "content_up") if down is None else ("content_up", "content_down")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if down is not None and up is not None:
        _check_tensor("content_down", down, q)
        _check_tensor("content_up", up, q)
        if down.ndim not in (2, 3) or down.shape[-2] < 1:
            expected = "[R, V] or [HV, R, V] with R >= 1"
            raise ValueError(f"content_down: expected shape {expected}, got {_show(down.shape)}")
        rank, heads = down.shape[-2], v.shape[2:3] if down.ndim == 3 else ()
        letters = "HV, " if down.ndim == 3 else ""
        _check_shape("content_down", down, f"[{letters}R, V]", (*heads, rank, v.shape[3]))
        _check_shape("content_up", up, f"[{letters}K, R]", (*heads, q.shape[3], rank))
    # bool is an int to Python
    chunk = call.content_chunk
    whole = isinstance(chunk, int) and not isinstance(chunk, bool)
    if not whole or chunk < 1 or chunk % CHUNK_TOKENS:
        raise ValueError(f"content_chunk: expected a positive multiple of {CHUNK_TOKENS}, got {chunk!r}")
    if chunk >= 2**31:
        raise ValueError(f"content_chunk: expected less than 2**31, got {chunk}")


def _check_raw_decay(call: OpCall) -> None:
    """Check the parameters of a raw decay: both or neither, in the dtype that the op computes in."""
    A_log, dt_bias, q = call.A_log, call.dt_bias, call.q
    if A_log is None and dt_bias is None:
        return
    if A_log is None or dt_bias is None:
        missing, given = ("A_log", "dt_bias") if A_log is None else ("dt_bias", "A_log")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    by_channel = (q.shape[2], q.shape[3])
    _check_one_of("A_log", A_log, q, {"[H]": by_channel[:1], "[H, K]": by_channel}, dtypes=(call.state_dtype,))
    _check_state("dt_bias", dt_bias, "[H, K]", by_channel, q)


def _check_erase_scale(erase_scale: float) -> None:
    if not _is_number(erase_scale) or not 0 < erase_scale <= 2:
        raise ValueError(f"erase_scale: expected a number above 0 and at most 2, got {erase_scale!r}")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, key_channels: int, key_head_dim: int, cu_seqlens: Tensor | None
) -> None:
    """Check everything about a call of convolve_qkv that can be checked without reading values from the device."""
    check_taps(x, weight, cu_seqlens)
    channels = x.shape[2]
    if bias is not None:
        _check_tensor("bias", bias, x, like="x")
        _check_shape("bias", bias, "[D]", (channels,))
    if key_channels < 1 or 2 * key_channels >= channels:
        expected = f"at least 1 and less than half of D = {channels}"
        raise ValueError(f"key_channels: expected {expected}, got {key_channels}")
    if key_head_dim < 1 or key_channels % key_head_dim:
        raise ValueError(f"key_head_dim: expected a divisor of key_channels = {key_channels}, got {key_head_dim}")


def check_taps(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check what every short convolution takes."""
    _check_first("x", x, "[B, T, D]")
    _check_tensor("weight", weight, x, like="x")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        expected = f"[D, W] with D = {x.shape[2]} and W at least 1"
        raise ValueError(f"weight: expected shape {expected}, got {_show(weight.shape)}")
    _check_cu_seqlens(cu_seqlens, x, like="x")


def check_dynamic_convolution(
    x: Tensor, features: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None, *, key_channels: int,
    key_head_dim: int, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Check a call of dynamic_convolve_qkv, as check_convolution does that of convolve_qkv."""
    check_convolution(x, weight, bias, key_channels=key_channels, key_head_dim=key_head_dim, cu_seqlens=cu_seqlens)
    _check_features(x, features, weight, up)


def check_dynamic_heads(
    x: Tensor, features: Tensor, weight: Tensor, up: Tensor, *, head_dim: int, group: int, cu_seqlens: Tensor | None
) -> None:
    """Check a call of dynamic_convolve_heads."""
    check_taps(x, weight, cu_seqlens)
    if group < 3:
        raise ValueError(f"group: expected at least 3 heads, of a query, a key and a value, got {group}")
    if head_dim < 1 or x.shape[2] % (group * head_dim):
        expected = f"one by whose product with group = {group} D = {x.shape[2]} can be divided"
        raise ValueError(f"head_dim: expected {expected}, got {head_dim}")
    _check_features(x, features, weight, up)


def _check_features(x: Tensor, features: Tensor, weight: Tensor, up: Tensor) -> None:
    _check_tensor("up", up, x, like="x")
    if up.ndim != 3 or up.shape[:2] != weight.shape or up.shape[2] < 1:
        expected = f"[D, W, R] with D, W = {_show(weight.shape)} and R at least 1"
        raise ValueError(f"up: expected shape {expected}, got {_show(up.shape)}")
    _check_tensor("features", features, x, like="x", dtypes=(x.dtype,))
    _check_shape("features", features, "[B, T, 3 R]", (*x.shape[:2], 3 * up.shape[2]))


def check_gated_norm(x: Tensor, gate: Tensor | None, weight: Tensor, *, eps: float, activation: str) -> None:
    """Check a call of gated_head_norm."""
    _check_first("x", x, "[B, T, H, V]")
    if gate is not None:
        _check_tensor("gate", gate, x, like="x")
        _check_shape("gate", gate, "[B, T, H, V]", tuple(x.shape))
    _check_tensor("weight", weight, x, like="x")
    _check_shape("weight", weight, "[V]", (x.shape[3],))
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if (gate is None) != (activation == "none"):
        given = "no gate" if gate is None else "a gate"
        raise ValueError(f"activation: expected 'none' without a gate and only then, got {activation!r} with {given}")


def check_in_place(state: Tensor | CarveState | None, *, by_row: bool = False) -> None:
    """Check the initial state of a call that updates it; by_row: it may be apart from row to row."""
    if state is None:
        raise ValueError("initial_state: expected one to update with inplace_state=True, got None")
    parts = {"": state} if isinstance(state, Tensor) else {f".{name}": x for name, x in state._asdict().items()}
    for name, part in parts.items():
        if not (part[:1] if by_row else part).is_contiguous():
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
    name: str, tensor: object, q: Tensor, dtypes: Sequence[torch.dtype] | None = None, *, like: str = "q"
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
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {letters} = {_show(expected)}, got {_show(tensor.shape)}")


def _check_one_of(
    name: str,
    tensor: object,
    q: Tensor,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """As _check_tensor and _check_shape, of a tensor that may have any of several shapes, by their letters."""
    _check_tensor(name, tensor, q, dtypes)
    assert isinstance(tensor, Tensor)
    if tensor.shape not in shapes.values():
        expected = " or ".join(f"{letters} = {_show(shape)}" for letters, shape in shapes.items())
        raise ValueError(f"{name}: expected shape {expected}, got {_show(tensor.shape)}")


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


def _check_state(name: str, state: object, letters: str, shape: tuple[int, ...], q: Tensor) -> None:
    """Check one float part of a state, or a parameter, held in the dtype that the op computes in."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _check_one_of(name, state, q, {letters: shape}, dtypes=(dtype,))


def _state_shape(call: OpCall, rows: int) -> tuple[int, int, int, int]:
    return rows, call.v.shape[2], call.q.shape[3], call.v.shape[3]


def _check_carve_state(state: object, rows: int, call: OpCall) -> None:
    if not isinstance(state, CarveState):
        raise ValueError(f"initial_state: expected a CarveState, got {type(state).__name__}")
    shape = _state_shape(call, rows)
    vector = (*shape[:2], shape[3])
    _check_state("initial_state.S", state.S, "[N, HV, K, V]", shape, call.q)
    _check_state("initial_state.mean", state.mean, "[N, HV, V]", vector, call.q)
    _check_state("initial_state.partial", state.partial, "[N, HV, V]", vector, call.q)
    _check_tensor("initial_state.count", state.count, call.q, dtypes=(torch.int64,))
    _check_shape("initial_state.count", state.count, "[N]", (call.sequences,))


def _show(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_name(dtype) for dtype in dtypes)
