"""The truth: both recurrences token by token in float64, one sequence at a time, straight from their equations."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class OracleState(NamedTuple):
    S: Tensor  # [N, HV, K, V]
    mean: Tensor  # [N, HV, V]
    partial: Tensor  # [N, HV, V]
    count: list[int]  # type: ignore[assignment]  # hides tuple.count


def oracle_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GDN-2; arguments as those of chunk_gdn2, results o [B, T, HV, V] and S [N, HV, K, V] in float64."""
    if w.ndim == 3:
        w = w[..., None].expand_as(v)
    outputs, states = [], []
    for n, (row, start, end) in enumerate(_sequences(q, cu_seqlens)):
        qs, ks, vs, gs, bs, ws = (_sequence(x, row, start, end, v.shape[2]) for x in (q, k, v, g, b, w))
        S = _zeros(q, v) if initial_state is None else initial_state[n].double()
        o = []
        for t in range(end - start):
            o_t, S = _token(qs[t], ks[t], vs[t], gs[t], bs[t], ws[t], S, scale)
            o.append(o_t)
        outputs.append(_stack(o, v))
        states.append(S)
    return torch.cat(outputs).reshape(v.shape), torch.stack(states)


def oracle_carve(
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
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, OracleState]:
    """CARVE; arguments as those of chunk_carve, results o [B, T, HV, V] and the final state in float64."""
    D, U = content_down.double(), content_up.double()
    outputs: list[Tensor] = []
    states: list[tuple[Any, ...]] = []
    for n, (row, start, end) in enumerate(_sequences(q, cu_seqlens)):
        qs, ks, vs, gs, ls, ws = (_sequence(x, row, start, end, v.shape[2]) for x in (q, k, v, g, erase_logits, w))
        if initial_state is None:
            S, mean, partial, count = _zeros(q, v), _zeros(q, v)[:, 0], _zeros(q, v)[:, 0], 0
        else:
            S, mean, partial = (part[n].double() for part in initial_state[:3])
            count = int(initial_state[3][n])
        o = []
        for t in range(end - start):
            m = mean.detach() if content_grad == "detached" else mean
            U_D_m = torch.stack([U[head] @ (D[head] @ m[head]) for head in range(v.shape[2])])
            b = erase_scale * torch.sigmoid(ls[t] + U_D_m)
            o_t, S = _token(qs[t], ks[t], vs[t], gs[t], b, ws[t][:, None], S, scale)
            o.append(o_t)
            partial, count = partial + o_t, count + 1
            if count == content_chunk:
                mean, partial, count = partial / content_chunk, torch.zeros_like(partial), 0
        outputs.append(_stack(o, v))
        states.append((S, mean, partial, count))
    S, mean, partial = (torch.stack([state[part] for state in states]) for part in range(3))
    return torch.cat(outputs).reshape(v.shape), OracleState(S, mean, partial, [state[3] for state in states])


def _token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """S' = (I - k (b * k)^T) Diag(exp g) S + k (w * v)^T, o = scale * S'^T q, for all heads of one token."""
    K = q.shape[-1]
    eye = torch.eye(K, dtype=torch.float64, device=q.device)
    erase = eye - torch.einsum("hi,hj->hij", k, b * k)
    S = erase @ (g.exp()[:, :, None] * S) + torch.einsum("hk,hv->hkv", k, w * v)
    return (K**-0.5 if scale is None else scale) * torch.einsum("hkv,hk->hv", S, q), S


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """(batch entry, first token, token after the last) of every sequence."""
    if cu_seqlens is None:
        return [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    ends = cu_seqlens.tolist()
    return [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]


def _sequence(x: Tensor, row: int, start: int, end: int, value_heads: int) -> Tensor:
    """One sequence in float64 with a head per value head, [T_n, HV, ...]."""
    heads = [j // (value_heads // x.shape[2]) for j in range(value_heads)]
    return x[row, start:end, heads].double()


def _zeros(q: Tensor, v: Tensor) -> Tensor:
    return torch.zeros(v.shape[2], q.shape[3], v.shape[3], dtype=torch.float64, device=q.device)


def _stack(outputs: list[Tensor], v: Tensor) -> Tensor:
    empty = torch.zeros(0, *v.shape[2:], dtype=torch.float64, device=v.device)
    return torch.stack(outputs) if outputs else empty
