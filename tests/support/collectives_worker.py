"""Count what one mixer layer sends in a forward and a backward. Run under torchrun; rank 0 writes the counts."""

import json
import os
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
}


class Count(TorchDispatchMode):
    """Calls and bytes of every kind of collective: of the tensor that this rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "c10d" and name != "recv_":
            given = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_") else args[0]
            for x in given if isinstance(given, list | tuple) else [given]:
                self.calls[NAMES[name]] += 1
                self.bytes[NAMES[name]] += x.nbytes
        return function(*args, **(kwargs or {}))

    def found(self) -> dict[str, list[int]]:
        return {name: [self.calls[name], self.bytes[name]] for name in sorted(self.calls)}


def main(job: dict) -> None:
    from megatron_carve import patches

    patches.cpu_mode.apply()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support.models import config

    from megatron_carve.specs import mixer_layer_spec

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tp"], context_parallel_size=job["cp"]
    )  # fmt: skip
    model_parallel_cuda_manual_seed(7)
    spec = mixer_layer_spec(job["kind"], "local", options=job["options"]).submodules.self_attention
    settings = config(
        hidden_size=job["hidden"], linear_num_key_heads=job["heads"], linear_num_value_heads=job["heads"],
        linear_key_head_dim=job["width"], linear_value_head_dim=job["width"],
        tensor_model_parallel_size=job["tp"], context_parallel_size=job["cp"], sequence_parallel=job["sp"],
    )  # fmt: skip
    settings.mixer_context = job["method"]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mixer = spec.module(settings, spec.submodules, 1, pg_collection=groups, **spec.params)
    x = torch.randn(job["tokens"] // job["cp"] // (job["tp"] if job["sp"] else 1), 1, job["hidden"], requires_grad=True)
    with Count() as forward:
        out, _ = mixer(x)
    with Count() as backward:
        out.sum().backward()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {"forward": forward.found(), "backward": backward.found()})
    if dist.get_rank() == 0:
        with open(job["out"], "w") as file:
            json.dump(everyone, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(json.loads(sys.argv[1]))
