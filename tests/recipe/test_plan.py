"""The plan: its arithmetic against models that are built, and what a user sees."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from support.models import config, groups, hybrid_model, one_process

from megatron_carve import plan
from megatron_carve.data.text import Texts, prepare_folder
from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.model.context.documents import Documents
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.recipe import check_layout, estimate, load_recipe

SMALL = [
    "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4", "model.vocab_size=64",
    "model.vocab_multiple=1", "mixer.num_key_heads=2", "mixer.num_value_heads=4", "mixer.key_head_dim=32",
    "mixer.value_head_dim=32", "mixer.content_rank=4",
]  # fmt: skip


EXPERTS = [
    "megatron.num_experts=4", "megatron.moe_ffn_hidden_size=24", "megatron.moe_token_dispatcher_type=alltoall"
]  # fmt: skip
SHARED = ["megatron.moe_shared_expert_intermediate_size=40", "megatron.moe_shared_expert_gate=true"]


def small(*changes: str):
    return load_recipe("debug", [*SMALL, *changes])


def megatron_sizes(recipe) -> dict:
    x = recipe.mixer
    names = {"num_experts": "num_moe_experts", "swiglu": "gated_linear_unit"}
    return {
        **{names.get(k, k): v for k, v in recipe.megatron.items()},
        "linear_num_key_heads": x.num_key_heads, "linear_num_value_heads": x.num_value_heads,
        "linear_key_head_dim": x.key_head_dim, "linear_value_head_dim": x.value_head_dim, "mixer": x.options,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


@pytest.mark.parametrize(
    ("pattern", "convolution"),
    [
        ("C-2-", "none"), ("C-*-2-", "static"), ("C-*-/2-", "none"), ("C-CE*E", "none"), ("CE/2E", "none"),
        ("*-/*-", "dynamic"),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_built_model(pattern, convolution):
    from megatron_carve import patches
    from megatron_carve.model.stack import MixerStack

    options = [f"model.attention_convolution={convolution}", "model.num_query_groups=2", "mixer.convolution_rank=3"]
    recipe = small(f"model.pattern={pattern}", *options, *(EXPERTS if "E" in pattern else []))
    patch = patches.mtp_stack(MixerStack)
    patch.apply()
    try:
        model = hybrid_model(
            pattern, attention_convolution=convolution, num_query_groups=2,
            mtp_num_layers=pattern.count("/") or None, **megatron_sizes(recipe),
        )  # fmt: skip
    finally:
        patch.revert()
    assert sum(estimate.parameters(recipe, 64).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "more",
    [["megatron.swiglu=false", *SHARED], ["megatron.add_bias_linear=true"], ["megatron.add_qkv_bias=true"]],
    ids=lambda more: more[0],
)
def test_parameters_are_those_of_megatrons_other_mlps_and_biases(more):
    recipe = small("model.pattern=C-*E", "model.num_query_groups=2", *EXPERTS, *more)
    model = hybrid_model("C-*E", num_query_groups=2, **megatron_sizes(recipe))
    assert sum(estimate.parameters(recipe, 64).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("more", [[], SHARED, ["megatron.moe_router_topk=3"]], ids=["plain", "shared", "top 3"])
def test_parameters_of_experts_are_those_of_the_built_layer(more):
    recipe = small("model.pattern=E", *EXPERTS, *more)
    (layer,) = hybrid_model("E", **megatron_sizes(recipe)).decoder.layers
    built = {name: p.numel() for name, p in layer.named_parameters()}
    routed = {name: n for name, n in built.items() if ".local_experts." in name}
    x = recipe.experts
    assert x.parameters == sum(built.values())
    assert x.number * x.of_one_expert == sum(routed.values())
    idle = x.parameters - x.active_parameters
    assert idle == sum(n for name, n in routed.items() if int(name.split(".")[3]) >= x.top_k)
    assert estimate.active_parameters(recipe, 64) == sum(estimate.parameters(recipe, 64).values()) - idle


def test_experts_that_see_a_projection_of_a_token_are_as_an_mlp_of_its_size_between_two_projections():
    """Which Megatron builds with Transformer Engine alone."""
    x = small("model.pattern=E", *EXPERTS, "megatron.moe_latent_size=28").experts
    assert x.of_one_expert == 3 * 28 * 24
    assert x.outside_routed - small("model.pattern=E", *EXPERTS).experts.outside_routed == 32 * 28 + 28 * 32


@pytest.mark.parametrize("more", [[], SHARED], ids=["plain", "shared"])
def test_saved_numbers_of_experts_are_those_that_the_layer_keeps(more):
    """With the fused SwiGLU of a GPU, uncompiled."""
    recipe = small("model.pattern=E", *EXPERTS, *more)
    built = hybrid_model("E", bias_activation_fusion=True, **megatron_sizes(recipe))
    layer, tokens = built.decoder.layers[0].mlp, 128
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        of_channels = x.is_floating_point() and x.shape[-1] >= 24  # of the routing there are a few numbers a token
        if of_channels and x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    compiled = torch.compiler.set_stance("force_eager")
    with compiled, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(torch.randn(tokens, 1, 32, requires_grad=True))
    numbers = estimate.saved_numbers(recipe, "E")
    assert sum(kept.values()) == (sum(numbers.values()) - numbers["input"]) * tokens


def test_operations_of_experts_are_those_of_the_ones_that_a_token_is_sent_to():
    """As many as of an MLP of their width together, and the router's."""
    of_all = [estimate.forward_flops_per_token(small(f"model.pattern={x}-", *EXPERTS), 64) for x in ("E", "")]
    as_mlp = small("model.pattern=-", "model.ffn_hidden_size=48")  # two of 24
    assert of_all[0] - of_all[1] == 2 * (estimate.layer_parameters(as_mlp, "-") + 4 * 32)


def test_memory_of_experts_falls_with_the_ranks_that_they_are_spread_over():
    def found(*changes):
        many = ["model.pattern=C-CE", "megatron.num_experts=8", "training.precision=bf16"]
        return estimate.memory(load_recipe("carve_1p3b_hybrid", [*many, *changes]), 32000, 8)

    routed = 8 * 3 * 2048 * 5632
    one, two = found(), found("megatron.expert_model_parallel_size=2")
    assert one["weights"] - two["weights"] == 2 * routed / 2
    assert one["gradients"] - two["gradients"] == 4 * routed / 2
    assert one["optimizer"] == two["optimizer"]  # spread over 8 before, over the 4 that hold the same now
    assert one["activations"] == two["activations"]
    split = found("parallel.tensor=2")
    whole = found("parallel.tensor=2", "megatron.expert_tensor_parallel_size=1")
    assert whole["weights"] - split["weights"] == 2 * routed / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "megatron.num_experts: expected an integer of at least 1 with the layer E, got null"),
        (["megatron.num_experts=1"], "moe_router_topk: expected at most num_experts=1, got 2, Megatron's default"),
        ([*EXPERTS, "megatron.expert_model_parallel_size=3"], "expected a divisor of num_experts=4, got 3"),
        (
            [*EXPERTS, "parallel.tensor=2", "parallel.sequence=false"],
            "parallel.sequence: expected true with the layer E",
        ),
        ([*EXPERTS, "megatron.moe_latent_size=x"], "moe_latent_size: expected an integer of at least 1 .* got 'x'"),
    ],
)
def test_experts_that_could_not_be_built_end_in_one_line(words, message):
    with pytest.raises(ValueError, match=message):
        small("model.pattern=C-CE", *words)


@pytest.mark.parametrize(
    ("words", "gpus", "message"),
    [
        (["megatron.expert_model_parallel_size=4"], 2, "expert_model_parallel_size: expected, .* of the 2 .* got 4"),
        (["megatron.expert_model_parallel_size=4", "parallel.tensor=2"], 4, "times .*=2 .* the 4 processes .* got 4"),
        (["parallel.tensor=2", "megatron.moe_ffn_hidden_size=3"], 2, "moe_ffn_hidden_size: .* 2 tensor ranks, got 3"),
        (
            ["parallel.tensor=2", "megatron.moe_shared_expert_intermediate_size=3"], 2,
            "moe_shared_expert_intermediate_size: expected a multiple of parallel.tensor=2, got 3",
        ),
    ],
)  # fmt: skip
def test_experts_that_do_not_spread_end_in_one_line(words, gpus, message):
    recipe = small("model.pattern=C-CE", "model.vocab_multiple=2", "training.global_batch_size=64", *EXPERTS, *words)
    with pytest.raises(ValueError, match=message):
        check_layout(recipe, gpus)


class OneOfSeveral:
    """A context-parallel group as its first rank sees it; what all send each other, it sends itself."""

    def __init__(self, size):
        self.size, self.rank = lambda: size, lambda: 0


def numbers_of_layer(layer: torch.nn.Module, tokens: int, **options) -> int:
    """Float32 numbers that a layer keeps for the backward of so many tokens, its input among them."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters and x.dtype == torch.float32:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(torch.randn(tokens, 1, 32, requires_grad=True), None, **options)
    return sum(kept.values())


def numbers_kept(recipe, letter, tokens) -> tuple[int, int]:
    """(those of all tensors that a mixer keeps for the backward, those of copies of its parameters' shares), with the
    kernels of a GPU, in Triton's interpreter."""
    from support import interpreter  # noqa: F401

    from megatron_carve.model.context import exchange
    from megatron_carve.specs import mixer_layer_spec

    kind, context = MIXER_LETTERS[letter], recipe.parallel.context
    spec = mixer_layer_spec(kind, "local").submodules.self_attention
    settings = config(mixer_backend="triton", mixer_recompute=recipe.model.mixer_recompute, **megatron_sizes(recipe))
    collection = groups()
    if context > 1:
        collection.cp = OneOfSeveral(context)
    mixer = spec.module(settings, spec.submodules, 1, options=recipe.mixer.options, pg_collection=collection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "all_to_all", lambda group, x: x.clone())
        kept = numbers_of_layer(mixer, tokens)
    copied = not recipe.model.mixer_recompute and context > 1
    return kept, copied * sum(p.numel() for p in mixer.conv.parameters()) // context


DYNAMIC = [
    "mixer.erase=delta", "mixer.content_rank=0", "mixer.short_convolution=dynamic", "mixer.convolution_rank=4"
]  # fmt: skip


@pytest.mark.parametrize(("letter", "options"), [*((letter, []) for letter in MIXER_LETTERS), ("C", DYNAMIC)])
@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize(
    ("projections", "context"), [("low_rank", 1), ("full_rank", 1), ("low_rank", 2)], ids=lambda value: str(value)
)
def test_saved_numbers_are_those_that_a_layer_keeps(letter, options, recompute, projections, context):
    recipe = small(
        f"model.mixer_recompute={recompute}", f"mixer.decay_projection={projections}",
        f"mixer.output_gate_projection={projections}", f"parallel.context={context}", *options,
    )  # fmt: skip
    tokens = 128
    numbers = estimate.saved_numbers(recipe, letter)
    expected = (sum(numbers.values()) - numbers["input"]) * tokens  # the norm before the mixer keeps it
    x = recipe.mixer
    found, of_shares = numbers_kept(recipe, letter, tokens)
    if recompute == "false":  # too few to be in the plan
        if letter != "C":
            expected += x.key_dim // context  # rates, which are then of every channel
        elif x.erase == "diagonal":
            expected += 3 * x.num_value_heads * x.key_head_dim // context  # rates and both biases, of every value head
    if letter == "C" and x.content_rank and recompute == "false":  # means, codes and content terms
        expected += tokens // 64 * x.num_value_heads * (x.value_head_dim + x.content_rank + x.key_head_dim)
    assert found - of_shares == expected


def test_memory_of_one_sequence_over_four_gpus():
    """65,536 tokens on H200s, by heads; GiB of tensors at the peak. The CARVE model is one before the published form,
    of GDN-2's sizes."""
    words = [
        "parallel.context=4", "training.seq_length=65536", "training.micro_batch_size=1",
        "training.global_batch_size=1", "training.tokens=null", "training.steps=10",
    ]  # fmt: skip
    carve = [f"model.pattern={'C-' * 18}", "mixer.erase=delta"]
    for more, measured in (([], 56.1), (carve, 52.2)):
        recipe = load_recipe("gdn2_1p3b_recurrent", [*words, *more])
        assert sum(estimate.memory(recipe, 32000, 4).values()) / 2**30 == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("convolution", ["static", "dynamic"])
def test_what_a_convolution_adds_to_attention(convolution):
    """To what its layer keeps, with the kernels of a GPU in Triton's interpreter, and to the operations of a step."""
    from support import interpreter  # noqa: F401

    from megatron_carve.run.task import layer_flops
    from megatron_carve.specs import stack_spec

    heads = ["model.attention_head_dim=32", "model.num_query_groups=2", "model.pattern='*'"]
    recipe, without = (small(*heads, f"model.attention_convolution={kind}") for kind in (convolution, "none"))
    tokens, kept = 128, {}
    for kind in (convolution, "none"):
        spec = stack_spec("local", attention_convolution=kind).submodules.attention_layer.submodules.self_attention
        sizes = {"kv_channels": 32, "num_query_groups": 2, **megatron_sizes(recipe)}
        attention = build_module(spec, config(mixer_backend="triton", **sizes), layer_number=1, pg_collection=groups())
        kept[kind] = numbers_of_layer(attention, tokens)
    names = estimate.saved_numbers(recipe, "*").keys() - estimate.saved_numbers(without, "*").keys()
    assert names == ({"convolved", "features"} if convolution == "dynamic" else {"convolved"})
    added = (sum(estimate.saved_numbers(r, "*").values()) for r in (recipe, without))
    assert kept[convolution] - kept["none"] == tokens * (next(added) - next(added))
    args = argparse.Namespace(
        **{k: v for k, v in megatron_sizes(recipe).items() if k != "mixer"}, mixer=recipe.mixer.options,
        linear_conv_kernel_dim=4, hidden_size=32, kv_channels=32, num_attention_heads=4, num_query_groups=2,
        group_query_attention=True, attention_convolution=convolution,
    )  # fmt: skip
    more = estimate.layer_parameters(recipe, "*") - estimate.layer_parameters(without, "*")
    assert layer_flops(args, "*") == 2 * more > 0


@pytest.mark.parametrize("convolution", ["none", "static"])
def test_saved_numbers_of_attention_by_heads(convolution):
    """Of documents over two ranks, with the convolution's kernels of a GPU in Triton's interpreter."""
    from support import interpreter  # noqa: F401

    from megatron_carve.model.context import exchange, state_passing
    from megatron_carve.specs import stack_spec

    recipe = small(
        "model.attention_head_dim=32", "model.pattern='*'", f"model.attention_convolution={convolution}",
        "parallel.context=2", "data.documents=apart", "data.text=x",
    )  # fmt: skip
    tokens, two = 128, groups()
    two.cp = OneOfSeveral(2)
    spec = stack_spec("local", attention_convolution=convolution).submodules.attention_layer.submodules.self_attention
    settings = config(mixer_backend="triton", kv_channels=32, **megatron_sizes(recipe))
    attention = build_module(spec, settings, layer_number=1, pg_collection=two)
    angles = torch.randn(tokens, 1, 1, 32)
    documents = Documents.of_rows(torch.tensor([[0, 70, 71]], dtype=torch.int32), 2 * tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "all_to_all", lambda group, x, *splits: x.clone())
        patch.setattr(state_passing, "all_to_all", lambda group, x, received, sent: x.new_zeros(0, *x.shape[1:]))
        found = numbers_of_layer(attention, tokens, rotary_pos_emb=angles, packed_seq_params=documents)
    numbers = estimate.saved_numbers(recipe, "*")
    expected = (sum(numbers.values()) - numbers["input"]) * tokens  # the norm before attention keeps it
    # Not in the plan: sines and cosines for queries and keys, the logarithms of softmax's sums, the mask of a CPU, the
    # tokens before a shard.
    more = 4 * tokens * 32 + 4 * tokens + (2 * tokens) ** 2 + (convolution == "static") * 3 * (3 * 128)
    assert found == expected + more


@pytest.mark.parametrize("convolution", ["none", "static"])
def test_saved_numbers_of_attention_by_window(convolution):
    """Of one of two ranks, the first, with torch's attention in the place of Transformer Engine's."""
    from support import interpreter  # noqa: F401

    from megatron_carve.model.context import exchange, state_passing, windows
    from megatron_carve.specs import stack_spec

    window, tokens = 16, 128

    class ByWindow(torch.nn.Module):
        def forward(self, *by_head, **_):
            q, k, v, *_ = by_head
            return windows.attend_by_window(OneOfSeveral(2), attend, q, k, v, window)

    def attend(*by_head):
        by_batch = (x.movedim(0, 2) for x in by_head)
        return F.scaled_dot_product_attention(*by_batch, is_causal=True).movedim(2, 0).flatten(2)

    recipe = small(
        "model.attention_head_dim=32", "model.pattern='*'", f"model.attention_convolution={convolution}",
        "parallel.context=2", "model.layers=transformer_engine", f"model.attention_window={window}",
        f"training.seq_length={2 * tokens}",
    )  # fmt: skip
    two = groups()
    two.cp = OneOfSeveral(2)
    spec = stack_spec("local", attention_convolution=convolution).submodules.attention_layer.submodules.self_attention
    settings = config(mixer_backend="triton", kv_channels=32, **megatron_sizes(recipe))
    attention = build_module(spec, settings, layer_number=1, pg_collection=two)
    attention.core_attention = ByWindow()
    with pytest.MonkeyPatch.context() as patch:
        for module in (exchange, windows):
            patch.setattr(module, "all_to_all", lambda group, x, *splits: x.clone())
        patch.setattr(state_passing, "all_to_all", lambda group, x, received, sent: x.new_zeros(0, *x.shape[1:]))
        found = numbers_of_layer(attention, tokens, rotary_pos_emb=torch.randn(tokens, 1, 1, 32))
    numbers = estimate.saved_numbers(recipe, "*")
    expected = (sum(numbers.values()) - numbers["input"]) * tokens  # the norm before attention keeps it
    # Not in the plan: sines and cosines for queries and keys, the logarithms of softmax's sums, tokens before a shard.
    more = 4 * tokens * 32 + 4 * (tokens + 2 * window) + (convolution == "static") * 3 * (3 * 128)
    assert found == expected + more


def test_saved_numbers_of_attention_whose_window_is_longer_than_a_piece():
    words = ["parallel.context=2", "model.layers=transformer_engine", "training.seq_length=128"]
    for window, by_window in ((32, True), (33, False)):
        numbers = estimate.saved_numbers(small(*words, f"model.attention_window={window}"), "*")
        assert ("pieces" in numbers) == by_window
    for way, by_window in (("a2a", False), ("all_gather", True), ("[all_gather]", True)):
        numbers = estimate.saved_numbers(
            small(*words, "model.attention_window=32", f"megatron.cp_comm_type={way}"), "*"
        )
        assert ("pieces" in numbers) == by_window


def test_attention_sees_its_window_in_the_count_of_operations():
    long = ["model.pattern=*-", "training.seq_length=4096"]
    full = estimate.forward_flops_per_token(small(*long, "model.attention_window=null"), 64)
    window = estimate.forward_flops_per_token(small(*long, "model.attention_window=1"), 64)
    none = estimate.forward_flops_per_token(small("model.pattern=-"), 64)
    products = 2 * estimate.layer_parameters(small(*long), "*")
    assert window - none - products == 4 * 32
    assert full - none - products == 4 * 32 * 4097 / 2


@pytest.mark.parametrize("recipe", ["gdn2_1p3b_recurrent", "gdn2_1p3b_hybrid"])
def test_published_parameters_are_printed(recipe, capsys):
    assert plan.main([recipe, "--gpus", "8", "--tokens-per-second", "1e4"]) == 0
    said = capsys.readouterr().out
    # published are those of the layers alone
    layers = {"gdn2_1p3b_recurrent": 1_302_638_112, "gdn2_1p3b_hybrid": 1_300_314_384}[recipe]
    assert f"{layers + 2304 + 2 * 2304 * 32000:,}" in said
    for part in ("tensor 1 * pipeline 1 * context 1 * data 8", "524,288 tokens", "GPU hours", "of 80"):
        assert part in said


def test_muon_keeps_one_moment_of_what_is_in_layers():
    adam, muon = (
        estimate.memory(load_recipe("carve_1p3b_recurrent", words), 32000, 1)["optimizer"]
        for words in ([], ["megatron.optimizer=muon"])
    )
    assert adam - muon == pytest.approx(4 * 1_360_825_344)


def test_user_buffers_are_planned_beside_tensors(capsys):
    """Twelve of all tokens' hidden states, eight of them of one byte with fp8."""
    words = ["parallel.tensor=2", "megatron.tp_comm_overlap=true", "training.micro_batch_size=4"]
    recipe, without = (load_recipe("carve_1p3b_hybrid", more) for more in (words, words[:1] + words[2:]))
    one = 4 * 4096 * 2048 * 2
    assert estimate.user_buffer_bytes(recipe) == 12 * one
    assert estimate.user_buffer_bytes(load_recipe("carve_1p3b_hybrid", [*words, "parallel.context=2"])) == 6 * one
    in_fp8 = load_recipe("carve_1p3b_hybrid", [*words, "model.pattern='*-'", "megatron.fp8=hybrid"])
    assert estimate.user_buffer_bytes(in_fp8) == 8 * one
    assert estimate.memory(recipe, 32000, 2) == estimate.memory(without, 32000, 2)
    for words_of, lines in ((words, 1), (words[:1], 0)):
        assert plan.main(["carve_1p3b_hybrid", *words_of]) == 0
        assert len(re.findall(r"user buffers +0\.8", capsys.readouterr().out)) == lines


def test_memory_falls_with_what_divides_it():
    def total(*changes: str, gpus: int = 8) -> float:
        return sum(estimate.memory(load_recipe("carve_1p3b_hybrid", changes), 32000, gpus).values())

    plain = total()
    for changes in (
        ["model.mixer_recompute=true"], ["parallel.tensor=2"], ["parallel.context=2"],
        ["megatron.recompute_granularity=full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1"],
    ):  # fmt: skip
        assert total(*changes) < plain, changes
    assert total("training.micro_batch_size=2") > plain
    first, last = "parallel.pipeline=6", "parallel.pipeline=2"  # whichever stage is the fullest
    assert "logits and loss" not in estimate.memory(load_recipe("carve_1p3b_hybrid", [first]), 32000, 6)
    assert "logits and loss" in estimate.memory(load_recipe("carve_1p3b_hybrid", [last]), 256000, 2)
    assert total(gpus=1) > plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["carve_1p3b_hybrid", "parallel.tensor=2", "--gpus", "3"],
            "processes that tensor .* context = 2 divides, got 3",
        ),
        (["carve_1p3b_hybrid", "--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["carve_1p3b_hybrid", "--gpus", "3"], "global_batch_size: expected a multiple of .* 1 \\* 3, got 1024"),
        (["carve_1p3b_hybrid", "--gpu-memory", "-1"], "--gpu-memory: expected a number above 0, got -1"),
        (["carve_1p3b_hybrid", "--tokens-per-second", "0"], "--tokens-per-second: expected a number above 0, got 0"),
        (["carve_1p3b_hybrid", "model.pattern=C-G-"], "model.pattern: expected layers of C, 2, K, \\*, -.* got G"),
        (["nothing"], "nothing"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert plan.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said


def test_operations_of_a_small_model_are_not_rounded_away(capsys):
    assert plan.main(["debug"]) == 0
    found = re.search(r"operations per token: (\S+) GFLOP", capsys.readouterr().out)
    assert found is not None
    recipe = load_recipe("debug")
    expected = 3 * estimate.forward_flops_per_token(recipe, plan.vocab_size(recipe)) / 1e9
    assert float(found[1]) == pytest.approx(expected, rel=1e-2)


def test_too_much_for_a_gpu_is_said(capsys):
    assert plan.main(["carve_1p3b_hybrid", "training.micro_batch_size=16"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


FULL_RECOMPUTE = [
    "megatron.recompute_granularity=full", "megatron.recompute_method=uniform", "megatron.recompute_num_layers=1",
]  # fmt: skip


def measured():
    """Recipe, overrides and numbers of runs on a GPU."""
    results = Path(__file__).parents[2] / "docs/results"
    for run in json.loads((results / "2026-11-27-h100-recipes.json").read_text()):
        yield pytest.param(*run["words"][:1], run["words"][1:], run, id=run["case"])
    for run in json.loads((results / "2026-11-25-h200-models.json").read_text()):
        if run["case"].startswith("gdn2"):  # CARVE's runs in this file were of the form before the published one
            words = [f"training.{key}={run[key]}" for key in ("micro_batch_size", "global_batch_size", "seq_length")]
            words += FULL_RECOMPUTE if "full" in run["case"] else []
            name = "gdn2_1p3b_hybrid" if "*" in run["pattern"] else "gdn2_1p3b_recurrent"
            yield pytest.param(name, words, run, id=run["case"])
    for run in json.loads((results / "2026-11-28-h200-layouts.json").read_text()):
        yield pytest.param(*run["words"][:1], run["words"][1:], run, id=f"{run['model']}, {run['layout']}")


@pytest.mark.parametrize(("name", "words", "run"), measured())
def test_memory_is_what_runs_took(name, words, run):
    """Of tensors at the peak of whole training steps, on the fullest GPU; the estimate may be 3 % off."""
    recipe = load_recipe(name, words)
    assert recipe.model.pattern == run["pattern"]
    assert sum(estimate.parameters(recipe, 32000).values()) == run["parameters"]
    planned = sum(estimate.memory(recipe, 32000, run.get("gpus", 1)).values())
    assert planned == pytest.approx(run["peak_allocated_bytes"], rel=0.03)


def test_what_the_data_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").write_text(f'{{"text": "{"x" * 999}"}}\n' * 20)

    def said(*words):
        assert (
            plan.main(["debug", "training.steps=10", "training.seq_length=50", "training.global_batch_size=16", *words])
            == 0
        )
        return [line for line in capsys.readouterr().out.splitlines() if "docs" in line or " MB" in line]

    assert said("data.text=docs.jsonl") == ["1 file of 0.0 MB, not tokenised yet"]
    prepare_folder("docs", Texts("docs.jsonl", load_tokenizer("bytes")), progress=False)
    assert said("data.indexed=[docs]") == [
        "train: docs/train: 19 documents, 19,000 tokens; the run sees 0.421 epochs of it",
        "validation: docs/validation: 1 documents, 1,000 tokens",
    ]
    assert said("data.text=docs.json") == [f"data.text: {tmp_path}/docs.json does not exist or is not a regular file"]
