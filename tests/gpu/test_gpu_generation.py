"""Generating on a GPU: the chunk kernels read a prompt, a CUDA graph of the recurrent ones goes on from it."""

import pytest
import torch
from support.models import hybrid_model, one_process

pytestmark = pytest.mark.gpu

VOCAB, LENGTH = 64, 400
SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2}


@pytest.fixture(scope="module")
def model():
    with one_process("cuda"):
        model = hybrid_model("C-2*-", vocab_size=VOCAB, length=LENGTH, window_size=(16, 0), **SIZES).cuda().eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        yield model


def test_a_graph_goes_on_as_the_whole_model_says(model):
    from megatron_carve.generation import Memory

    prompts = [torch.randint(VOCAB, (n,), device="cuda") for n in (1, 200, 37)]
    rest = torch.randint(VOCAB, (100, 3), device="cuda")
    found = {}
    for graph in (True, False):
        memory = Memory(model, 3, LENGTH, vocab_size=VOCAB, cuda_graph=graph)
        for place, prompt in enumerate(prompts):
            memory.read(place, prompt, piece=64)
        found[graph] = torch.stack([memory.step(tokens).clone() for tokens in rest], 1)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)
    for place, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, rest[:, place]])[None]
        with torch.no_grad():
            whole = model(tokens, torch.arange(tokens.shape[1], device="cuda")[None], None)[0, prompt.numel() :]
        torch.testing.assert_close(found[True][place], whole.float(), rtol=1e-3, atol=2e-3)
