"""megatron_carve.bench, which imports its libraries and then waits for a byte on standard input, one for each rank: the
import of a measurement passes while another one has the GPUs.

    [torchrun ...] tests/benchmarks/told_bench.py WARMUP STEPS JSON RECIPE [section.key=value ...]
"""

import os
import sys

from megatron_carve import bench
from megatron_carve.recipe import load_recipe
from megatron_carve.run.launch import set_connections, use_device
from megatron_carve.run.session import choose_device

if __name__ == "__main__":
    warmup, steps, numbers, *words = sys.argv[1:]
    recipe = load_recipe(words[0], words[1:])
    set_connections(recipe)  # as every program of ours does, before anything can start CUDA
    choose_device(use_device(recipe.run.device))
    import megatron_carve.run.pretraining  # noqa: F401  with Megatron and, where it is, Transformer Engine

    if not os.read(0, 1):
        sys.exit("whoever started this has ended, or has no time left for it")
    sys.exit(bench.main([*words, "--warmup", warmup, "--steps", steps, "--json", numbers]))
