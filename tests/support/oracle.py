"""The truth: the recurrences token by token in float64, one sequence at a time, straight from their equations."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class OracleState(NamedTuple):
    S: Tensor  # [N, HV, K, V]
    mean: Tensor  # [N, HV, V]
    partial: Tensor  # [N, HV, V]
    count: list[int]  # type: ignore[assignment]  # hides tuple.count


def oracle_dynamic_convolution(
    x: Tensor, features: Tensor, weight: Tensor, up: Tensor, bias: Tensor | None, *, key_channels: int,
    key_head_dim: int, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v; arguments as those of dynamic_convolve_qkv."""
    x, features, weight, up = (part.double() for part in (x, features, weight, up))
    W, R = up.shape[1:]
    section = torch.arange(x.shape[2]).div(key_channels, rounding_mode="floor").clamp(max=2)
    rows = []
    for row, start, end in _sequences(x, cu_seqlens):
        for t in range(start, end):
            z = features[row, t].view(3, R)[section]
            y = x[row, t] + (0 if bias is None else bias.double())
            for i in range(min(W, t - start + 1)):
                y = y + (weight[:, W - 1 - i] + (up[:, W - 1 - i] * z).sum(-1)) * x[row, t - i]
            rows.append(y / (1 + torch.exp(-y)))
    out = torch.stack(rows).view(x.shape)
    q, k = (part.unflatten(-1, (-1, key_head_dim)) for part in out[..., : 2 * key_channels].chunk(2, -1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    return q.flatten(-2), k.flatten(-2), out[..., 2 * key_channels :]


def oracle_convolution_of_heads(
    x: Tensor, weight: Tensor, features: Tensor | None = None, up: Tensor | None = None, *, head_dim: int, group: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Arguments as those of convolve_heads, with features as those of dynamic_convolve_heads."""
    x, weight = x.double(), weight.double()
    W = weight.shape[1]
    section = (torch.arange(x.shape[2]).div(head_dim, rounding_mode="floor") % group - (group - 3)).clamp(min=0)
    rows = []
    for row, start, end in _sequences(x, cu_seqlens):
        for t in range(start, end):
            y = torch.zeros_like(x[row, t])
            for i in range(min(W, t - start + 1)):
                tap = weight[:, W - 1 - i]
                if features is not None and up is not None:
                    z = features[row, t].double().view(3, -1)[section]
                    tap = tap + (up[:, W - 1 - i].double() * z).sum(-1) + (i == 0)
                y = y + tap * x[row, t - i]
            rows.append(y)
    return torch.stack(rows).view(x.shape)


def oracle_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GDN-2; arguments as those of chunk_gdn2, results o [B, T, HV, V] and S [N, HV, K, V] in float64."""
    if w.ndim == 3:
        w = w[..., None].expand_as(v)
    if b.ndim == 3:
        b = b[..., None].expand_as(k)
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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase_logits: Tensor, w: Tensor, content_down: Tensor | None,
    content_up: Tensor | None, *, erase: str = "diagonal", prediction: str = "previous", content_chunk: int = 64,
    content_grad: str = "full", erase_bias: Tensor | None = None, erase_scale: float = 1.0, scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, OracleState]:  # fmt: skip
    """CARVE; arguments as those of chunk_carve, results o [B, T, HV, V] and the final state in float64."""
    heads, K = v.shape[2], q.shape[3]
    key_head = [head // (heads // q.shape[2]) for head in range(heads)]
    D, U = (None if x is None else x.double().expand(heads, *x.shape[-2:]) for x in (content_down, content_up))
    scale = K**-0.5 if scale is None else scale
    outputs: list[Tensor] = []
    states: list[tuple[Any, ...]] = []
    for n, (row, start, end) in enumerate(_sequences(q, cu_seqlens)):
        qs, ks, vs, gs, ls, ws = (_sequence(x, row, start, end, heads) for x in (q, k, v, g, erase_logits, w))
        S, mean, partial, count = _zeros(q, v), _zeros(q, v)[:, 0], _zeros(q, v)[:, 0], 0
        if initial_state is not None:
            S, count = initial_state[0][n].double(), int(initial_state[3][n])
            if content_down is not None:
                mean, partial = (part[n].double() for part in initial_state[1:3])
        o = []
        for t in range(end - start):
            logits = ls[t] if erase_bias is None else ls[t] + erase_bias[key_head].double()
            if D is not None and U is not None:
                m = mean.detach() if content_grad == "detached" else mean
                code = torch.tanh(torch.einsum("hrv,hv->hr", D, m))
                logits = logits + torch.einsum("hkr,hr->hk", U, code)
            token = (qs[t], ks[t], vs[t], gs[t], logits, ws[t][:, None], S)
            if erase == "delta":
                y, S = _delta_token(*token, erase_scale)
            else:
                y, S = _diagonal_token(*token, prediction)
            o.append(scale * y)
            count += 1
            if content_down is not None:
                partial = partial + y
                if count == content_chunk:
                    mean, partial = partial / content_chunk, torch.zeros_like(partial)
            count %= content_chunk
        outputs.append(_stack(o, v))
        states.append((S, mean, partial, count))
    S, mean, partial = (torch.stack([state[part] for state in states]) for part in range(3))
    return torch.cat(outputs).reshape(v.shape), OracleState(S, mean, partial, [state[3] for state in states])


def _diagonal_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, logits: Tensor, w: Tensor, S: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """S' = Diag(e^a) S + w k (v - P^T k)^T, a = g + log(1 - b), and S'^T q, for all heads of one token."""
    a = g + torch.nn.functional.logsigmoid(-logits)
    decayed = a.exp()[:, :, None] * S
    predicted = torch.einsum("hkv,hk->hv", S if prediction == "previous" else decayed, k)
    S = decayed + torch.einsum("hk,hv->hkv", k, w * (v - predicted))
    return torch.einsum("hkv,hk->hv", S, q), S


def _delta_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, logits: Tensor, w: Tensor, S: Tensor, erase_scale: float
) -> tuple[Tensor, Tensor]:
    """S' = (I - k (b * k)^T) Diag(exp g) S + w k v^T, and S'^T q, for all heads of one token."""
    return _token(q, k, v, g, erase_scale * torch.sigmoid(logits), w, S, 1.0)


def _token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """S' = (I - k (b * k)^T) Diag(exp g) S + k (w * v)^T, o = scale * S'^T q, for all heads of one token of GDN-2."""
    K, decayed = q.shape[-1], g.exp()[:, :, None] * S
    erased = torch.einsum("hkv,hk->hv", decayed, b * k)
    S = decayed + torch.einsum("hk,hv->hkv", k, w * v - erased)
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
