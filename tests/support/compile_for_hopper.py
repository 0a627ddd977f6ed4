"""Compile the kernels of the ops for a Hopper GPU, on any machine: Triton needs a GPU to launch, not to compile.

    python tests/support/compile_for_hopper.py gdn2|previous|decayed|delta|dynamic|heads|token DTYPE WIDTH

calls the chunk op, forward and backward with what a mixer gives it (of "decayed" without what may be left out), and a
step of decoding, of all of a state and of chosen rows (of "gdn2" also attention's; of "dynamic" the dynamic
convolution, of "heads" both convolutions of attention's heads, forward and backward; of "token" a layer's step of one
token, of one and of many sequences), with launches replaced by compilation; prints a line of JSON for each kernel: its
name, its shared memory in bytes, the registers of a thread, the bytes that it spills, how many of Hopper's
instructions multiply tiles and how many wait for them, and with how many constants of 16 bits its source calculates. A
script of its own: what it changes in Triton stays for the life of a process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_carve import kernels
from megatron_carve.kernels import backends
from megatron_carve.kernels.decoding import add_product, normed_product
from megatron_carve.kernels.surroundings import convolve_heads, dynamic_convolve_heads, dynamic_convolve_qkv
from megatron_carve.kernels.token_call import FEW_SEQUENCES, Norm
from megatron_carve.kernels.triton_backend import (
    content_gradient,
    content_terms,
    decode_mixer,
    decode_products,
    segments,
)
from megatron_carve.kernels.triton_backend.compiling import compiling
from megatron_carve.kernels.triton_backend.paged_attention import attend_to_blocks

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.inputs import FORMS
from support.token_steps import TokenSteps

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
T, HEADS, RANK = 128, 2, 16
CONSTANT_OF_16_BITS = re.compile(r"(%\w+) = arith\.constant \S+ : (?:tensor<[\dx]+)?b?f16")
ARITHMETIC = re.compile(r"arith\.(?:add|sub|mul|div)f (%\w+), (%\w+)")


class Hopper:
    """As much of a GPU's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, where spilled registers are, products of tiles and waits for them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    fields = dict(field.split(":")[:2] for field in usage.split() if field.startswith(("REG:", "STACK:")))
    return {
        "registers": int(fields["REG"]),
        "spilled": int(fields["STACK"]),
        "products": code.count("HGMMA."),
        "waits": code.count("WARPGROUP.DEPBAR"),
    }


def narrow_constants(source: str) -> int:
    constants = set(CONSTANT_OF_16_BITS.findall(source))
    return sum(bool(constants & set(operands)) for operands in ARITHMETIC.findall(source))


def main(form: str, dtype: torch.dtype, width: int) -> None:
    driver.set_active(Hopper())
    backends._interpreted = lambda: True  # tensors of a CPU pass
    decode_mixer.overlaps = decode_products.overlaps = lambda device: True
    content_gradient.cooperates = content_terms.cooperates = lambda device: True
    content_gradient.multiprocessors = content_terms.multiprocessors = segments.multiprocessors = lambda device: 132
    segments.FEWEST, segments.SHORTEST = 2, 1  # so that the chain is cut here too

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    def inputs(tokens: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
        keys = [leaf(1, tokens, HEADS, width) for _ in range(3)]
        gate, decay = leaf(1, tokens, HEADS, width), leaf(1, tokens, HEADS, width)
        dt_bias = leaf(HEADS, width, dtype=torch.float32)
        options: dict[str, Any] = {"dt_bias": dt_bias, "gate_logits": True, "backend": "triton"}
        if form == "gdn2":
            A_log = leaf(HEADS, dtype=torch.float32)
            return [*keys, decay, gate, leaf(1, tokens, HEADS, width)], {"A_log": A_log, **options}
        content = leaf(RANK, width), leaf(width, RANK)
        by_channel = {name: leaf(HEADS, width, dtype=torch.float32) for name in ("A_log", "erase_bias")}
        options |= {"content_chunk": T, **FORMS[form]}
        if form == "decayed":  # what may be left out, is
            by_channel, options = {}, {"backend": "triton", "content_chunk": T, **FORMS[form]}
        return [*keys, decay, gate, leaf(1, tokens, HEADS), *content], by_channel | options

    op = "gdn2" if form == "gdn2" else "carve"

    def convolve() -> None:
        channels = HEADS * width
        given = [leaf(1, T, 3 * channels), leaf(1, T, 3 * RANK), leaf(3 * channels, 4), leaf(3 * channels, 4, RANK)]
        if form == "heads":
            static = convolve_heads(given[0], given[2], backend="triton")
            torch.autograd.grad(static, [given[0], given[2]], torch.zeros_like(static))
            dynamic = dynamic_convolve_heads(*given, head_dim=width, group=3, backend="triton")
            torch.autograd.grad(dynamic, given, torch.zeros_like(dynamic))
            return
        out = dynamic_convolve_qkv(*given, key_channels=channels, key_head_dim=width, backend="triton")
        torch.autograd.grad(out, given, [torch.zeros_like(part) for part in out])

    def attend() -> None:
        query, keys = leaf(1, HEADS, width), leaf(T, HEADS, width)
        blocks, positions = (torch.zeros(1, *shape, dtype=torch.int32) for shape in ((2,), ()))
        attend_to_blocks(query, keys, keys, blocks, positions, block_tokens=64, scale=1.0, window=None)

    @torch.no_grad()
    def decode() -> None:
        for sequences, rank in ((1, width), (FEW_SEQUENCES + 1, 0)):
            steps = TokenSteps("previous", N=sequences, K=width, V=width, rank=rank, content=RANK, steps=1)
            steps.run(dtype, dtype, "cpu", "triton")
            x, weight = (torch.zeros(n, HEADS * width, dtype=dtype) for n in (sequences, HEADS * width))
            norm = Norm(weight[0], 1e-5)
            normed_product(x, norm, weight, backend="triton")
            normed_product(x, norm, weight, gated=True, backend="triton")
            add_product(x, x, weight, backend="triton")

    def call() -> None:
        if form == "token":
            decode()
            return
        if form in ("dynamic", "heads"):
            convolve()
            return
        given, options = inputs(T)
        o, _ = getattr(kernels, f"chunk_{op}")(*given, **options)
        torch.autograd.grad(o, given, torch.zeros_like(o), allow_unused=True)
        given, options = inputs(1)
        with torch.no_grad():
            _, state = getattr(kernels, f"recurrent_{op}")(*given, output_final_state=True, **options)
            options |= {"initial_state": state, "inplace_state": True, "state_rows": torch.zeros(1, dtype=torch.int64)}
            getattr(kernels, f"recurrent_{op}")(*given, **options)
            if form == "gdn2":
                attend()

    with compiling() as compiled:
        for beside in (False, True):
            content_gradient.overlaps = lambda device, beside=beside: beside
            call()
    for kernel in (future.result() for future in compiled):
        row = {"kernel": kernel.metadata.name, "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
        row["narrow_constants"] = narrow_constants(kernel.asm["ttir"])
        print(json.dumps(row), flush=True)
    with compiling() as compiled_anew:
        call()
    assert not compiled_anew


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]))
