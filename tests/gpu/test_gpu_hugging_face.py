"""Exported models on a GPU: our kernels and the peer's, where they stand for torch, compute what torch does."""

import importlib.util
from dataclasses import asdict

import pytest
import torch

from megatron_carve.model.config import MixerConfig

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

VOCAB = 96
SIZES = MixerConfig(num_key_heads=2, num_value_heads=4, key_head_dim=64, value_head_dim=64, content_rank=8)


@pytest.fixture
def modeling():
    from megatron_carve.use import modeling_carve

    return modeling_carve


def made(modeling, pattern, erase):
    config = modeling.CarveConfig(
        pattern=pattern, vocab_size=VOCAB, hidden_size=128, ffn_hidden_size=256, num_attention_heads=2,
        num_key_value_heads=1, attention_head_dim=64, attention_window=50, mixer={**asdict(SIZES), "erase": erase},
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling.CarveForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p)
            p.copy_(p if name.endswith(("A_log", "dt_bias", "erase_bias")) else p.bfloat16())
    return model.cuda()


def logits(model, tokens):
    """Of a prompt at once, and of single tokens after it."""
    with torch.no_grad():
        first = model(tokens[:, :150], use_cache=True)
        found, memory = [first.logits], first.past_key_values
        for i in range(150, tokens.shape[1]):
            step = model(tokens[:, i : i + 1], past_key_values=memory, use_cache=True)
            found.append(step.logits)
    return torch.cat(found, 1).float()


def error(x, exact):
    return ((x - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize(("path", "erase"), [("kernels", "diagonal"), ("kernels", "delta"), ("peer", "diagonal")])
def test_a_path_departs_from_float32_no_further_than_torch_in_bfloat16(modeling, monkeypatch, path, erase):
    if path == "peer" and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    pattern = "C-2-*-" if path == "kernels" else "2-*-2-"
    model = made(modeling, pattern, erase)
    tokens = torch.randint(VOCAB, (2, 180), device="cuda")
    kernels = modeling.kernels
    calls = []
    if path == "kernels":
        used = kernels.chunk_gdn2
    else:
        from fla.ops.gdn2 import chunk_gdn2 as used

    def counted(*given, **options):
        calls.append(path)
        return used(*given, **options)

    monkeypatch.setattr(modeling, "kernels", None)
    monkeypatch.setattr(modeling, "peer_gdn2", None)
    exact = logits(model, tokens)
    half = model.to(torch.bfloat16)
    by_torch = error(logits(half, tokens), exact)
    if path == "kernels":
        monkeypatch.setattr(modeling, "kernels", kernels)
        monkeypatch.setattr(kernels, "chunk_gdn2", counted)
    else:
        monkeypatch.setattr(modeling, "peer_gdn2", counted)
    found = error(logits(half, tokens), exact)
    print(f"relative error of bfloat16: {path}, {erase} {found:.2e}, torch {by_torch:.2e}")
    assert len(calls) == 31 * pattern.count("2")
    assert found < 1.5 * by_torch < 0.2
