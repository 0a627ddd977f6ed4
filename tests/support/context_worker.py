"""One process of a context-parallel group: mixers over the group against the same mixers alone. Run under torchrun."""

import json
import os
import sys
from itertools import accumulate

import torch
import torch.distributed as dist

# Divided one by one their lengths are multiples of 2 * size; divided as one sequence they may be odd.
DOCUMENTS = {"document": (8, 72, 16, 8, 24), "sequence": (7, 73, 17, 0, 31)}
TOKENS = 128
HIDDEN = 32


def main(job: dict) -> None:
    from megatron_carve import patches

    patches.cpu_mode.apply()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.models import config

    from megatron_carve import state_passing
    from megatron_carve.specs import mixer_layer_spec

    state_passing.PROGRAMS_IN_TURN = 2  # several turns
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    solo = [dist.new_group([i]) for i in range(size)][rank]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = mixer_layer_spec(job["kind"], "local", options=job["options"]).submodules.self_attention
    mixers = []
    for cp_group in (groups.cp, solo):
        model_parallel_cuda_manual_seed(7)
        groups.cp = cp_group
        settings = config(linear_num_key_heads=job["key_heads"], linear_num_value_heads=2 * job["key_heads"])
        settings.mixer_packed_order, settings.mixer_context = job["order"], job["method"]
        mixers.append(spec.module(settings, spec.submodules, 1, pg_collection=groups, **spec.params))
    ours, alone = mixers
    with torch.no_grad():
        for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
            theirs.add_(0.1 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(theirs.numel())))
            mine.copy_(theirs)

    generator = torch.Generator().manual_seed(1)
    batch = 1 if job["packed"] else 2
    hidden, weights = (torch.randn(TOKENS, batch, HIDDEN, generator=generator) for _ in range(2))
    mine = places(rank, size, DOCUMENTS["document"] if job["packed"] and job["order"] == "document" else (TOKENS,))
    expected = step(alone, hidden, weights, packed(job))
    found = step(ours, hidden[mine], weights[mine], packed(job))
    for name, x in found.items():
        truth = expected[name][mine] if name in ("out", "d_hidden") else expected[name]
        if name not in ("out", "d_hidden"):
            dist.all_reduce(x)
        error = ((x - truth).norm() / truth.norm()).item()
        assert truth.norm() > 0, f"{name} is zero, so comparing it shows nothing"
        assert error < 2e-5, f"{name}: relative error {error:.1e}"
    dist.barrier()
    dist.destroy_process_group()


def places(rank: int, size: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """The tokens of a rank: of every document its piece from the front, then its piece from the back."""
    parts = []
    for start, length in zip([0, *accumulate(lengths)], lengths, strict=False):
        pieces = torch.arange(start, start + length).chunk(2 * size)
        parts += [pieces[rank], pieces[-1 - rank]]
    return torch.cat(parts)


def packed(job: dict):
    from megatron.core.packed_seq_params import PackedSeqParams

    if not job["packed"]:
        return None
    ends = torch.tensor([0, *accumulate(DOCUMENTS[job["order"]])], dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def step(mixer, hidden, weights, packed_seq_params) -> dict[str, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    out, _ = mixer(hidden, packed_seq_params=packed_seq_params)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    d_hidden, *gradients = torch.autograd.grad((out * weights).sum(), [hidden, *parameters])
    return {"out": out.detach(), "d_hidden": d_hidden} | dict(zip(names, gradients, strict=True))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(json.loads(sys.argv[1]))
