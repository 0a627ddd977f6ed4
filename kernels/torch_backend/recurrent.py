"""The recurrence token by token in plain torch, for decoding; records no gradient."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import OpCall
from ..checks import read_counts, read_cu_seqlens
from ..state import CarveState
from .gates import erase_gate, erase_logits, plain_decay, plain_erase_gate
from .layout import Grid, make_grid
from .reference import (
    carve_state_floats,
    computed,
    content_maps,
    content_term,
    finish_content_chunk,
    share_heads,
    write_gate,
    zero_state,
)


@torch.no_grad()
def recurrent_op(call: OpCall) -> tuple[Tensor, Any]:
    """The torch backend of the public recurrent ops, after their checks."""
    with torch.autocast(call.q.device.type, enabled=False):
        if call.state_rows is not None:
            return _on_rows(call, call.state_rows)
        return _recurrent_gdn2(call) if call.op == "gdn2" else _recurrent_carve(call)


def _on_rows(call: OpCall, rows: Tensor) -> tuple[Tensor, Any]:
    """A call with state_rows, on copies of them. Padding writes what the first sequence writes."""
    source = torch.arange(rows.shape[0], device=rows.device).masked_fill(rows < 0, 0)
    state: Any = call.initial_state
    read, theirs = (lambda x: x[rows[source]]), replace(call, state_rows=None, inplace_state=False)
    if call.op == "gdn2":
        o, S = _recurrent_gdn2(replace(theirs, initial_state=read(state), output_final_state=True))
        pairs: list[tuple[Tensor, Any]] = [(state, S)]
    else:
        before = CarveState(read(state.S), read(state.mean), read(state.partial), state.count)
        o, after = _recurrent_carve(replace(theirs, initial_state=before, output_final_state=True))
        assert after is not None
        pairs = list(zip(state[:3], after[:3], strict=True))
        state.count.copy_(after.count)
    for kept, new in pairs:
        kept.index_copy_(0, rows[source], new[source])
    return o.masked_fill((rows < 0)[:, None, None, None], 0.0), state


def _recurrent_gdn2(call: OpCall) -> tuple[Tensor, Tensor | None]:
    grid = _token_grid(call)
    gates = _by_token(grid, plain_erase_gate(call), call.v.shape[2])
    S = call.initial_state if isinstance(call.initial_state, Tensor) else zero_state(grid.rows, call)
    outputs = []
    for b, (q, k, z, g) in zip(gates, _recurrence_inputs(grid, call), strict=True):
        y, S = _step(q, k, z, g.exp(), b, S, False)
        outputs.append(y)
    o = _outputs(grid, call, outputs)
    if call.inplace_state and isinstance(call.initial_state, Tensor):
        return o, call.initial_state.copy_(S)
    return o, S if call.output_final_state else None


def _recurrent_carve(call: OpCall) -> tuple[Tensor, CarveState | None]:
    grid, state = _token_grid(call), call.initial_state
    lengths = torch.tensor(grid.ends, device=call.q.device)
    count = torch.zeros_like(lengths)
    if isinstance(state, CarveState):
        read_counts(state.count, call.content_chunk)
        count = state.count
    heads, logits = call.v.shape[2], erase_logits(call)
    writes = _by_token(grid, write_gate(call), heads)
    gates = zip(_by_token(grid, logits, heads), _by_token(grid, torch.sigmoid(logits), heads), writes, strict=True)
    S, mean, partial = carve_state_floats(call, grid.rows)
    maps, outputs = content_maps(call), []
    for index, ((logit, plain, w), (q, k, z, g)) in enumerate(zip(gates, _recurrence_inputs(grid, call), strict=True)):
        content = content_term(*maps, mean) if maps else torch.zeros_like(logit)
        is_token = index < lengths
        if call.erases_by_decay:
            log_kept = torch.where(is_token[:, None, None], F.logsigmoid(-(logit + content)), 0.0)
            y, S = _step(q, k, z, (g + log_kept).exp(), w, S, call.predicts_before_decay)
        else:
            y, S = _step(q, k, z, g.exp(), call.erase_scale * erase_gate(logit, plain, content), S, False)
        outputs.append(y)
        count = count + is_token
        full = count == call.content_chunk
        if call.has_content:
            mean, partial = finish_content_chunk(full, mean, partial + y, call.content_chunk)
        count = count.masked_fill(full, 0)
    o = _outputs(grid, call, outputs)
    final_state = CarveState(S, mean, partial, count)
    if call.inplace_state and isinstance(state, CarveState):
        return o, CarveState(*(old.copy_(new) for old, new in zip(state, final_state, strict=True)))
    return o, final_state if call.output_final_state else None


def _step(
    q: Tensor, k: Tensor, z: Tensor, decay: Tensor, b: Tensor, S: Tensor, before_decay: bool
) -> tuple[Tensor, Tensor]:
    """One token: q, k, decay [N, HV, K], what erases along the key b [N, HV, K or 1], z = w * v [N, HV, V],
    S [N, HV, K, V] -> (S^T q, S). before_decay: what the key finds in S is taken before the decay."""
    decayed = decay.unsqueeze(-1) * S
    residual = z - ((b * k).unsqueeze(-2) @ (S if before_decay else decayed)).squeeze(-2)
    S = decayed + k.unsqueeze(-1) * residual.unsqueeze(-2)
    return (q.unsqueeze(-2) @ S).squeeze(-2), S


def _token_grid(call: OpCall) -> Grid:
    """One row per sequence, each from column 0: alignment of content chunks does not matter here."""
    boundaries = None if call.cu_seqlens is None else read_cu_seqlens(call.cu_seqlens, call.q.shape[1])
    return make_grid(call.q, boundaries=boundaries, offsets=None, multiple=1)


def _by_token(grid: Grid, x: Tensor, value_heads: int) -> tuple[Tensor, ...]:
    """[B, T, H, K] -> T times [N, HV, K] in the dtype to compute in."""
    return grid.place(share_heads(computed(x), value_heads)).unbind(1)


def _recurrence_inputs(grid: Grid, call: OpCall) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per token: q, k, w * v and the log-decay, which is 0 where the grid is empty."""
    heads = call.v.shape[2]
    q, k, g = (_by_token(grid, x, heads) for x in (call.q, call.k, plain_decay(call)))
    z = grid.place(write_gate(call) * computed(call.v)).unbind(1)
    return list(zip(q, k, z, g, strict=True))


def _outputs(grid: Grid, call: OpCall, outputs: list[Tensor]) -> Tensor:
    """S_t^T q_t of all tokens, [N, HV, V] each -> o [B, T, HV, V]."""
    return (call.output_scale * grid.take(torch.stack(outputs, 1))).to(call.v.dtype)
