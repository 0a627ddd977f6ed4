"""What a model's first step would compile, compiled before it, side by side and with a word about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Timer

import torch

from megatron_carve.model.convolved_attention import ConvolvedSelfAttention
from megatron_carve.model.mixers.base import LinearAttentionMixer
from megatron_carve.notices import say_once
from megatron_carve.recipe import Recipe

# Seconds in which kernels of an earlier start are all read; what takes longer is said.
READ = 2.0


def compile_kernels(models: Sequence[torch.nn.Module], recipe: Recipe) -> None:
    """Compile the Triton kernels of the mixers on this rank, and of attention's convolution, as the recipe's steps will
    call them. All ranks call it, with models that nothing is wrapped around yet.

    Kernels of an earlier start come from Triton's cache.
    """
    known = LinearAttentionMixer | ConvolvedSelfAttention
    by_kind = {m.kind: m for model in models for m in model.modules() if isinstance(m, known)}
    layers = [m for m in by_kind.values() if next(m.parameters()).is_cuda and m.backend != "torch"]
    if not layers:
        return
    from megatron_carve.kernels.triton_backend.compiling import compiling

    kinds = ", ".join(m.kind for m in layers)
    notice = Timer(
        READ, say_once, [f"compiling Triton kernels for {kinds}: once on a machine, while they are the same"]
    )
    began = time.monotonic()
    notice.start()
    try:
        with compiling() as kernels:
            for layer in layers:
                layer.rehearse(recipe.training.seq_length // recipe.parallel.context, recipe.training.micro_batch_size)
    finally:
        notice.cancel()
    torch.cuda.empty_cache()  # what a rehearsal took would lie between what stays
    seconds = time.monotonic() - began
    if seconds > READ:
        say_once(f"{len(kernels)} kernels compiled in {seconds:.0f} s")
