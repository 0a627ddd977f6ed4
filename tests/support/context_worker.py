"""One process of a context-parallel group: mixers over the group against the same mixers alone. Run under torchrun."""

import json
import os
import random
import sys
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

TOKENS = 160
HIDDEN = 32


def main(jobs: list[dict]) -> None:
    from megatron_carve import patches

    patches.cpu_mode.apply()
    from megatron.core import parallel_state

    from megatron_carve.model.context import state_passing

    state_passing.PROGRAMS_IN_TURN = 2  # several turns
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    solo = [dist.new_group([i]) for i in range(dist.get_world_size())][dist.get_rank()]
    for job in jobs:
        try:
            compare(job, solo)
        except Exception as error:
            raise AssertionError(f"{job}: {error}") from error
    dist.barrier()
    dist.destroy_process_group()


def compare(job: dict, solo) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.models import config
    from support.parallel import places

    from megatron_carve.specs import mixer_layer_spec

    size, rank = dist.get_world_size(), dist.get_rank()
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
    documents = (
        random_lengths(job["seed"], 2 * size if job["order"] == "document" else 1) if job["packed"] else [TOKENS]
    )
    divided = documents if job["order"] == "document" else [TOKENS]
    mine = places(rank, size, divided)
    expected = one_by_one(alone, hidden, weights, documents)
    found = step(ours, hidden[mine], weights[mine], packed(documents) if job["packed"] else None)
    for name, x in found.items():
        truth = expected[name][mine] if name in ("out", "d_hidden") else expected[name]
        if name not in ("out", "d_hidden"):
            dist.all_reduce(x)
        error = ((x - truth).norm() / truth.norm()).item()
        assert truth.norm() > 0, f"{name} is zero, so comparing it shows nothing"
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


def random_lengths(seed: int, multiple: int) -> list[int]:
    """Five lengths that add up to TOKENS; one is 0 where they need not be multiples."""
    draw, lengths = random.Random(seed), [0]
    while max(lengths) <= 80:  # long enough for a content chunk to be seen
        cuts = sorted(draw.sample(range(multiple, TOKENS, multiple), 4))
        if multiple == 1:
            cuts[1] = cuts[2]
        lengths = [end - start for start, end in pairwise([0, *cuts, TOKENS])]
    return lengths


def packed(lengths: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def one_by_one(mixer, hidden, weights, lengths: list[int]) -> dict[str, torch.Tensor]:
    """What step gives for every document alone: by token one after another, of parameters the sum."""
    parts = zip(hidden.split(lengths), weights.split(lengths), strict=True)
    found = [step(mixer, x, w, None) for x, w in parts if len(x)]
    return {
        name: torch.cat([f[name] for f in found]) if name in ("out", "d_hidden") else sum(f[name] for f in found)
        for name in found[0]
    }


def step(mixer, hidden, weights, packed_seq_params) -> dict[str, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    out, _ = mixer(hidden, packed_seq_params=packed_seq_params)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    d_hidden, *gradients = torch.autograd.grad((out * weights).sum(), [hidden, *parameters])
    return {"out": out.detach(), "d_hidden": d_hidden} | dict(zip(names, gradients, strict=True))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(json.loads(sys.argv[1]))
