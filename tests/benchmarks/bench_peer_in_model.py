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
from megatron_carve.kernels import OpCall
from megatron_carve.model.context.exchange import Span
from megatron_carve.model.mixers import base


def peer_op(path: str) -> Any:
    """What stands for state_passing.chunk_on_span in the mixers."""

    def chunk_on_span(span: Span, call: OpCall) -> Tensor:
        assert span.group is None and call.op == "gdn2" and call.gate_logits and call.erase_scale == 1.0
        assert call.A_log is not None and call.dt_bias is not None and call.backend in ("auto", "triton")
        gates = call.b.sigmoid(), call.w.sigmoid()
        if path == "in_kernel":
            gate = {"A_log": call.A_log, "dt_bias": call.dt_bias.flatten()}
            return peer(
                call.q, call.k, call.v, call.g, *gates, use_gate_in_kernel=True, disable_recompute=True, **gate
            )[0]
        decay = -call.A_log.exp()[:, None] * torch.nn.functional.softplus(call.g.float() + call.dt_bias)
        return peer(call.q, call.k, call.v, decay, *gates, safe_gate=True, disable_recompute=True)[0]

    return chunk_on_span


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    if path not in ("in_kernel", "safe"):
        sys.exit(f"PATH: expected in_kernel or safe, got {path}")
    base.chunk_on_span = peer_op(path)
    sys.exit(bench.main(words))
