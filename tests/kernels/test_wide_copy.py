"""Copies in wider units give what torch's give, whatever the layout."""

import pytest
import torch
from support.dispatch import Copies
from support.interpreter import DEVICE

from megatron_carve.kernels.wide_copy import contiguous, moved, rows, split_sections, widest_unit

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[8, 16, 4], [8, 2, 6], [5, 1, 4]])
@pytest.mark.parametrize("swapped", [True, False])
def test_split_and_its_gradient(dtype: torch.dtype, sizes: list[int], swapped: bool) -> None:
    x = torch.randn(3, 2, sum(sizes), device=DEVICE).to(dtype).requires_grad_()
    found, plain = split_sections(x, sizes), x.split(sizes, -1)
    assert all(ours.equal(theirs) for ours, theirs in zip(found, plain, strict=True))
    d_sections = [torch.randn(2, 3, s, device=DEVICE).to(dtype).transpose(0, 1) for s in sizes]
    if not swapped:
        d_sections = [d.contiguous() for d in d_sections]
    (dx,) = torch.autograd.grad(found, x, d_sections)
    assert dx.equal(torch.autograd.grad(plain, x, d_sections)[0])


def test_a_section_without_a_gradient() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    first, _ = split_sections(x, [4, 4])
    (dx,) = torch.autograd.grad(first.sum(), x)
    assert dx.equal(torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.bfloat16).expand(3, 2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "first", "last"), [(12, 0, 8), (12, 4, 12), (12, 2, 8), (12, 1, 12), (13, 4, 12)])
def test_contiguous_and_its_gradient(dtype: torch.dtype, width: int, first: int, last: int) -> None:
    x = torch.randn(3, 2, width, device=DEVICE).to(dtype).requires_grad_()
    piece = x.transpose(0, 1)[..., first:last]
    out = contiguous(piece)
    assert out.is_contiguous()
    assert out.equal(piece)
    weight = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, weight, retain_graph=True)
    assert dx.equal(torch.autograd.grad(piece, x, weight)[0])
    assert contiguous(out) is out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 7])
def test_moved_and_its_gradient(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(2, 3, 4, width, device=DEVICE).to(dtype).requires_grad_()
    out, plain = moved(x, 0, 2), x.movedim(0, 2)
    assert out.is_contiguous()
    assert out.equal(plain)
    weight = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, weight)
    assert dx.is_contiguous()
    assert dx.equal(torch.autograd.grad(plain, x, weight)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 7])
def test_rows(dtype: torch.dtype, width: int) -> None:
    x, index = torch.randn(6, 2, width, device=DEVICE).to(dtype), torch.tensor([3, 0, 5, 5], device=DEVICE)
    assert rows(x, index).equal(x[index])


def test_units() -> None:
    x = torch.zeros(6, 4, 16, dtype=torch.bfloat16)
    assert widest_unit(x.transpose(0, 1)) == torch.int64
    assert widest_unit(x[..., 4:12], x) == torch.int64
    assert widest_unit(x[..., 2:12], x) == torch.int32
    assert widest_unit(x[..., 1:9], x) == torch.bfloat16
    assert widest_unit(x.expand(2, 6, 4, 16)[..., :1]) == torch.bfloat16
    assert widest_unit(x.transpose(1, 2)) == torch.bfloat16
    assert widest_unit(torch.zeros(6, 4, 17, dtype=torch.bfloat16)[..., 4:12]) == torch.bfloat16
    assert widest_unit(x.float()) == torch.int64
    assert widest_unit(x.double()) == torch.float64


def test_memory_is_moved_in_the_widest_unit() -> None:
    x = torch.randn(3, 2, 12, dtype=torch.bfloat16, requires_grad=True)
    with Copies() as copies:
        contiguous(x.transpose(0, 1))
    assert [x.dtype for x in copies.made] == [torch.int64]
    sections = split_sections(x, [8, 4])
    d_sections = [torch.randn(2, 3, s, dtype=torch.bfloat16).transpose(0, 1) for s in (8, 4)]
    with Copies() as copies:
        torch.autograd.grad(sections, x, d_sections)
    assert [x.dtype for x in copies.made] == [torch.int64]
