"""The chunk ops in plain torch: any device, any floating dtype, differentiable.

All forms advance the state one chunk of CHUNK_TOKENS at a time with the same function. What depends neither on the
erase gate nor on the state is formed for all chunks at once; where the erase gate is part of the decay, for those of a
content chunk, whose gate is known together.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import OpCall
from ..checks import CHUNK_TOKENS, read_counts, read_cu_seqlens
from ..state import CarveState
from .gates import erase_gate, erase_logits, plain_decay, plain_erase_gate, plain_write_gate
from .layout import Grid, make_grid
from .scores import HalvingStep, halving_steps, strict_scores

# From there on exp is exactly 0, so stopping changes no value: cumulative sums stay accurate and finite, and the
# gradient of such a step, a sum that cancels to 0, is an exact 0.
STEEPEST_LOG_DECAY = {torch.float32: -110.0, torch.float64: -750.0}


def chunk_op(call: OpCall) -> tuple[Tensor, Any]:
    """The torch backend of the public chunk ops, after their checks."""
    with torch.autocast(call.q.device.type, enabled=False):
        return _chunk_gdn2(call) if call.op == "gdn2" else _chunk_carve(call)


def _chunk_gdn2(call: OpCall) -> tuple[Tensor, Tensor | None]:
    boundaries = None if call.cu_seqlens is None else read_cu_seqlens(call.cu_seqlens, call.q.shape[1])
    grid = make_grid(call.q, boundaries=boundaries, offsets=None, multiple=CHUNK_TOKENS)
    q, k, g, z = _recurrence_inputs(grid, call, write_gate(call))
    gates = _to_chunks(grid, share_heads(computed(plain_erase_gate(call)), call.v.shape[2])).unbind()
    S = call.initial_state if isinstance(call.initial_state, Tensor) else zero_state(grid.rows, call)
    outputs = []
    for terms, b, z_chunk in zip(_chunk_terms(q, k, g, False), gates, z.unbind(), strict=True):
        y, S = _advance(terms, b, z_chunk, S)
        outputs.append(y)
    return _outputs(grid, call, outputs), S if call.output_final_state else None


def _chunk_carve(call: OpCall) -> tuple[Tensor, CarveState | None]:
    content_chunk, state = call.content_chunk, call.initial_state
    boundaries = None if call.cu_seqlens is None else read_cu_seqlens(call.cu_seqlens, call.q.shape[1])
    counts = read_counts(state.count, content_chunk) if isinstance(state, CarveState) else None
    # columns that every row has behind it already are left out of the grid
    skipped = min(counts) // CHUNK_TOKENS * CHUNK_TOKENS if counts else 0
    offsets = [count - skipped for count in counts] if counts else None
    grid = make_grid(call.q, boundaries=boundaries, offsets=offsets, multiple=CHUNK_TOKENS)
    ends = torch.tensor(grid.ends, device=call.q.device) + skipped
    S, mean, partial = carve_state_floats(call, grid.rows)
    outputs = []
    chunks = _DiagonalChunks(call, grid) if call.erases_by_decay else _DeltaChunks(call, grid)
    maps = content_maps(call)
    for first, last in _content_chunks(grid, skipped, content_chunk):
        content = maps and content_term(*maps, mean.detach() if call.detached else mean).unsqueeze(-2)
        for terms, b, z in chunks.of(first, last, content):
            y, S = _advance(terms, b, z, S)
            outputs.append(y)
            if call.has_content:
                partial = partial + y.sum(-2)
        position = skipped + last * CHUNK_TOKENS
        if position % content_chunk == 0 and call.has_content:
            mean, partial = finish_content_chunk(ends >= position, mean, partial, content_chunk)
    o = _outputs(grid, call, outputs)
    return o, CarveState(S, mean.clone(), partial, ends % content_chunk) if call.output_final_state else None


def _content_chunks(grid: Grid, skipped: int, content_chunk: int) -> Iterator[tuple[int, int]]:
    """(first chunk, the one after the last) of every content chunk that the grid holds a part of."""
    chunks, first = grid.steps // CHUNK_TOKENS, 0
    while first < chunks:
        done = (skipped // CHUNK_TOKENS + first) % (content_chunk // CHUNK_TOKENS)
        last = min(first + content_chunk // CHUNK_TOKENS - done, chunks)
        yield first, last
        first = last


class _DeltaChunks:
    """Chunks of CARVE's delta form: the erase gate alone depends on the content."""

    def __init__(self, call: OpCall, grid: Grid) -> None:
        q, k, g, z = _recurrence_inputs(grid, call, write_gate(call))
        logits = erase_logits(call)
        self.terms, self.writes, self.scale = _chunk_terms(q, k, g, False), z.unbind(), call.erase_scale
        self.logits, self.plain = (
            _to_chunks(grid, share_heads(x, call.v.shape[2])).unbind()
            # the gate without content, in the caller's layout and without gradient (see erase_gate)
            for x in (logits, torch.sigmoid(logits.detach()))
        )

    def of(self, first: int, last: int, content: Tensor | None) -> Iterator[tuple["_ChunkTerms", Tensor, Tensor]]:
        """(terms, erase gate, written values) of a content chunk's chunks."""
        for i in range(first, last):
            term = torch.zeros_like(self.logits[i][..., :1, :]) if content is None else content
            yield self.terms[i], self.scale * erase_gate(self.logits[i], self.plain[i], term), self.writes[i]


class _DiagonalChunks:
    """Chunks of CARVE's diagonal form: decays depend on the content, and the write gate stands for the erase gate."""

    def __init__(self, call: OpCall, grid: Grid) -> None:
        w = write_gate(call)  # once for both uses: their gradients are then added up before they are rounded
        self.q, self.k, self.g, self.z = _recurrence_inputs(grid, call, w)
        self.w, self.logits, self.is_token = (
            _to_chunks(grid, share_heads(x, call.v.shape[2]))
            for x in (w, erase_logits(call).double(), torch.ones_like(w, dtype=torch.bool))
        )
        self.before_decay = call.predicts_before_decay

    def of(self, first: int, last: int, content: Tensor | None) -> Iterator[tuple["_ChunkTerms", Tensor, Tensor]]:
        """As _DeltaChunks.of."""
        part = slice(first, last)
        logits = self.logits[part] if content is None else self.logits[part] + content.double()
        # log(1 - sigmoid(x)), never by subtraction
        log_kept = torch.where(self.is_token[part], F.logsigmoid(-logits), 0.0)
        terms = _chunk_terms(self.q[part], self.k[part], self.g[part] + log_kept, self.before_decay)
        return zip(terms, self.w[part].unbind(), self.z[part].unbind(), strict=True)


class _ChunkTerms(NamedTuple):
    """What one chunk needs besides what erases, its written values and the state; [N, HV, 64, K] unless noted.

    The decays of erase_from_start and q_from_start run from the chunk's start to the token (erase_from_start's to the
    token before where the prediction is of the state before the decay), that of k_to_end from the token to the chunk's
    end.
    """

    k: Tensor
    erase_rows: Tensor  # log-decays of the rows that predict, in the dtype of k
    columns: Tensor  # log-decays of the keys, likewise
    erase_from_start: Tensor
    q_from_start: Tensor
    k_to_end: Tensor
    decay: Tensor  # of the whole chunk, [N, HV, K, 1]
    q_scores: Tensor  # P, [N, HV, 64, 64]
    erase_steps: list[HalvingStep]


def _chunk_terms(q: Tensor, k: Tensor, g: Tensor, before_decay: bool) -> list[_ChunkTerms]:
    """Form the terms of several chunks at once, [chunks, N, HV, 64, K] each, then part them; unbind, whose backward is
    one stack."""
    cumulative = g.clamp(min=STEEPEST_LOG_DECAY[q.dtype]).cumsum(-2)
    before = F.pad(cumulative[..., :-1, :], (0, 0, 1, 0))
    total = cumulative[..., -1:, :]
    log_decay = cumulative.to(q.dtype)
    from_start, to_end = log_decay.exp(), (total - cumulative).to(q.dtype).exp()
    q_steps = halving_steps(cumulative.detach(), cumulative.detach(), k.detach())
    q_scores = strict_scores(q, k, log_decay, log_decay, q_steps) + torch.diag_embed((q * k).sum(-1))
    erase_rows, erase_from_start, erase_steps = log_decay, from_start, q_steps
    if before_decay:
        erase_rows = before.to(q.dtype)
        erase_from_start = erase_rows.exp()
        erase_steps = halving_steps(before.detach(), cumulative.detach(), k.detach())
    decay = from_start[..., -1, :].unsqueeze(-1)
    terms = (
        k, erase_rows, log_decay, k * erase_from_start, q * from_start, k * to_end, decay, q_scores
    )  # fmt: skip
    columns: list[Sequence[Any]] = [term.unbind() for term in terms]
    columns.append([[step.chunk(index) for step in erase_steps] for index in range(k.shape[0])])
    return [_ChunkTerms(*parts) for parts in zip(*columns, strict=True)]


def _advance(terms: _ChunkTerms, b: Tensor, z: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Take the state through one chunk: b, what erases along the key, [N, HV, 64, K or 1], z = w * v [N, HV, 64, V],
    S [N, HV, K, V] -> (S_t^T q_t, S)."""
    erased_scores = strict_scores(b * terms.k, terms.k, terms.erase_rows, terms.columns, terms.erase_steps)
    target = z - (b * terms.erase_from_start) @ S
    residual = torch.linalg.solve_triangular(erased_scores, target, upper=False, unitriangular=True)
    y = terms.q_from_start @ S + terms.q_scores @ residual
    return y, terms.decay * S + terms.k_to_end.mT @ residual


def _recurrence_inputs(grid: Grid, call: OpCall, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, log-decay (float64) and w * v in chunks, [chunks, N, HV, 64, ...]."""
    heads = call.v.shape[2]
    q, k = (_to_chunks(grid, share_heads(computed(x), heads)) for x in (call.q, call.k))
    g = _to_chunks(grid, share_heads(plain_decay(call).double(), heads))
    return q, k, g, _to_chunks(grid, w * computed(call.v))


def _outputs(grid: Grid, call: OpCall, outputs: list[Tensor]) -> Tensor:
    """S_t^T q_t of all chunks, [N, HV, 64, V] each -> o [B, T, HV, V]."""
    y = grid.take(torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2))
    return (call.output_scale * y).to(call.v.dtype)


def _to_chunks(grid: Grid, x: Tensor) -> Tensor:
    """[B, T, HV, D] -> contiguous [chunks, N, HV, 64, D]; chunks first, so that one chunk is contiguous too."""
    return grid.place(x).unflatten(1, (-1, CHUNK_TOKENS)).permute(1, 0, 3, 2, 4).contiguous()


def computed(x: Tensor) -> Tensor:
    """x in the dtype to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def share_heads(x: Tensor, value_heads: int) -> Tensor:
    """Give every value head the key-side tensor of its group, [B, T, H, K] -> [B, T, HV, K]."""
    group = value_heads // x.shape[2]
    return x if group == 1 else x.repeat_interleave(group, dim=2)


def write_gate(call: OpCall) -> Tensor:
    """w in the dtype to compute in, [B, T, HV, V] or [B, T, HV, 1]."""
    w = computed(plain_write_gate(call))
    return w if w.ndim == 4 else w.unsqueeze(-1)


def zero_state(rows: int, call: OpCall) -> Tensor:
    """A recurrent state of zeros, [rows, HV, K, V]."""
    q, v = call.q, call.v
    return torch.zeros(rows, v.shape[2], q.shape[3], v.shape[3], dtype=call.state_dtype, device=q.device)


def carve_state_floats(call: OpCall, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """S, mean and partial to start from."""
    S = call.initial_state.S if isinstance(call.initial_state, CarveState) else zero_state(rows, call)
    if isinstance(call.initial_state, CarveState) and call.has_content:
        return S, call.initial_state.mean, call.initial_state.partial
    return S, torch.zeros_like(S[:, :, 0]), torch.zeros_like(S[:, :, 0])


def content_maps(call: OpCall) -> tuple[Tensor, Tensor] | None:
    """D [HV, R, V] and U [HV, K, R] in the dtype to compute in, or None without content."""
    if call.content_down is None or call.content_up is None:
        return None
    heads = call.v.shape[2]
    down, up = (computed(x).expand(heads, *x.shape[-2:]) for x in (call.content_down, call.content_up))
    return down, up


def content_term(down: Tensor, up: Tensor, mean: Tensor) -> Tensor:
    """U tanh(D m), what a content chunk adds to the erase logits of the next: [N, HV, V] -> [N, HV, K]."""
    return torch.einsum("hkr,nhr->nhk", up, torch.einsum("hrv,nhv->nhr", down, mean).tanh())


def finish_content_chunk(full: Tensor, mean: Tensor, partial: Tensor, content_chunk: int) -> tuple[Tensor, Tensor]:
    """Where a row has filled its content chunk (full, [N]), turn the sum into the mean and start a new sum."""
    full = full[:, None, None]
    return torch.where(full, partial / content_chunk, mean), torch.where(full, 0.0, partial)
