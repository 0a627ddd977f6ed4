"""The mixer layers: sizes, gates, precision, packing, errors."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from support.models import config, groups, hybrid_model, one_process

from megatron_carve.model.config import MixerConfig
from megatron_carve.model.mixers import base
from megatron_carve.model.variants import VARIANTS
from megatron_carve.recipe import load_recipe

HIDDEN, LENGTH, BATCH = 32, 150, 2
DYNAMIC = {"short_convolution": "dynamic", "convolution_rank": 4}
WITH_DYNAMIC = [*((kind, {}) for kind in VARIANTS), ("gdn2", DYNAMIC)]


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


@pytest.fixture(autouse=True)
def seed():
    """What a test draws, and the parameters of its models, do not depend on the tests before it."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(11)


def build(kind: str, *, options=None, **changes):
    from megatron.core.transformer.spec_utils import build_module

    from megatron_carve.specs import mixer_layer_spec

    layer = build_module(
        mixer_layer_spec(kind, "local", **({"options": options} if options else {})),
        config=config(**changes),
        layer_number=1,
        pg_collection=groups(),
    )
    return layer.self_attention


def hidden_states(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(length, BATCH, HIDDEN)


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("gdn2_1p3b_recurrent", 1_302_638_112), ("gdn2_1p3b_hybrid", 1_300_314_384),
        ("carve_1p3b_recurrent", 1_360_825_344), ("carve_1p3b_hybrid", 1_328_924_928),
        ("carve_125m", 94_673_664), ("gdn2_125m", 101_598_096), ("carve_125m_moe", 177_215_040),
        ("kda_125m", 87_552_912),
    ],
)  # fmt: skip
def test_built_models_have_the_number_of_parameters_that_their_recipes_say(recipe, layers):
    r = load_recipe(recipe)
    m, x = r.model, r.mixer
    experts = {"num_moe_experts" if k == "num_experts" else k: v for k, v in r.megatron.items()}
    model = hybrid_model(
        m.pattern, vocab_size=128, hidden_size=m.hidden_size, ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads, linear_num_key_heads=x.num_key_heads,
        linear_num_value_heads=x.num_value_heads, linear_key_head_dim=x.key_head_dim,
        linear_value_head_dim=x.value_head_dim, perform_initialization=False, mixer=x.options, **experts,
    )  # fmt: skip
    assert sum(p.numel() for p in model.decoder.layers.parameters()) == layers


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay_projection": "full_rank"},
        {"output_gate_projection": "full_rank"},
        {"conv_bias": True, "content_rank": 3},
        {"short_convolution": "none", "output_gate_activation": "none"},
        {"short_convolution": "dynamic", "convolution_rank": 3, "conv_bias": True},
        {"erase": "delta", "content_rank": 0, "output_gate_activation": "none", "output_gate_projection": "full_rank"},
    ],
    ids=str,
)
def test_every_option_builds_the_parameters_that_the_formula_counts(kind, options):
    mixer = build(kind, options=options)
    sizes = MixerConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=12, **options)
    built = sum(p.numel() for p in mixer.parameters()) + HIDDEN  # and the input norm, which the layer holds
    assert built == sizes.parameter_count(kind, HIDDEN)
    out, bias = mixer(hidden_states())
    out.square().sum().backward()
    assert out.shape == (LENGTH, BATCH, HIDDEN)
    assert bias is None
    without = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # U is zero at first, so D has no gradient yet; its own gradient then moves U.
    assert without == (["content_down"] if kind == "carve" and sizes.content_rank else [])


def test_carves_delta_form_starts_as_gdn2_with_a_scalar_write_gate():
    carve, gdn2 = build("carve", options={"erase": "delta"}), build("gdn2")
    own = dict(carve.named_parameters())
    with torch.no_grad():
        own["decay.A_log"].view(2, 8).copy_(own["decay.A_log"].view(2, 8)[:, :1].clone())
        for name, parameter in gdn2.named_parameters():
            if name == "decay.A_log":
                parameter.copy_(own[name].view(2, 8)[:, 0])
            elif name != "in_proj.weight":
                parameter.copy_(own[name])
        names = [s.name for s in carve.sections]
        parts = dict(zip(names, carve.in_proj.weight.split([s.size for s in carve.sections]), strict=True))
        parts["write"] = parts["write"].repeat_interleave(12, dim=0)
        gdn2.in_proj.weight.copy_(torch.cat(list(parts.values())))
    x = hidden_states()
    torch.testing.assert_close(gdn2(x)[0], carve(x)[0], rtol=1e-5, atol=1e-6)


def op_calls(monkeypatch):
    """The calls of ops that mixers make from now on, each with its output."""
    calls, run = [], base.chunk_on_span

    def listen(span, call):
        calls.append((call, run(span, call)))
        return calls[-1][1]

    monkeypatch.setattr(base, "chunk_on_span", listen)
    return calls


@pytest.mark.parametrize("negative", [False, True])
def test_kda_erases_and_writes_with_one_number_per_key_head(negative, monkeypatch):
    from support.oracle import oracle_gdn2

    mixer = build("kda", options={"negative_eigenvalues": negative})
    calls, mixed, mix = op_calls(monkeypatch), [], mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda inputs, span: mixed.append(inputs) or mix(inputs, span))
    mixer(3 * hidden_states())
    call, o = calls[0]
    assert call.b.shape == (BATCH, LENGTH, 2)
    g = -call.A_log.exp()[:, None] * torch.nn.functional.softplus(call.g + call.dt_bias)
    beta = (2.0 if negative else 1.0) * call.b.double().sigmoid()
    expected, _ = oracle_gdn2(call.q, call.k, mixed[0].v, g, beta, beta.repeat_interleave(2, 2))
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("erase", ["diagonal", "delta"])
def test_content_acts_from_the_end_of_the_first_content_chunk_on(erase):
    carve = build("carve", options={"erase": erase})
    x = hidden_states()
    before = carve(x)[0]
    torch.nn.init.normal_(carve.content_up)
    torch.nn.init.normal_(carve.content_down)
    changed = (carve(x)[0] != before).any(-1).any(-1)
    assert not changed[:64].any()
    assert changed[64:].all()


@pytest.mark.parametrize(
    ("options", "initial"),
    [({}, -4.0), ({"erase_bias": -2.5}, -2.5), ({"erase": "delta"}, 0.0), ({"erase": "delta", "erase_bias": 1}, 1.0)],
    ids=str,
)
def test_the_erase_bias_starts_as_told_and_is_learned_by_channel(options, initial):
    carve = build("carve", options=options)
    bias = carve.erase_bias.bias
    assert bias.shape == (2 * 8,) and (bias == initial).all()
    carve(hidden_states())[0].square().sum().backward()
    assert (bias.grad != 0).all()


@pytest.mark.parametrize(("kind", "options"), WITH_DYNAMIC, ids=str)
def test_later_tokens_do_not_change_earlier_outputs(kind, options):
    mixer = perturbed(build(kind, options=options))
    x = hidden_states()
    y = x.clone()
    y[101:] = 10 * torch.randn_like(y[101:])
    assert torch.equal(mixer(x)[0][:101], mixer(y)[0][:101])
    assert not torch.equal(mixer(x)[0][101:], mixer(y)[0][101:])


def test_dynamic_taps_start_as_static_ones_beside_the_token():
    dynamic, static = build("gdn2", options=DYNAMIC), build("gdn2")
    own = dict(dynamic.named_parameters())
    with torch.no_grad():
        for name, parameter in static.named_parameters():
            if name == "in_proj.weight":
                parameter.copy_(own[name][: len(parameter)])
            else:
                parameter.copy_(own[name])
        static.conv.weight[:, -1] += 1
    x = hidden_states()
    torch.testing.assert_close(dynamic(x)[0], static(x)[0], rtol=1e-5, atol=1e-6)
    perturbed(dynamic.conv)
    assert (dynamic(x)[0] != static(x)[0]).float().mean() > 0.99


@pytest.mark.parametrize(("kind", "options"), WITH_DYNAMIC, ids=str)
def test_packed_documents_equal_the_documents_alone(kind, options):
    mixer = perturbed(build(kind, options=options))
    lengths = [1, 70, 3, 130]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x = hidden_states(sum(lengths))[:, :1]
    packed = SimpleNamespace(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    together = mixer(x, packed_seq_params=packed)[0]
    alone = torch.cat([mixer(part)[0] for part in x.split(lengths)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_rehearsal_calls_the_op_as_a_step_does_and_leaves_nothing_behind(kind, monkeypatch):
    mixer = build(kind)
    calls = []

    def remember(inputs):
        call = type(mixer).op_call(mixer, inputs)
        calls.append({f.name: getattr(call, f.name) for f in dataclasses.fields(call)})
        return call

    monkeypatch.setattr(mixer, "op_call", remember)
    x = hidden_states()
    mixer.rehearse(*x.shape[:2])
    assert all(p.grad is None for p in mixer.parameters())
    mixer(x)
    rehearsed, real = (
        {name: (x.shape, x.stride(), x.dtype) if torch.is_tensor(x) else x for name, x in call.items()}
        for call in calls
    )
    assert rehearsed == real


@pytest.mark.parametrize(("kind", "options"), WITH_DYNAMIC, ids=str)
def test_recomputation_changes_no_bit_and_keeps_less(kind, options):
    mixer = perturbed(build(kind, options=options))
    hidden = hidden_states()

    def run(recompute: bool) -> tuple[list[torch.Tensor], int]:
        mixer.recompute = recompute
        x = hidden.clone().requires_grad_()
        kept: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, _ = mixer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()])], sum(kept.values())

    (plain, all_bytes), (again, few_bytes) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few_bytes < all_bytes / 2


@pytest.mark.parametrize("kind", ["carve", "gdn2"])
@pytest.mark.parametrize(("negative", "limit"), [(False, 1.0), (True, 2.0)])
def test_negative_eigenvalues_double_the_erase_gate(kind, negative, limit, monkeypatch):
    mixer = build(kind, options={"negative_eigenvalues": negative, "erase": "delta"})
    scale, logits = 50.0, hidden_states()
    calls = op_calls(monkeypatch)
    mixer(scale * logits)
    call, _ = calls[0]
    gate = call.erase_scale * call.b.sigmoid()
    assert gate.max().item() == pytest.approx(limit, rel=1e-3)
    assert gate.min() >= 0


def test_decay_stays_float32_in_a_bfloat16_model_and_its_small_steps_are_kept():
    from megatron.core.transformer.module import Float16Module

    model = hybrid_model("C-2-", bf16=True, params_dtype=torch.bfloat16)
    wrapped = Float16Module(model.config, model)
    wide = ("A_log", "dt_bias", "erase_bias.bias")
    decay = {n: p for n, p in wrapped.named_parameters() if n.endswith(wide)}
    others = [p for n, p in wrapped.named_parameters() if n not in decay]
    assert {p.dtype for p in decay.values()} == {torch.float32}
    assert len(decay) == 5
    assert {p.dtype for p in others} == {torch.bfloat16}
    bias = next(p for n, p in decay.items() if n.endswith("dt_bias"))
    before = bias.detach().clone()
    with torch.no_grad():
        bias += 1e-5
    assert ((bias - before) > 0).all()  # bfloat16 would have rounded the step away


def test_decay_starts_in_the_published_ranges():
    mixer = build("gdn2", linear_num_key_heads=8, linear_num_value_heads=8, linear_key_head_dim=64)
    rate, step = mixer.decay.A_log.exp(), torch.nn.functional.softplus(mixer.decay.dt_bias)
    assert 1 <= rate.min() < rate.max() <= 16
    assert step.min() >= 0.001 * (1 - 1e-3)
    assert step.max() <= 0.1 * (1 + 1e-3)
    # log-uniform: a third of the decades holds a third of the channels
    share = ((step > 0.001 * 10 ** (2 / 3)) & (step < 0.001 * 10 ** (4 / 3))).float().mean()
    assert share == pytest.approx(1 / 3, abs=0.08)


def test_what_the_layer_cannot_do_is_refused():
    mixer = build("carve")
    with pytest.raises(NotImplementedError, match="packed sequences with an inference_context"):
        packed = SimpleNamespace(qkv_format="thd", cu_seqlens_q=torch.tensor([0, LENGTH]), cu_seqlens_q_padded=None)
        mixer(hidden_states()[:, :1], packed_seq_params=packed, inference_context=object())
    with pytest.raises(ValueError, match="qkv_format: expected 'thd', got 'sbhd'"):
        mixer(hidden_states(), packed_seq_params=SimpleNamespace(qkv_format="sbhd"))
    with pytest.raises(ValueError, match=r"unknown content_rnak; known: .*content_rank"):
        build("carve", options={"content_rnak": 4})
    with pytest.raises(ValueError, match="content_chunk: expected a positive multiple of 64, got 100"):
        build("carve", mixer={"content_chunk": 100})
    with pytest.raises(ValueError, match="negative_eigenvalues: expected false with CARVE's diagonal erase"):
        build("carve", options={"negative_eigenvalues": True})
    with pytest.raises(ValueError, match="num_value_heads: expected a multiple of num_key_heads=3"):
        build("gdn2", linear_num_key_heads=3)


def test_options_of_the_spec_win_over_those_of_the_configuration():
    mixer = build("carve", mixer={"content_rank": 5, "conv_bias": True}, options={"content_rank": 7})
    assert (mixer.mixer.content_rank, mixer.mixer.conv_bias) == (7, True)
    assert mixer.content_down.shape == (7, 12) and mixer.content_up.shape == (8, 7)


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Away from special initial values such as U = 0."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("gdn2", {"conv_bias": True}, marks=pytest.mark.slow),
        ("gdn2", {"conv_bias": True, **DYNAMIC}),
        pytest.param("carve", {"conv_bias": True}, marks=pytest.mark.slow),
        pytest.param(
            "carve",
            {"prediction": "decayed", "short_convolution": "none", "output_gate_activation": "none"},
            marks=pytest.mark.slow,
        ),
        pytest.param("carve", {"erase": "delta"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_both_backends_agree(kind, options):
    """Outputs and all gradients, through projections' slices as the kernels meet them in a model; recomputed too.

    A gradient of few numbers may be a sum that cancels, of which rounding is a larger part; how much, the distance of
    the torch path from float64 tells.
    """
    from support import interpreter

    sizes = {"linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    mixer = perturbed(build(kind, options=options, **sizes))
    hidden = torch.randn(80, 1, HIDDEN, device=interpreter.DEVICE)
    exact = build(kind, options=options, **sizes)
    exact.load_state_dict(mixer.state_dict())
    for parameter in exact.parameters():  # some of which refuse to be cast with their module
        parameter.data = parameter.data.double()
    found = []
    for model, backend, recompute in (
        (mixer, "torch", False), (mixer, "triton", False), (mixer, "triton", True), (exact, "torch", False),
    ):  # fmt: skip
        model.backend, model.recompute = backend, recompute
        x = hidden.to(next(model.out_proj.parameters()).dtype, copy=True).requires_grad_()
        out = model(x)[0]
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *parameters])
        found.append({"out": out} | dict(zip(["x", *names], gradients, strict=True)))
    for name, expected in found[0].items():
        assert expected.norm() > 0, f"{name} is zero, so comparing it shows nothing"
        truth = found[3][name]
        plain, error = (((x - truth).norm() / truth.norm()).item() for x in (expected, found[1][name]))
        assert error < max(2e-5, 3 * plain), f"{name}: relative error {error:.1e}, of the torch path {plain:.1e}"
        assert found[2][name].equal(found[1][name]), f"{name} differs when it is recomputed"
