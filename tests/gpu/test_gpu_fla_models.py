"""A model of flash-linear-attention itself, and the run that its folder becomes."""

import importlib.util

import pytest
import torch
from support.programs import program

from megatron_carve.use.trained import trained_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"),
]


@pytest.mark.parametrize("options", [{}, {"allow_neg_eigval": True}])
def test_both_give_the_same_logits(options, tmp_path):
    from fla.models.kda import KDAConfig, KDAForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64, "vocab_size": 300}
    theirs = KDAForCausalLM(KDAConfig(**{**sizes, **options}, fuse_cross_entropy=False)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    program(tmp_path, "import", "theirs", "runs/theirs")
    tokens = torch.randint(0, 300, (1, 200), device="cuda")
    positions = torch.arange(200, device="cuda")[None]
    with torch.no_grad():
        precise = theirs.cuda()(tokens).logits
        expected = theirs.bfloat16()(tokens).logits.float()
    with trained_model(tmp_path / "runs/theirs", device="cuda", layers="local") as trained, torch.no_grad():
        ours = trained.model(tokens, positions, None).float()
    rounding = (expected - precise).abs().max()
    print(f"largest difference {(ours - precise).abs().max():.1e}, of theirs in bfloat16 {rounding:.1e}")
    assert (ours - precise).abs().max() < 2 * rounding
