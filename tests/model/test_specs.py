"""Layer letters, stacks and specs, as a user selects them."""

import subprocess
import sys

import pytest
import torch
from support.models import config, groups, hybrid_model, one_process, token_losses

from megatron_carve.model.mixers.carve import CarveMixer
from megatron_carve.model.mixers.gdn2 import GDN2Mixer


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 64, (2, length + 1))


def mixers(stack) -> list[str]:
    return [type(layer.self_attention).__name__ if hasattr(layer, "self_attention") else "-" for layer in stack.layers]


def test_letters_build_their_layers_and_all_learn():
    model = hybrid_model("C-2*-K")
    assert mixers(model.decoder)[0] == "CarveMixer"
    assert mixers(model.decoder)[2:4] == ["GDN2Mixer", "WindowedSelfAttention"]
    assert mixers(model.decoder)[5] == "KDAMixer"
    assert model.decoder.layer_type_list == list("C-2*-K")
    token_losses(model, tokens(100)).mean().backward()  # more than one content chunk
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == ["decoder.layers.0.self_attention.content_down"]


def test_a_letter_without_a_layer_is_refused():
    import dataclasses

    from megatron_carve.specs import stack_spec

    spec = stack_spec("local")
    spec.submodules = dataclasses.replace(spec.submodules, mixer_layers={})
    with pytest.raises(ValueError, match="layer letter 'C' is in the pattern, but this stack spec has no layer of it"):
        hybrid_model("C-2-", spec)


def test_multi_token_prediction_heads_contain_our_layers():
    from megatron_carve import patches
    from megatron_carve.model.stack import MixerStack

    patch = patches.mtp_stack(MixerStack)
    patch.apply()
    try:
        model = hybrid_model("C-*-/2-", mtp_num_layers=1)
        inner = model.mtp.layers[0].mtp_model_layer
        assert mixers(inner)[0] == "GDN2Mixer"
        token_losses(model, tokens()).mean().backward()
        assert inner.layers[0].self_attention.in_proj.weight.grad.abs().max() > 0
    finally:
        patch.revert()


def test_local_layers_have_the_checkpoint_keys_of_fused_ones():
    from megatron.core import parallel_state

    model = hybrid_model("C*-")
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    keys = {value.key for value in model.sharded_state_dict(metadata=metadata).values()}
    for expected in (
        "decoder.layers.0.self_attention.in_proj.layer_norm_weight",
        "decoder.layers.0.self_attention.in_proj.weight",
        "decoder.layers.0.self_attention.decay.A_log",
        "decoder.layers.0.self_attention.content_up",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_norm.weight",
        "decoder.final_norm._extra_state",
    ):
        assert expected in keys
    assert not [key for key in keys if "input_layernorm" in key or "pre_mlp_layernorm" in key]


def test_fused_projections_are_stored_by_named_section():
    from megatron.core import parallel_state

    model = hybrid_model("2")
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = model.sharded_state_dict(metadata=metadata)
    stored = state["decoder.layers.0.self_attention.in_proj.weight"].build()
    rows = {part.key.rpartition(".")[2]: part.data for part in stored}
    sizes = {"query": 16, "key": 16, "value": 48, "erase": 16, "write": 48, "decay": 12, "gate": 12}
    assert {name: len(data) for name, data in rows.items()} == sizes
    whole = model.decoder.layers[0].self_attention.in_proj.weight
    assert torch.equal(torch.cat(list(rows.values())), whole)


@pytest.mark.parametrize(("name", "mixer"), [("carve_stack_spec", CarveMixer), ("gdn2_stack_spec", GDN2Mixer)])
def test_stack_specs_work_through_megatrons_own_arguments(name, mixer, monkeypatch):
    """As Megatron-LM's pretrain_hybrid.py does: its own parser, configuration and builder, a plain --spec."""
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.hybrid import HybridModelBuilder

    from megatron_carve import patches

    monkeypatch.setattr(sys, "argv", [
        "pretrain_hybrid.py", "--spec", "megatron_carve.specs", name, "--hybrid-layer-pattern", "G-*-",
        "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4", "--swiglu",
        "--normalization", "RMSNorm", "--disable-bias-linear", "--linear-num-key-heads", "2",
        "--linear-num-value-heads", "4", "--linear-key-head-dim", "8", "--linear-value-head-dim", "12",
        "--position-embedding-type", "rope", "--seq-length", "40", "--max-position-embeddings", "40",
        "--micro-batch-size", "1", "--train-iters", "1", "--lr", "0.001", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "64", "--padded-vocab-size", "64", "--transformer-impl", "local",
        "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm",
        "--no-rope-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion",
        "--attention-dropout", "0", "--hidden-dropout", "0",
    ])  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    patches.layer_symbols.revert()  # a stock script does not know our letters
    try:
        args = parse_args()
        validate_args(args)
        model = HybridModelBuilder(hybrid_config_from_args(args)).build_model(groups())
    finally:
        patches.layer_symbols.apply()
    assert isinstance(model.decoder.layers[0].self_attention, mixer)
    losses = token_losses(model, tokens())
    losses.mean().backward()
    assert losses.shape == (2, 40)
    assert model.decoder.layers[0].self_attention.in_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("spec", "mixer"), [("carve_gpt_spec", "CarveMixer"), ("gdn2_gpt_spec", "GDN2Mixer")])
def test_gpt_style_models_take_the_mixers(spec, mixer):
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_carve import specs

    transformer = config(
        4, is_hybrid_model=False, experimental_attention_variant="gated_delta_net", linear_attention_freq=2
    )
    model = GPTModelBuilder(
        GPTModelConfig(
            transformer=transformer, vocab_size=64, seq_length=64, position_embedding_type="rope",
            transformer_layer_spec=getattr(specs, spec),
        )
    ).build_model(groups())  # fmt: skip
    assert mixers(model.decoder) == [mixer, "WindowedSelfAttention"] * 2
    token_losses(model, tokens()).mean().backward()
    assert model.decoder.layers[2].self_attention.in_proj.weight.grad.abs().max() > 0
    assert model.decoder.layers[2].mlp.linear_fc1.weight.grad.abs().max() > 0


def test_attention_window_counts_the_token_itself():
    from megatron_carve.recipe import load_recipe
    from megatron_carve.recipe.arguments import owned_settings

    keys = 5
    recipe = load_recipe("debug", [f"model.attention_window={keys}", "model.pattern='*'"])
    settings = owned_settings(recipe, vocab_size=64, layers="local", device="cpu")
    window = tuple(map(int, settings["window_size"][1].split(",")))
    model = hybrid_model("*", window_size=window)
    attention = model.decoder.layers[0]
    x = torch.randn(20, 1, 32, requires_grad=True)
    rotary = model.rotary_pos_emb(20)
    out, _ = attention(x, attention_mask=None, rotary_pos_emb=rotary)
    (reach,) = torch.autograd.grad(out[12].sum(), x)
    seen = (reach.abs().amax((1, 2)) > 0).nonzero().flatten().tolist()
    assert seen == [8, 9, 10, 11, 12]


def test_transformer_engine_layers_without_transformer_engine():
    from megatron_carve.specs import HAVE_TE, toolkit

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ImportError, match=r"model.layers: transformer_engine is not installed; install"):
        toolkit("transformer_engine")


def test_of_equal_logits_the_first_is_the_prediction():
    from megatron_carve.run.task import right_predictions

    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [1.0, 5.0, 5.0]]])
    assert right_predictions(logits, torch.tensor([[1, 0, 1]])).tolist() == [[1.0, 1.0, 1.0]]
    assert right_predictions(logits, torch.tensor([[2, 2, 2]])).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.slow
def test_importing_them_warns_of_nothing():
    """Megatron warns of every optional package that is missing."""
    done = subprocess.run([sys.executable, "-c", "import megatron_carve.specs"], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and not done.stdout
