"""Generating on a GPU: the chunk kernels read a prompt, a CUDA graph of the recurrent ones goes on from it."""

import pytest
import torch
from support.models import assert_few_launches, count_launches, hybrid_model, one_process

pytestmark = pytest.mark.gpu

VOCAB, LENGTH = 64, 400
SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2}


@pytest.fixture(scope="module", params=["static", "dynamic"])
def models(request):
    """One model in float32 and in bfloat16, with the same weights."""
    with one_process("cuda"):
        made = {}
        for dtype, options in (torch.bfloat16, {"bf16": True, "params_dtype": torch.bfloat16}), (torch.float32, {}):
            made[dtype] = hybrid_model(
                "C-2*-", vocab_size=VOCAB, length=LENGTH, window_size=(16, 0),
                kv_channels=32, attention_convolution=request.param, mixer={"short_convolution": request.param},
                **options, **SIZES,
            ).cuda().eval()  # fmt: skip
        with torch.no_grad():
            for rounded, exact in zip(made[torch.bfloat16].parameters(), made[torch.float32].parameters(), strict=True):
                rounded += 0.1 * torch.randn_like(rounded)
                exact.copy_(rounded)
        yield made


def generated(model, prompts, rest, cuda_graph):
    """Logits [B, T, V] of every token of `rest`, [T, B], after prompts of different lengths."""
    from megatron_carve.use.generation import Memory

    memory = Memory(model, len(prompts), LENGTH, vocab_size=VOCAB, cuda_graph=cuda_graph)
    for place, prompt in enumerate(prompts):
        memory.read(place, prompt, piece=64)
    return torch.stack([memory.step(tokens).clone() for tokens in rest], 1)


def whole(model, prompts, rest):
    """The same by one forward of every sequence."""
    found = []
    for place, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, rest[:, place]])[None]
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1], device="cuda")[None], None)
        found.append(logits[0, prompt.numel() :].float())
    return torch.stack(found)


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randint(VOCAB, shape, device="cuda", generator=generator)  # noqa: E731
    return [draw(n) for n in (1, 200, 37)], draw(100, 3)


def test_a_graph_goes_on_as_the_whole_model_says(models, sequences, monkeypatch):
    model, launches = models[torch.float32], count_launches(monkeypatch)
    found = generated(model, *sequences, cuda_graph=True)
    assert_few_launches(launches, model)
    torch.testing.assert_close(found, generated(model, *sequences, cuda_graph=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, whole(model, *sequences), rtol=1e-3, atol=2e-3)


def test_bfloat16_departs_from_the_whole_model_no_further_than_that_does_from_float32(models, sequences):
    exact = whole(models[torch.float32], *sequences)
    by_token = generated(models[torch.bfloat16], *sequences, cuda_graph=True) - exact
    at_once = whole(models[torch.bfloat16], *sequences) - exact
    errors = [(x.square().mean() / exact.square().mean()).sqrt().item() for x in (by_token, at_once)]
    print(f"relative error of bfloat16 by token {errors[0]:.2e}, at once {errors[1]:.2e}")
    assert errors[0] < 1.5 * errors[1] and errors[1] < 0.1
