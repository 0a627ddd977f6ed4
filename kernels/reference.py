"""The chunk ops in plain torch: any device, any floating dtype, differentiable.

Both ops advance the state one chunk of CHUNK_TOKENS at a time with the same function, so that CARVE without a content
term and GDN-2 agree in every bit. What depends neither on the erase gate nor on the state is formed for all chunks at
once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import CHUNK_TOKENS, read_counts, read_cu_seqlens
from .gates import erase_gate
from .layout import Grid, make_grid
from .scores import HalvingStep, halving_steps, strict_scores
from .state import CarveState

# exp is exactly 0 in float64 from -746 on, so this changes no value; it keeps cumulative sums accurate and finite.
STEEPEST_LOG_DECAY = -1000.0


def chunk_gdn2(
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
) -> tuple[Tensor, Tensor | None]:
    """The torch backend of the public chunk_gdn2, after its checks."""
    boundaries = None if cu_seqlens is None else read_cu_seqlens(cu_seqlens, q.shape[1])
    grid = make_grid(q, boundaries=boundaries, offsets=None, multiple=CHUNK_TOKENS)
    with torch.autocast(q.device.type, enabled=False):
        chunks = _prepare_chunks(grid, q, k, g, v.shape[2], scale)
        gates = _to_chunks(grid, share_heads(computed(b), v.shape[2])).unbind()
        writes = _to_chunks(grid, written_values(v, w)).unbind()
        S = initial_state if initial_state is not None else zero_state(grid.rows, q, v)
        outputs = []
        for terms, b_chunk, z in zip(chunks, gates, writes, strict=True):
            o, S = _advance(terms, b_chunk, z, S)
            outputs.append(o)
        return _from_chunks(grid, outputs).to(v.dtype), S if output_final_state else None


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
    content_chunk: int,
    content_grad: str,
    erase_scale: float,
    scale: float,
    initial_state: CarveState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, CarveState | None]:
    """The torch backend of the public chunk_carve, after its checks."""
    boundaries = None if cu_seqlens is None else read_cu_seqlens(cu_seqlens, q.shape[1])
    counts = None if initial_state is None else read_counts(initial_state.count, content_chunk)
    # columns that every row has behind it already are left out of the grid
    skipped = min(counts) // CHUNK_TOKENS * CHUNK_TOKENS if counts else 0
    offsets = [count - skipped for count in counts] if counts else None
    grid = make_grid(q, boundaries=boundaries, offsets=offsets, multiple=CHUNK_TOKENS)
    ends = torch.tensor(grid.ends, device=q.device) + skipped
    with torch.autocast(q.device.type, enabled=False):
        chunks = _prepare_chunks(grid, q, k, g, v.shape[2], scale)
        logits = _to_chunks(grid, share_heads(computed(erase_logits), v.shape[2])).unbind()
        plain_gates = _to_chunks(grid, share_heads(plain_gate(erase_logits), v.shape[2])).unbind()
        writes = _to_chunks(grid, written_values(v, w)).unbind()
        down, up = computed(content_down), computed(content_up)
        S, mean, partial = carve_state_floats(initial_state, grid.rows, q, v)
        outputs = []
        for index, (terms, logit, plain, z) in enumerate(zip(chunks, logits, plain_gates, writes, strict=True)):
            position = skipped + index * CHUNK_TOKENS
            if index == 0 or position % content_chunk == 0:
                seen = mean.detach() if content_grad == "detached" else mean
                content = content_term(seen, down, up).unsqueeze(-2)
            b = erase_scale * erase_gate(logit, plain, content)
            o, S = _advance(terms, b, z, S)
            outputs.append(o)
            partial = partial + o.sum(-2)
            position += CHUNK_TOKENS
            if position % content_chunk == 0:
                mean, partial = finish_content_chunk(ends >= position, mean, partial, content_chunk)
        o = _from_chunks(grid, outputs).to(v.dtype)
    if not output_final_state:
        return o, None
    return o, CarveState(S, mean.clone(), partial, ends % content_chunk)


class _ChunkTerms(NamedTuple):
    """What one chunk needs besides its erase gate, its written values and the state; [N, HV, 64, K] unless noted.

    q holds the output scale. The decays of k_from_start and q_from_start run from the chunk's start to the token,
    that of k_to_end from the token to the chunk's end.
    """

    k: Tensor
    log_decay: Tensor
    k_from_start: Tensor
    q_from_start: Tensor
    k_to_end: Tensor
    decay: Tensor  # of the whole chunk, [N, HV, K, 1]
    q_scores: Tensor  # P, [N, HV, 64, 64]
    steps: list[HalvingStep]


def _prepare_chunks(grid: Grid, q: Tensor, k: Tensor, g: Tensor, value_heads: int, scale: float) -> list[_ChunkTerms]:
    """Form the terms of every chunk at once, then part them; unbind, whose backward is one stack."""
    q, k = (_to_chunks(grid, share_heads(computed(x), value_heads)) for x in (q, k))
    q = q * scale
    g = _to_chunks(grid, share_heads(g.double(), value_heads))
    cumulative = g.clamp(min=STEEPEST_LOG_DECAY).cumsum(-2)
    total = cumulative[..., -1:, :]
    log_decay = cumulative.to(q.dtype)
    from_start = log_decay.exp()
    to_end = (total - cumulative).to(q.dtype).exp()
    steps = halving_steps(cumulative.detach(), k.detach())
    q_scores = strict_scores(q, k, log_decay, steps) + torch.diag_embed((q * k).sum(-1))
    decay = from_start[..., -1, :].unsqueeze(-1)
    terms = (k, log_decay, k * from_start, q * from_start, k * to_end, decay, q_scores)
    columns: list[Sequence[Any]] = [term.unbind() for term in terms]
    columns.append([[step.chunk(index) for step in steps] for index in range(k.shape[0])])
    return [_ChunkTerms(*parts) for parts in zip(*columns, strict=True)]


def _advance(terms: _ChunkTerms, b: Tensor, z: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Take the state through one chunk; b [N, HV, 64, K], z = w * v [N, HV, 64, V], S [N, HV, K, V] -> (o, S)."""
    erased_scores = strict_scores(b * terms.k, terms.k, terms.log_decay, terms.steps)
    target = z - (b * terms.k_from_start) @ S
    residual = torch.linalg.solve_triangular(erased_scores, target, upper=False, unitriangular=True)
    o = terms.q_from_start @ S + terms.q_scores @ residual
    return o, terms.decay * S + terms.k_to_end.mT @ residual


def _to_chunks(grid: Grid, x: Tensor) -> Tensor:
    """[B, T, HV, D] -> contiguous [chunks, N, HV, 64, D]; chunks first, so that one chunk is contiguous too."""
    return grid.place(x).unflatten(1, (-1, CHUNK_TOKENS)).permute(1, 0, 3, 2, 4).contiguous()


def _from_chunks(grid: Grid, outputs: list[Tensor]) -> Tensor:
    """List of [N, HV, 64, V] -> [B, T, HV, V]."""
    return grid.take(torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2))


def computed(x: Tensor) -> Tensor:
    """x in the dtype to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def share_heads(x: Tensor, value_heads: int) -> Tensor:
    """Give every value head the key-side tensor of its group, [B, T, H, K] -> [B, T, HV, K]."""
    group = value_heads // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, dim=2)


def written_values(v: Tensor, w: Tensor) -> Tensor:
    """w * v in the dtype to compute in, for either form of w."""
    return computed(w if w.ndim == 4 else w.unsqueeze(-1)) * computed(v)


def zero_state(rows: int, q: Tensor, v: Tensor) -> Tensor:
    """A recurrent state of zeros, [rows, HV, K, V], for a call with these q and v."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, v.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=q.device)


def carve_state_floats(state: CarveState | None, rows: int, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, mean and partial to start from."""
    if state is not None:
        return state.S, state.mean, state.partial
    S = zero_state(rows, q, v)
    return S, torch.zeros_like(S[:, :, 0]), torch.zeros_like(S[:, :, 0])


def plain_gate(erase_logits: Tensor) -> Tensor:
    """The erase gate without content, in the caller's layout and without gradient (see erase_gate)."""
    return torch.sigmoid(computed(erase_logits.detach()))


def content_term(mean: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """U D m, what a content chunk's mean output adds to the erase logits: [N, HV, V] -> [N, HV, K]."""
    return torch.einsum("hkr,nhr->nhk", up, torch.einsum("hrv,nhv->nhr", down, mean))


def finish_content_chunk(full: Tensor, mean: Tensor, partial: Tensor, content_chunk: int) -> tuple[Tensor, Tensor]:
    """Where a row has filled its content chunk (full, [N]), turn the sum into the mean and start a new sum."""
    full = full[:, None, None]
    return torch.where(full, partial / content_chunk, mean), torch.where(full, 0.0, partial)
