"""Decayed scores inside a chunk: sum_k x_rk exp(X_rk - G_sk) k_sk for s < r, for any decay.

G is the sum of log-decays from the chunk's start through a row; X is G for the rows of queries, and for those of keys
that predict G or the sum up to the row before. A chunk is halved again and again. At each step the rows of a lower half
meet the columns of the upper half before it in one matrix product, with exp(X_r - G_s) split as exp(X_r - G_a)
exp(G_a - G_s) at a, the upper half's last row. G only falls, so both exponents are <= 0: nothing overflows, and a
factor underflows only where the product does. a < r, so row r reads nothing of its future, not even through rounding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HalvingStep(NamedTuple):
    """The decays of one step; pairs = chunk / (2 * half) lower and upper halves, [..., pairs, half, K] each.

    Attributes:
        half: rows in a half.
        row_decay: exp(X_r - G_a) for the lower halves' rows.
        col_decay: exp(G_a - G_s) for the upper halves' columns.
        decayed_k: col_decay * k.
    """

    half: int
    row_decay: Tensor
    col_decay: Tensor
    decayed_k: Tensor

    def chunk(self, index: int) -> "HalvingStep":
        """The step of one chunk, where the first axis counts chunks."""
        return HalvingStep(self.half, self.row_decay[index], self.col_decay[index], self.decayed_k[index])


@torch.no_grad()
def halving_steps(rows: Tensor, columns: Tensor, k: Tensor) -> list[HalvingStep]:
    """Form the decays of every step; gradients come from strict_scores, not from here.

    Args:
        rows, columns: X and G, [..., chunk, K], float64, because the difference of two large sums may be small.
        k: keys, [..., chunk, K], in the dtype to compute in.
    """
    steps = []
    half = k.shape[-2] // 2
    while half:
        upper, lower = _halves(columns, half)[0], _halves(rows, half)[1]
        anchor = upper[..., -1:, :]
        row_decay = (lower - anchor).to(k.dtype).exp_()
        col_decay = (anchor - upper).to(k.dtype).exp_()
        steps.append(HalvingStep(half, row_decay, col_decay, _halves(k, half)[0] * col_decay))
        half //= 2
    return steps


def strict_scores(x: Tensor, k: Tensor, rows: Tensor, columns: Tensor, steps: list[HalvingStep]) -> Tensor:
    """Scores of the rows x against all earlier keys of their chunk, zero on and above the diagonal.

    Args:
        x: rows, [..., chunk, K]: queries, or keys times what erases them.
        k: keys, [..., chunk, K].
        rows, columns: X and G in the dtype of k; only their gradients are used, the values are in `steps`.
        steps: halving_steps of the same X, G and k.

    Returns:
        [..., chunk, chunk], differentiable (once) in x, k, rows and columns.
    """
    return _StrictScores.apply(x, k, rows, columns, steps)


class _StrictScores(torch.autograd.Function):
    """strict_scores with its closed-form gradient, which needs no intermediate beyond the steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, rows: Tensor, columns: Tensor, steps: list[HalvingStep]) -> Tensor:
        ctx.save_for_backward(x, k)
        ctx.steps = steps
        scores = x.new_zeros(*x.shape[:-1], x.shape[-2])
        for step in steps:
            decayed = _halves(x, step.half)[1] * step.row_decay
            _cross_blocks(scores, step.half).copy_(decayed @ step.decayed_k.mT)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, k = ctx.saved_tensors
        dx, dk = torch.zeros_like(x), torch.zeros_like(k)
        for step in ctx.steps:
            d_block = _cross_blocks(d_scores, step.half).contiguous()
            decayed = _halves(x, step.half)[1] * step.row_decay
            _halves(dx, step.half)[1].addcmul_(_product(d_block, step.decayed_k), step.row_decay)
            _halves(dk, step.half)[0].addcmul_(_product(d_block.mT, decayed), step.col_decay)
        return dx, dk, x * dx, -k * dk, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; as outer products where the inner axis is tiny, which batched matmul on a CPU is slow at."""
    if a.shape[-1] > 2:
        return a @ b
    product = a[..., :1] * b[..., :1, :]
    return product if a.shape[-1] == 1 else product.addcmul_(a[..., 1:], b[..., 1:, :])


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower halves, [..., chunk, K] -> two views [..., pairs, half, K]."""
    upper, lower = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return upper, lower


def _cross_blocks(scores: Tensor, half: int) -> Tensor:
    """The blocks where a lower half meets its upper half, as a view [..., pairs, half, half]."""
    blocks = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    crossing = blocks.select(-2, 0).select(-4, 1)
    return crossing.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
