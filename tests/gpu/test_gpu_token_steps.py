"""Decoding kernels at real sizes in bfloat16, and a model that decodes with them as without, from a CUDA graph."""

import pytest
import torch
from support.models import hybrid_model, one_process
from support.token_steps import TokenSteps
from support.tolerances import assert_close

pytestmark = pytest.mark.gpu

SIZES = {"K": 128, "V": 128, "H": 16, "rank": 128, "content": 32, "steps": 5}
CASES = {
    "previous": TokenSteps("previous", N=1, **SIZES),
    "decayed, 16 sequences": TokenSteps("decayed", N=16, **SIZES),
    "previous, many in slots": TokenSteps("previous", N=100, in_slots=True, **(SIZES | {"rank": 0})),
    "delta": TokenSteps("delta", N=2, **SIZES),
    "gdn2": TokenSteps("gdn2", N=1, group=2, **(SIZES | {"H": 8})),
    "gdn2, many": TokenSteps("gdn2", N=100, **(SIZES | {"rank": 0})),
    "kda, 64 channels": TokenSteps("kda", N=3, **(SIZES | {"K": 64, "V": 64})),
    "256 channels": TokenSteps("gdn2", N=2, **(SIZES | {"K": 256, "V": 256, "H": 2})),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mixers_step_in_bfloat16(case: str) -> None:
    found = CASES[case].run(torch.bfloat16, torch.bfloat16, "cuda", "triton")
    truth = CASES[case].run(torch.bfloat16, torch.float64, "cpu", "torch")
    assert_close(found, truth, "bfloat16", plain=CASES[case].run(torch.bfloat16, torch.bfloat16, "cpu", "torch"))


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize("sequences", [1, 3, 40])
def test_a_model_decodes_as_by_its_modules(layers, sequences, monkeypatch):
    from megatron_carve.model import decoding
    from megatron_carve.specs import stack_spec
    from megatron_carve.use.generation import Memory

    if layers == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_value_heads": 4}
    with one_process("cuda"):
        model = hybrid_model(
            "C-2-K-*-", stack_spec(layers), bf16=True, params_dtype=torch.bfloat16, hidden_size=256, kv_channels=64,
            ffn_hidden_size=320, **sizes,
        ).cuda().eval()  # fmt: skip
        tokens = torch.randint(64, (12, sequences), device="cuda")
        prompts = [torch.randint(64, (5 + i % 3,), device="cuda") for i in range(sequences)]

        def logits(few_launches: bool, cuda_graph: bool) -> torch.Tensor:
            with monkeypatch.context() as m:
                taken = []
                decodes = decoding.DecodingLayer._decodes
                m.setattr(
                    decoding.DecodingLayer, "_decodes",
                    lambda *a: few_launches and (taken.append(decodes(*a)) or taken[-1]),
                )  # fmt: skip
                memory = Memory(model, sequences, 40, vocab_size=64, cuda_graph=cuda_graph)
                for place, prompt in enumerate(prompts):
                    memory.read(place, prompt)
                found = torch.stack([memory.step(step).clone() for step in tokens])
                assert any(taken) == few_launches
            return found

        expected = logits(False, False)
        found = logits(True, False)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
        assert (found - expected).square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()
        torch.testing.assert_close(logits(True, True), found, rtol=0, atol=0)
