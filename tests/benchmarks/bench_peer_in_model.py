"""megatron_carve.bench with flash-linear-attention's chunk_gdn2 in the place of ours; all else is the same model.

    python tests/benchmarks/bench_peer_in_model.py PATH RECIPE [section.key=value ...] [--steps N] [--json FILE]

PATH: `in_kernel` computes the decay inside its kernels; `safe` takes it computed by torch, for which the peer has a
faster path that needs log-decays of at least -5 a token. Both keep what the backward needs (no recomputation inside).
"""

import sys
from typing import Any

import torch
from fla.ops.gdn2 import chunk_gdn2 as peer
from torch import Tensor

from megatron_carve import bench
from megatron_carve.mixers import gdn2
from megatron_carve.parallel import Span


def peer_op(path: str) -> Any:
    """What stands for state_passing.chunk_gdn2 in the mixer."""

    def chunk_gdn2(
        span: Span, q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor, *, A_log: Tensor,
        dt_bias: Tensor, gate_logits: bool, erase_scale: float, backend: str,
    ) -> Tensor:  # fmt: skip
        assert span.group is None and gate_logits and erase_scale == 1.0 and backend in ("auto", "triton")
        gates = erase.sigmoid(), write.sigmoid()
        if path == "in_kernel":
            gate = {"A_log": A_log, "dt_bias": dt_bias.flatten()}
            return peer(q, k, v, g, *gates, use_gate_in_kernel=True, disable_recompute=True, **gate)[0]
        decay = -A_log.exp()[:, None] * torch.nn.functional.softplus(g.float() + dt_bias)
        return peer(q, k, v, decay, *gates, safe_gate=True, disable_recompute=True)[0]

    return chunk_gdn2


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    if path not in ("in_kernel", "safe"):
        sys.exit(f"PATH: expected in_kernel or safe, got {path}")
    gdn2.chunk_gdn2 = peer_op(path)
    sys.exit(bench.main(words))
