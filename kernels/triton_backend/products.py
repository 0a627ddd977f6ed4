"""Products of tiles, the triangular inverse, and tanh."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@functools.cache
def arithmetic_of(dtype: torch.dtype) -> dict[str, Any]:
    """For inputs of a dtype the dtype CT of the products' operands, and how float32 ones are multiplied."""
    if dtype == torch.bfloat16:
        return {"CT": tl.bfloat16, "PRECISION": "tf32"}
    # tf32 keeps as many bits as float16, and float32's range
    return {"CT": tl.float32, "PRECISION": "tf32" if dtype == torch.float16 else "tf32x3"}


@triton.jit
def matmul(a, b, CT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands in the dtype CT, float32 sums."""
    return tl.dot(a.to(CT), b.to(CT), input_precision=PRECISION)


@triton.jit
def unit_triangular_inverse(b_T, o_r, UPPER: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 for a strictly lower T, or a strictly upper one, [BT, BT] float32.

    Goes from the inverse of the diagonal blocks of 2^step rows to that of twice as many. This is block substitution:
    stable where a series in T, whose powers may be huge, is not. The inverse so far, A, is block-diagonal: the blocks
    that a step adds, of A T A, come from the same blocks of T alone.
    """
    b_A = -tl.where(pairs_of_halves(o_r, 0, UPPER), b_T, 0.0)
    b_A = tl.where(o_r[:, None] == o_r[None, :], 1.0, b_A)
    for step in tl.static_range(1, 6):
        b_step = matmul(b_A, matmul(b_T, b_A, CT, PRECISION), CT, PRECISION)
        b_A -= tl.where(pairs_of_halves(o_r, step, UPPER), b_step, 0.0)
    return b_A


@triton.jit
def pairs_of_halves(o_r, step, UPPER: tl.constexpr = False):
    """Where a row of a lower half of 2^step rows meets a column of the upper half before it, or UPPER the transpose."""
    half = o_r >> step
    lower, upper = (half[None, :], half[:, None]) if UPPER else (half[:, None], half[None, :])
    return ((lower & 1) == 1) & (lower - 1 == upper)


@triton.jit
def tanh(x):
    """tanh to float32 rounding, small arguments included."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    s = x * x
    small = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(s < 0.05, small, large)


@triton.jit
def content_code(b_down, b_mean):
    """tanh(D m) from D as [V, RP]."""
    return tanh(tl.sum(b_down * b_mean[:, None], 0))
