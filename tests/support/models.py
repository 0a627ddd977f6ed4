"""A Megatron of one process, for tests that build layers and models in-process."""

import contextlib

import torch
import torch.distributed as dist

# Of a mixer, what the earlier form of CARVE and its neighbours have.
DELTA = {"mixer": {"conv_bias": True, "content_chunk": 128, "negative_eigenvalues": True, "erase": "delta"}}


@contextlib.contextmanager
def one_process(device: str = "cpu"):
    """Process group and parallel state of world size 1, with our letters and on a CPU its mode; undone at the end."""
    from megatron_carve import patches

    if device == "cpu":
        patches.cpu_mode.apply()
    patches.layer_symbols.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(11)
    torch.manual_seed(11)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        patches.mixed_precision_groups.revert()  # the mixers apply it, and the next
        patches.muon_parameters.revert()
        patches.layer_symbols.revert()
        if device == "cpu":
            patches.cpu_mode.revert()


def groups():
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def config(num_layers: int = 1, **changes):
    """A small configuration; `mixer` and any Megatron field can be given."""
    from megatron_carve.run.task import MixerTransformerConfig

    return MixerTransformerConfig(
        **{
            "num_layers": num_layers, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 12, "normalization": "RMSNorm", "add_bias_linear": False,
            "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "is_hybrid_model": True,
            "transformer_impl": "local", "attention_dropout": 0.0, "hidden_dropout": 0.0,
            "gradient_accumulation_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False,
            **changes,
        }
    )  # fmt: skip


def hybrid_model(
    pattern: str, spec=None, *, vocab_size: int = 64, length: int = 128, attention_convolution: str = "none", **changes
):
    """A HybridModel of `pattern` on one process."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_carve.specs import stack_spec

    return HybridModel(
        config(get_hybrid_total_layer_count(pattern), **changes),
        spec or stack_spec("local", attention_convolution=attention_convolution),
        vocab_size=vocab_size,
        max_sequence_length=length,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        pg_collection=groups(),
    )


def token_losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token losses [B, T] of [B, T+1] tokens."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    return model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())


@torch.no_grad()
def decoded(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of tokens [B, T], one after another from the memory of a static inference context."""
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(*tokens.shape)
    found = []
    for token in tokens.split(1, 1):
        positions = torch.full_like(token, context.sequence_len_offset)
        found.append(model(token, positions, None, inference_context=context, runtime_gather_output=True))
        context.sequence_len_offset += 1
    return torch.cat(found, 1)


def steps_of_fixed_size(monkeypatch) -> list[tuple[int, int]]:
    """Have an engine compute on a CPU what CUDA graphs of its steps would: (requests, tokens with padding) of those, as
    they come."""
    from types import SimpleNamespace

    from megatron_carve.use.steps import Steps

    sizes: list[tuple[int, int]] = []

    def capture(self):
        logits = self._forward()

        def replay():
            sizes.append((self.context.get_active_request_count(), self.context.padded_active_token_count))
            logits.copy_(self._forward())

        return SimpleNamespace(replay=torch.no_grad()(replay)), logits

    monkeypatch.setattr(Steps, "_capture", torch.no_grad()(capture))
    return sizes


def count_launches(monkeypatch) -> dict[str, int]:
    """How often mixers and products run in few launches from now on; "allowed": whether they may."""
    from megatron_carve.model import decoding
    from megatron_carve.model.mixers import next_token

    counted = {"mixers": 0, "products": 0, "allowed": True}

    def count(module, name, key):
        real = getattr(module, name)

        def counting(*args, **options):
            counted[key] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, counting)

    count(next_token, "mix_token", "mixers")
    count(decoding, "normed_product", "products")
    count(decoding, "add_product", "products")
    decodes = decoding.DecodingLayer._decodes
    monkeypatch.setattr(decoding.DecodingLayer, "_decodes", lambda *a: counted["allowed"] and decodes(*a))
    return counted


def assert_few_launches(launches: dict[str, int], model) -> None:
    """Steps were computed, each with all mixers and MLPs in few launches, but for mixers of dynamic taps."""
    letters = model.decoder.layer_type_list
    mixers = 0 if model.config.mixer.get("short_convolution") == "dynamic" else sum(map(letters.count, "C2K"))
    products = 2 * (mixers + letters.count("-"))
    steps = launches["products"] // products if products else 0
    assert bool(steps) == bool(products)
    assert launches == {"mixers": mixers * steps, "products": products * steps, "allowed": True}
