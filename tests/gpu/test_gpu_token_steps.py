"""Decoding kernels at real sizes in bfloat16, and a model that decodes with them as without, from a CUDA graph."""

import pytest
import torch
from support.models import assert_few_launches, count_launches, hybrid_model, one_process
from support.token_steps import TokenSteps
from support.tolerances import assert_close

pytestmark = pytest.mark.gpu

VOCAB, LENGTH = 64, 60
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


@pytest.fixture(scope="module", params=["local", "transformer_engine"])
def models(request):
    """One model in float32 and in bfloat16, with the same weights."""
    from megatron_carve.specs import stack_spec

    if request.param == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    sizes = {
        "hidden_size": 256, "kv_channels": 64, "ffn_hidden_size": 320, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }  # fmt: skip
    with one_process("cuda"):
        made = {"layers": request.param}
        for dtype, options in (torch.bfloat16, {"bf16": True, "params_dtype": torch.bfloat16}), (torch.float32, {}):
            spec = stack_spec(request.param)
            made[dtype] = hybrid_model("C-2-K-*-", spec, vocab_size=VOCAB, length=LENGTH, **sizes, **options)
            made[dtype] = made[dtype].cuda().eval()
        with torch.no_grad():
            for rounded, exact in zip(made[torch.bfloat16].parameters(), made[torch.float32].parameters(), strict=True):
                rounded += 0.05 * torch.randn_like(rounded)
                exact.copy_(rounded)
        yield made


@pytest.mark.parametrize("sequences", [1, 3, 40])
def test_a_model_decodes_as_by_its_modules(models, sequences, monkeypatch):
    from megatron_carve.use.generation import Memory

    launches = count_launches(monkeypatch)

    def logits(dtype, few_launches, cuda_graph=False):
        launches.update(mixers=0, products=0, allowed=few_launches)
        memory = Memory(models[dtype], sequences, LENGTH, vocab_size=VOCAB, cuda_graph=cuda_graph)
        for place, prompt in enumerate(prompts):
            memory.read(place, prompt)
        found = torch.stack([memory.step(token).clone() for token in tokens])
        if few_launches:
            assert_few_launches(launches, models[dtype])
        return found

    tokens = torch.randint(VOCAB, (20, sequences), device="cuda")
    prompts = [torch.randint(VOCAB, (5 + i % 3,), device="cuda") for i in range(sequences)]
    exact = logits(torch.float32, True)
    if models["layers"] == "local":  # Transformer Engine multiplies float32 in TF32
        torch.testing.assert_close(exact, logits(torch.float32, False), rtol=1e-3, atol=2e-3)
    found = logits(torch.bfloat16, True)
    errors = [
        ((x - exact).square().mean() / exact.square().mean()).sqrt().item()
        for x in (found, logits(torch.bfloat16, False))
    ]
    print(f"relative error of bfloat16 in few launches {errors[0]:.2e}, by modules {errors[1]:.2e}")
    assert errors[0] < 1.3 * errors[1] and errors[1] < 0.1
    assert torch.equal(logits(torch.bfloat16, True, cuda_graph=True), found)
