"""Attention whose queries, keys and values are convolved, against a loop over tokens in float64."""

import math

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from support.models import config, groups, hybrid_model, one_process
from support.oracle import oracle_convolution_of_heads

B, T, H, G, D, R = 2, 7, 4, 2, 8, 3
ANGLES = torch.arange(T, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(0, D, 2).double() / D)


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def attention(convolution, **changes):
    """An attention layer in float64 whose parameters are all random."""
    from megatron_carve.specs import stack_spec

    spec = stack_spec("local", attention_convolution=convolution).submodules.attention_layer.submodules.self_attention
    settings = config(kv_channels=D, num_query_groups=G, mixer={"convolution_rank": R}, **changes)
    layer = build_module(spec, settings, layer_number=1, pg_collection=groups()).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return layer


def rotated(x, angles):
    """Pairs (x_i, x_{i + D/2}) of [T, B, heads, D] turned by their token's angles, [T, D/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = (f(angles)[:, None, None] for f in (torch.cos, torch.sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def expected(layer, x, *, rope, norms, window):
    """What the layer makes of [T, B, hidden], token by token."""
    conv, features, up = layer.conv, None, None
    if layer.taps_proj is not None:
        features, up = (x @ layer.taps_proj.weight.t()).transpose(0, 1), conv.up
    projected = (x @ layer.linear_qkv.weight.t()).transpose(0, 1)
    mixed = oracle_convolution_of_heads(projected, conv.weight, features, up, head_dim=D, group=H // G + 2)
    by_group = mixed.transpose(0, 1).unflatten(-1, (G, H // G + 2, D))
    q, k, v = by_group[..., : H // G, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
    if norms:
        q, k = layer.q_layernorm(q), layer.k_layernorm(k)
    if rope:
        q, k = rotated(q, ANGLES), rotated(k, ANGLES)
    rows = []
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        scores = torch.einsum("bhd,sbhd->bhs", q[t], k[first : t + 1].repeat_interleave(H // G, 2)) / math.sqrt(D)
        rows.append(torch.einsum("bhs,sbhd->bhd", scores.softmax(-1), v[first : t + 1].repeat_interleave(H // G, 2)))
    return torch.stack(rows).flatten(2) @ layer.linear_proj.weight.t()


@pytest.mark.parametrize("convolution", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("rope", "norms", "window"), [(True, False, None), (True, True, 3), (False, False, None)],
    ids=["rope", "rope, norms, window", "no positions"],
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_loop_over_tokens(convolution, rope, norms, window):
    """The convolution comes first, then norms of queries and keys, then positions."""
    windowed = {} if window is None else {"window_size": (window - 1, 0)}
    layer = attention(convolution, attention_softmax_in_fp32=False, **windowed)
    if norms:
        layer.q_layernorm, layer.k_layernorm = (torch.nn.RMSNorm(D, eps=1e-6, dtype=torch.float64) for _ in range(2))
    x = torch.randn(T, B, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(T, B, 32, dtype=torch.float64)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    out, _ = layer(x, mask, rotary_pos_emb=torch.cat([ANGLES, ANGLES], -1)[:, None, None] if rope else None)
    truth = expected(layer, x, rope=rope, norms=norms, window=window)
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9)
    leaves = [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, truth))
    for name, ours, theirs in zip(["x", *dict(layer.named_parameters())], found, wanted, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"
        assert theirs.abs().max() > 0


def test_a_fresh_dynamic_convolution_is_a_static_one_beside_the_token():
    model = hybrid_model("*", attention_convolution="dynamic")
    conv = model.decoder.layers[0].self_attention.conv
    assert conv.weight.abs().max() <= 0.5 and conv.weight.std() > 0.2
    assert not conv.up.any()


@pytest.mark.parametrize("name", ["attention_output_gate", "fused_single_qkv_rope"])
def test_what_attention_cannot_convolve_is_refused(name):
    layer = attention("static")
    options = {"output_gate": True} if name == "attention_output_gate" else {"split_qkv": False}
    with pytest.raises(NotImplementedError, match=f"ConvolvedSelfAttention: {name}"):
        layer.get_query_key_value_tensors(torch.zeros(T, B, 32, dtype=torch.float64), **options)


def test_kernels_of_a_step_are_rehearsed():
    """On zeros: forward and backward of what the step's shapes compile."""
    for convolution in ("static", "dynamic"):
        layer = attention(convolution).float()
        layer.rehearse(16, 2)
        assert all(p.grad is None for p in layer.parameters())
