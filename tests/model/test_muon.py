"""Which parameters Muon updates, and that it takes every map of a fused projection for itself."""

import pytest
import torch
from support.models import config, hybrid_model, one_process

PATTERN = "C-2-K-*-"
LINEAR_MAPS = {
    "C": {"in_proj.weight", "decay_up.weight", "gate_up.weight", "out_proj.weight"},
    "*": {"linear_qkv.weight", "linear_proj.weight", "taps_proj.weight"},
    "-": {"linear_fc1.weight", "linear_fc2.weight"},
}
LINEAR_MAPS |= {"2": LINEAR_MAPS["C"], "K": LINEAR_MAPS["C"]}
OTHERS = {
    "C": {
        "conv.weight", "conv.up", "conv.bias", "decay.A_log", "decay.dt_bias", "gate_up.bias", "out_norm.weight",
        "erase_bias.bias", "content_down", "content_up",
    },
    "*": {"conv.weight", "conv.up"}, "-": set(),
}  # fmt: skip
OTHERS |= {kind: OTHERS["C"] - {"erase_bias.bias", "content_down", "content_up"} for kind in "2K"}
LR = 0.01


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


@pytest.fixture(scope="module")
def model():
    options = {"content_rank": 4, "conv_bias": True, "short_convolution": "dynamic"}
    return hybrid_model(PATTERN, attention_convolution="dynamic", mixer=options)


@pytest.fixture(scope="module")
def optimizer(model):
    """Megatron's, of the model whose gradients are random numbers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp = DistributedDataParallel(config(), DistributedDataParallelConfig(), model)
    options = OptimizerConfig(
        optimizer="muon", lr=LR, weight_decay=0.0, clip_grad=0.0, muon_split_qkv=True, muon_coefficient_type="quintic"
    )
    optimizer = get_megatron_optimizer(options, [ddp])
    for p in model.parameters():
        p.main_grad.normal_()
    return optimizer


def test_linear_maps_go_to_muon_and_the_rest_to_adam(model, optimizer):
    from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer

    name_of = {p: name for name, p in model.named_parameters()}
    found = {}
    for one in optimizer.chained_optimizers:
        names = {name_of[p] for group in one.optimizer.param_groups for p in group["params"]}
        found.setdefault(type(one.optimizer).__name__, set()).update(names)
    assert found.keys() == {"TensorParallelMuon", "AdamW"}
    modules = {"*": "self_attention", "-": "mlp"}
    expected = {"TensorParallelMuon": set(), "AdamW": {"embedding.word_embeddings.weight", "output_layer.weight"}}
    expected["AdamW"] |= {name for name in name_of.values() if name.endswith("norm.weight")}
    for number, letter in enumerate(PATTERN):
        prefix = f"decoder.layers.{number}.{modules.get(letter, 'self_attention')}."
        expected["TensorParallelMuon"] |= {prefix + name for name in LINEAR_MAPS[letter]}
        expected["AdamW"] |= {prefix + name for name in OTHERS[letter]}
    assert found == expected
    spread = {name for p, name in name_of.items() if is_managed_by_layer_wise_optimizer(p)}
    assert spread == expected["TensorParallelMuon"]


def test_the_update_of_a_section_is_that_of_its_map_alone(model, optimizer):
    from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
    from emerging_optimizers.utils import fp32_matmul_precision

    def update(gradient):
        with fp32_matmul_precision("medium"):
            return LR * get_muon_scale_factor(*gradient.shape, mode="spectral") * newton_schulz(gradient, 5)

    mixers = [model.decoder.layers[i].self_attention for i in (0, 2, 4)]
    before = [mixer.in_proj.weight.detach().clone() for mixer in mixers]
    gradients = [mixer.in_proj.weight.main_grad.clone() for mixer in mixers]
    optimizer.step()
    for mixer, old, gradient in zip(mixers, before, gradients, strict=True):
        change = old - mixer.in_proj.weight.detach()
        sizes = list(mixer.local_sizes.values())
        for name, part, of in zip(mixer.local_sizes, change.split(sizes), gradient.split(sizes), strict=True):
            torch.testing.assert_close(part, update(of), rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert (change - update(gradient)).norm() > 0.1 * change.norm()
