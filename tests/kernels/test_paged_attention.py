"""A token of every sequence against keys and values in blocks; in the interpreter where there is no GPU."""

import pytest
import torch
from support.interpreter import DEVICE
from support.tolerances import error

from megatron_carve.kernels.triton_backend.paged_attention import attend_to_blocks

BLOCK = 16


def expected(query, keys, values, blocks, positions, window):
    found = []
    for n, position in enumerate(positions.tolist()):
        p = torch.arange(0 if window is None else max(0, position + 1 - window), position + 1, device=DEVICE)
        places = blocks[n][p // BLOCK].long() * BLOCK + p % BLOCK
        shared = query.shape[1] // keys.shape[1]
        k, v = (x[places].double().repeat_interleave(shared, 1) for x in (keys, values))
        weights = (torch.einsum("hd,thd->ht", query[n].double(), k) * 0.3).softmax(1)
        found.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(found)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    ("heads", "groups", "D", "dtype"),
    [(2, 2, 32, torch.float32), (4, 2, 24, torch.float32), (2, 1, 128, torch.bfloat16)],
)
def test_attends_as_softmax_does(heads, groups, D, dtype, window):
    positions = torch.tensor([0, 15, 16, 200], dtype=torch.int32, device=DEVICE)
    blocks = torch.randperm(60, device=DEVICE)[: 4 * 13].view(4, 13).int()
    for n, position in enumerate(positions.tolist()):
        blocks[n, position // BLOCK + 1 :] = -1
    # of a memory of keys and values side by side, in which nothing else is a number
    memory = torch.full((60 * BLOCK, 2, groups, D), torch.nan, dtype=dtype, device=DEVICE)
    for n, position in enumerate(positions.tolist()):
        p = torch.arange(position + 1, device=DEVICE)
        memory[blocks[n][p // BLOCK].long() * BLOCK + p % BLOCK] = torch.randn(
            position + 1, 2, groups, D, device=DEVICE
        ).to(dtype)
    query = torch.randn(4, heads, D, device=DEVICE).to(dtype)
    keys, values = memory.unbind(1)
    out = attend_to_blocks(query, keys, values, blocks, positions, block_tokens=BLOCK, scale=0.3, window=window)
    assert out.dtype == dtype
    truth = expected(query, keys, values, blocks, positions, window)
    assert error(out, truth) < (2e-6 if dtype == torch.float32 else 2**-8)


def test_padding_disturbs_nobody():
    query, keys = torch.randn(2, 2, 32, device=DEVICE), torch.randn(32, 2, 32, device=DEVICE)
    blocks = torch.tensor([[1], [-1]], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([9, 0], dtype=torch.int32, device=DEVICE)
    options = {"block_tokens": BLOCK, "scale": 0.3, "window": None}
    both = attend_to_blocks(query, keys, keys, blocks, positions, **options)
    alone = attend_to_blocks(query[:1], keys, keys, blocks[:1], positions[:1], **options)
    assert torch.equal(both[:1], alone)
