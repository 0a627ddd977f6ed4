"""Residual layers that take a token of every sequence in few launches: when they do, and that they compute the same."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import interpreter
from support.models import count_launches, decoded, hybrid_model, one_process, steps_of_fixed_size
from support.parallel import run_ranks

SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2, "ffn_hidden_size": 32}
VOCAB, LENGTH = 32, 30


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process(interpreter.DEVICE):
        yield


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch):
    """Fewer programs for the interpreter."""
    from megatron_carve.kernels.triton_backend import decode_products

    monkeypatch.setattr(decode_products, "PLAIN", decode_products.Tuning(64, 64, 4))
    monkeypatch.setattr(decode_products, "GATED", decode_products.Tuning(64, 64, 4))


def perturbed(pattern, **changes):
    model = hybrid_model(pattern, vocab_size=VOCAB, length=LENGTH, **SIZES | {"mixer_backend": "triton"} | changes)
    model = model.to(interpreter.DEVICE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def launches(monkeypatch):
    return count_launches(monkeypatch)


MODELS = {
    "carve": ("C-", {}, 2),
    "gdn2, kda and attention": ("2K*-", {"linear_num_value_heads": 4, "mixer": {"negative_eigenvalues": True}}, 2),
    "full rank, no gate, zero-centred norm": (
        "C-",
        {
            "mixer": {
                "decay_projection": "full_rank",
                "output_gate_activation": "none",
                "conv_bias": True,
                "erase": "delta",
            },
            "layernorm_zero_centered_gamma": True,
        },
        2,
    ),
    "many sequences": ("2-", {"mixer": {"short_convolution": "none"}}, 17),
}


LONG = "gdn2, kda and attention", "many sequences"
MARKS = {"carve": []} | {name: [pytest.mark.long] for name in LONG}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, [pytest.mark.slow])) for n in MODELS])
def test_a_step_computes_what_the_modules_do(name, launches):
    pattern, changes, sequences = MODELS[name]
    model = perturbed(pattern, **changes)
    tokens = torch.randint(VOCAB, (sequences, 2 if sequences > 2 else 3), device=interpreter.DEVICE)
    found = decoded(model, tokens)
    mixers, mlps = sum(pattern.count(x) for x in "C2K"), pattern.count("-")
    assert launches["mixers"] == tokens.shape[1] * mixers
    assert launches["products"] == tokens.shape[1] * 2 * (mixers + mlps)
    launches["allowed"] = False
    torch.testing.assert_close(found, decoded(model, tokens), rtol=1e-4, atol=2e-5)


def generated(model, backend, prompts):
    """An engine's greedy tokens, their logarithmic probabilities, and what its slots hold in the end."""
    from megatron_carve.use.engine import Engine, Sampling

    model.config.mixer_backend = model.decoder.layers[0].self_attention.backend = backend
    trained = SimpleNamespace(model=model, vocab_size=VOCAB, device=torch.device(interpreter.DEVICE), recipe=None)
    limits = {"max_requests": 4, "max_tokens": 80, "max_sequence": 80, "block_tokens": 16}
    engine, found = Engine(trained, cuda_graphs=True, **limits), {}
    for prompt in prompts:
        engine.add(prompt, Sampling(max_tokens=2 + len(prompt) % 3, temperature=0, logprobs=0))
    while not engine.idle():
        for step in engine.step():
            tokens, logprobs = found.setdefault(step.request, ([], []))
            tokens += step.tokens
            logprobs += step.logprobs
    context = engine._steps.context
    tokens, logprobs = zip(*found.values(), strict=True)
    flat = torch.tensor([p for part in logprobs for p in part])
    return tokens, (flat, context.mamba_conv_states, context.mamba_ssm_states)


@pytest.mark.slow
@pytest.mark.skipif(interpreter.DEVICE != "cpu", reason="tests/gpu/test_gpu_engine.py has graphs")
def test_requests_of_an_engine_get_the_same(launches, monkeypatch):
    from megatron_carve.model.mixers import dynamic

    read = dynamic.run_chunk  # prompts, which are not what is tested
    monkeypatch.setattr(dynamic, "run_chunk", lambda call: read(replace(call, backend="torch")))
    sizes, model = steps_of_fixed_size(monkeypatch), perturbed("C")
    prompts = [[3] * 62, [4], [5]]  # a content chunk of the first one ends
    found = generated(model, "triton", prompts)
    assert sizes == [(3, 4), (3, 4), (1, 1)]
    few = launches | {"mixers": 6, "products": 12}  # those, and one of each size to record it
    assert launches == few
    expected = generated(model, "torch", prompts)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5)
    assert launches == few


@pytest.mark.long
@pytest.mark.skipif(interpreter.DEVICE != "cpu", reason="its processes share no GPU")
def test_ranks_that_share_heads_compute_the_same():
    run_ranks(2, Path(__file__).parents[1] / "support" / "decoding_worker.py", None)


def quantised(model):
    class Quantised(torch.nn.Parameter):
        pass

    mlp = model.decoder.layers[1].mlp
    mlp.linear_fc1.weight = Quantised(mlp.linear_fc1.weight.data)


def adapted(model):
    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x):
            return self.linear(x)

    model.decoder.layers[1].mlp.linear_fc2 = Adapted(model.decoder.layers[1].mlp.linear_fc2)


def hooked(model):
    model.decoder.layers[1].mlp.linear_fc1.register_forward_hook(lambda *a: None)


def biased(model):
    linear = model.decoder.layers[1].mlp.linear_fc2
    linear.bias = torch.nn.Parameter(torch.ones(linear.output_size, device=interpreter.DEVICE))


def in_float64(model):
    model.decoder.layers[1].pre_mlp_layernorm.double()


@pytest.mark.parametrize("change", [quantised, adapted, hooked, biased, in_float64], ids=lambda f: f.__name__)
def test_what_is_not_plain_is_left_to_its_modules(change, launches):
    model = perturbed("C-")
    change(model)
    tokens = torch.randint(VOCAB, (1, 2), device=interpreter.DEVICE)
    found = decoded(model, tokens)
    assert launches == {"mixers": 2, "products": 4, "allowed": True}
    launches["allowed"] = False
    torch.testing.assert_close(found, decoded(model, tokens), rtol=1e-4, atol=2e-5)


def hook(module):
    module.register_forward_pre_hook(lambda *a: None)


@pytest.mark.parametrize(
    "change",
    [
        hook, lambda mixer: hook(mixer.out_norm), lambda mixer: hook(mixer.decay_up),
        lambda mixer: setattr(mixer, "gate_up", torch.nn.Sequential(mixer.gate_up)),
        lambda mixer: setattr(mixer, "forward", mixer.forward),
    ],
    ids=["hook", "hook of the norm", "hook of a map", "adapted map", "replaced forward"],
)  # fmt: skip
def test_the_kernel_stands_for_plain_parts_of_a_mixer_alone(change):
    from megatron_carve.model.mixers.next_token import mixes_in_one_launch

    mixer = hybrid_model("C", vocab_size=VOCAB, length=LENGTH, **SIZES).decoder.layers[0].self_attention
    assert mixes_in_one_launch(mixer)
    change(mixer)
    assert not mixes_in_one_launch(mixer)


@pytest.mark.parametrize(("value_heads", "taken"), [(4, True), (8, False)])
def test_key_heads_of_many_states_are_left_to_the_modules(value_heads, taken):
    """Of eight heads the kernel for many sequences compiles for 40 s."""
    from megatron_carve.model.mixers.next_token import mixes_in_one_launch

    sizes = {"linear_num_key_heads": 1, "linear_num_value_heads": value_heads}
    widths = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = hybrid_model("2", vocab_size=VOCAB, length=LENGTH, **sizes, **widths)
    assert mixes_in_one_launch(model.decoder.layers[0].self_attention) == taken


def test_packed_sequences_are_refused_of_one_token_too(launches):
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.packed_seq_params import PackedSeqParams

    layer, hidden = perturbed("C").decoder.layers[0], torch.zeros(1, 1, 32, device=interpreter.DEVICE)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="packed sequences with an inference_context"):
        boundaries = torch.tensor([0, 1], dtype=torch.int32, device=interpreter.DEVICE)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
        layer(hidden, inference_context=StaticInferenceContext(1, LENGTH), packed_seq_params=packed)


def test_other_steps_are_left_to_the_modules(launches):
    from megatron.core.inference.contexts import StaticInferenceContext

    model = perturbed("C-", mixer_backend="torch" if interpreter.DEVICE == "cpu" else "auto")
    tokens = torch.randint(VOCAB, (1, 2), device=interpreter.DEVICE)
    if interpreter.DEVICE == "cpu":
        decoded(model, tokens)
        assert launches["mixers"] == launches["products"] == 0
    layer, hidden = model.decoder.layers[1], torch.zeros(1, 1, 32, device=interpreter.DEVICE)
    layer.config.mixer_backend, context = "triton", StaticInferenceContext(1, LENGTH)
    with torch.no_grad():
        assert layer._decodes(hidden, context)
        assert not layer._decodes(hidden, None)
        assert not layer._decodes(hidden.expand(2, -1, -1), context)
        assert not layer._decodes(hidden.double(), context)
        layer.train()
        assert not layer._decodes(hidden, context)
    assert not layer.eval()._decodes(hidden, context)  # with gradients
