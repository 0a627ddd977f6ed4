"""The recurrence token by token in plain torch, for decoding; records no gradient."""

import torch
from torch import Tensor

from .checks import read_counts, read_cu_seqlens
from .gates import erase_gate
from .layout import Grid, make_grid
from .reference import (
    carve_state_floats,
    computed,
    content_term,
    finish_content_chunk,
    plain_gate,
    share_heads,
    written_values,
    zero_state,
)
from .state import CarveState


@torch.no_grad()
def recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    inplace_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch backend of the public recurrent_gdn2, after its checks."""
    grid = _token_grid(q, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):
        gates = _by_token(grid, b, v.shape[2])
        tokens = _recurrence_inputs(grid, q, k, v, g, w, scale)
        S = initial_state if initial_state is not None else zero_state(grid.rows, q, v)
        outputs = []
        for b_t, token in zip(gates, tokens, strict=True):
            o, S = _step(*token, b_t, S)
            outputs.append(o)
        o = grid.take(torch.stack(outputs, 1)).to(v.dtype)
    if inplace_state and initial_state is not None:
        return o, initial_state.copy_(S)
    return o, S if output_final_state else None


@torch.no_grad()
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
    content_chunk: int,
    erase_scale: float,
    scale: float,
    initial_state: CarveState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    inplace_state: bool = False,
) -> tuple[Tensor, CarveState | None]:
    """The torch backend of the public recurrent_carve, after its checks."""
    grid = _token_grid(q, cu_seqlens)
    if initial_state is not None:
        read_counts(initial_state.count, content_chunk)
    lengths = torch.tensor(grid.ends, device=q.device)
    count = initial_state.count if initial_state is not None else torch.zeros_like(lengths)
    with torch.autocast(q.device.type, enabled=False):
        down, up = computed(content_down), computed(content_up)
        logits = _by_token(grid, erase_logits, v.shape[2])
        plain_gates = _by_token(grid, plain_gate(erase_logits), v.shape[2])
        tokens = _recurrence_inputs(grid, q, k, v, g, w, scale)
        S, mean, partial = carve_state_floats(initial_state, grid.rows, q, v)
        outputs = []
        for index, (logit, plain, token) in enumerate(zip(logits, plain_gates, tokens, strict=True)):
            b = erase_scale * erase_gate(logit, plain, content_term(mean, down, up))
            o, S = _step(*token, b, S)
            outputs.append(o)
            partial = partial + o
            count = count + (index < lengths)
            full = count == content_chunk
            mean, partial = finish_content_chunk(full, mean, partial, content_chunk)
            count = count.masked_fill(full, 0)
        o = grid.take(torch.stack(outputs, 1)).to(v.dtype)
    final_state = CarveState(S, mean, partial, count)
    if inplace_state and initial_state is not None:
        return o, CarveState(*(old.copy_(new) for old, new in zip(initial_state, final_state, strict=True)))
    return o, final_state if output_final_state else None


def _step(q: Tensor, k: Tensor, z: Tensor, decay: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token: q, k, decay, b [N, HV, K], z = w * v [N, HV, V], S [N, HV, K, V] -> (o, S)."""
    S = decay.unsqueeze(-1) * S
    residual = z - ((b * k).unsqueeze(-2) @ S).squeeze(-2)
    S = S + k.unsqueeze(-1) * residual.unsqueeze(-2)
    return (q.unsqueeze(-2) @ S).squeeze(-2), S


def _token_grid(q: Tensor, cu_seqlens: Tensor | None) -> Grid:
    """One row per sequence, each from column 0: alignment of content chunks does not matter here."""
    boundaries = None if cu_seqlens is None else read_cu_seqlens(cu_seqlens, q.shape[1])
    return make_grid(q, boundaries=boundaries, offsets=None, multiple=1)


def _by_token(grid: Grid, x: Tensor, value_heads: int) -> tuple[Tensor, ...]:
    """[B, T, H, K] -> T times [N, HV, K] in the dtype to compute in."""
    return grid.place(share_heads(computed(x), value_heads)).unbind(1)


def _recurrence_inputs(
    grid: Grid, q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, scale: float
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per token: scaled q, k, w * v and the decay exp(g)."""
    heads = v.shape[2]
    # 1 where the grid is empty, as g is 0 there
    decay = [g_t.exp() for g_t in _by_token(grid, g, heads)]
    queries = [q_t * scale for q_t in _by_token(grid, q, heads)]
    writes = grid.place(written_values(v, w)).unbind(1)
    return list(zip(queries, _by_token(grid, k, heads), writes, decay, strict=True))
