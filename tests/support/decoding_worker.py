"""Decode with tensor parallelism, in few launches and by the modules. Run in two processes; each compares."""

import os
import sys

import torch
import torch.distributed as dist


def main() -> None:
    from megatron_carve import patches

    patches.cpu_mode.apply()
    patches.layer_symbols.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from support import interpreter
    from support.models import decoded, hybrid_model

    from megatron_carve.model import decoding
    from megatron_carve.model.mixers import next_token

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(7)
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 4}
    model = hybrid_model("C-", tensor_model_parallel_size=2, mixer_backend="triton", **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            shared = not getattr(p, "tensor_model_parallel", False)
            torch.manual_seed(1 if shared else 2 + dist.get_rank())
            p += 0.1 * torch.randn_like(p)
    tokens, mixed = torch.arange(6).view(2, 3), []
    mix = next_token.mix_token
    next_token.mix_token = lambda *arguments: mixed.append(1) or mix(*arguments)

    found = decoded(model, tokens)
    assert interpreter.DEVICE == "cpu" and len(mixed) == 3
    decoding.DecodingLayer._decodes = lambda *arguments: False
    torch.testing.assert_close(found, decoded(model, tokens), rtol=1e-4, atol=2e-5)
    assert len(mixed) == 3
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
