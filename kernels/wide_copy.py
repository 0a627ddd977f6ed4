"""Copies of tensors of 16- and 32-bit numbers, in units of up to 64 bits.

Where tensors are not contiguous, torch's kernels for copies and concatenations move one element at a time, which for 16
bits takes twice as long as memory needs. Rows that allow it are moved as if they held wider elements.
"""

from typing import Any

import torch
from torch import Tensor

UNITS = (torch.int64, torch.int32)


def contiguous(x: Tensor) -> Tensor:
    """x.contiguous(), differentiable."""
    return x if x.is_contiguous() else Contiguous.apply(x)


def moved(x: Tensor, source: int, destination: int) -> Tensor:
    """x.movedim(source, destination).contiguous(), whose gradient is moved back as wide; differentiable once.

    Neither of the axes is the last.
    """
    return Moved.apply(x, source, destination)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x.index_select(0, index) of a contiguous tensor; without gradients."""
    return x.view(widest_unit(x)).index_select(0, index).view(x.dtype)


def split_sections(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """x.split(sizes, -1), whose backward puts the gradients of all sections together at once; differentiable once.

    It moves them in the widest unit that all of them allow.
    """
    return SplitSections.apply(x, *sizes)


class Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(widest_unit(x)).contiguous().view(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return d_out


class Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: int, destination: int) -> Tensor:
        ctx.back = destination, source
        return contiguous(x.movedim(source, destination))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        return contiguous(d_out.movedim(*ctx.back)), None, None


class SplitSections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        return x.split(sizes, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_sections: Tensor) -> tuple[Tensor | None, ...]:
        unit = widest_unit(*d_sections)
        d_x = torch.cat([d.view(unit) for d in d_sections], -1).view(d_sections[0].dtype)
        return d_x, *(None for _ in d_sections)


def widest_unit(*tensors: Tensor) -> torch.dtype:
    """The widest dtype as which all tensors, of one dtype, can be seen along their last axis."""
    dtype = tensors[0].dtype
    for unit in UNITS:
        n = unit.itemsize // dtype.itemsize
        if n > 1 and all(_divides(n, x) for x in tensors):
            return unit
    return dtype


def _divides(n: int, x: Tensor) -> bool:
    *outer, last = x.stride()
    return last == 1 and all(number % n == 0 for number in (x.shape[-1], x.storage_offset(), *outer))
