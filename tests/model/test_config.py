"""Mixer configuration: what it refuses, and the sizes that follow from it, against sums written by hand."""

import dataclasses
import math

import pytest

from megatron_carve.model.config import CHUNK_TOKENS, MixerConfig, MixerOptions
from megatron_carve.model.variants import VARIANTS
from megatron_carve.recipe import Recipe, load_recipe

# Odd sizes that share no factor by accident, and two value heads for each key head.
TINY = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 3, "value_head_dim": 5, "conv_width": 3}
HIDDEN = 7

# Layers of TINY at hidden size 7: H=2, HV=4, K=3, V=5, so H*K=6 and HV*V=20; convolution over 6+6+20=32 channels.
COMMON = (
    7 * (6 + 6 + 20 + 6)  # query, key, value, erase
    + 6  # dt_bias per key channel
    + 5  # output norm, one weight for all heads
    + 20 * 7  # output projection
    + 7  # input norm
)  # fmt: skip
CONV, CONV_BIAS = 32 * 3, 32
# of rank 2: features of queries, keys and values, and a map up of two numbers for every tap
DYNAMIC = 7 * 3 * 2 + 32 * 3 * 2
WRITE = {"carve": 7 * 4, "gdn2": 7 * 20, "kda": 7 * 2 - 7 * 6}  # KDA has no erase gate
LOW_DECAY, FULL_DECAY = 7 * 5 + 5 * 6, 7 * 6
LOW_GATE, FULL_GATE = 7 * 5 + 5 * 20 + 20, 7 * 20
RATES = {"carve": 6, "gdn2": 2, "kda": 2}  # A_log: per key channel, or per key head
# the bias of the erase logits, and for all heads a map down V -> 2 and a map up 2 -> K
ERASE, CONTENT = 6, 2 * 5 + 3 * 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "value", "expected"),
        [
            ("decay_projection", "half_rank", "one of low_rank, full_rank"),
            ("decay_projection", None, "one of low_rank, full_rank"),
            ("output_gate_projection", "lowrank", "one of low_rank, full_rank"),
            ("output_gate_activation", "gelu", "one of silu, sigmoid, none"),
            ("short_convolution", "fixed", "one of static, dynamic, none"),
            ("convolution_rank", 0, "a positive integer"),
            ("convolution_rank", None, "an integer"),
            ("erase", "full", "one of diagonal, delta"),
            ("prediction", "next", "one of previous, decayed"),
            ("erase_bias", "low", "a number or null"),
            ("erase_bias", math.inf, "a finite number"),
            ("negative_eigenvalues", 1, "true or false"),
            ("conv_bias", "yes", "true or false"),
            ("content_rank", 8.0, "an integer"),
            ("content_rank", True, "an integer"),
            ("content_rank", -1, "an integer of at least 0"),
            ("content_chunk", "64", "an integer"),
            ("content_chunk", 0, "a positive multiple of 64"),
            ("content_chunk", -64, "a positive multiple of 64"),
            ("content_chunk", 96, "a positive multiple of 64"),
            ("content_grad", True, "one of full, detached"),
            ("num_key_heads", 0, "a positive integer"),
            ("num_value_heads", -2, "a positive integer"),
            ("key_head_dim", None, "an integer"),
            ("value_head_dim", 0, "a positive integer"),
            ("conv_width", 0, "a positive integer"),
        ],
    )
    def test_names_option_expected_and_actual(self, option, value, expected):
        with pytest.raises(ValueError) as error:
            MixerConfig(**{option: value})
        assert str(error.value) == f"{option}: expected {expected}, got {value!r}"

    @pytest.mark.parametrize(("keys", "values"), [(4, 6), (4, 2), (3, 4)])
    def test_value_heads_are_a_multiple_of_key_heads(self, keys, values):
        with pytest.raises(ValueError) as error:
            MixerConfig(num_key_heads=keys, num_value_heads=values)
        assert str(error.value) == f"num_value_heads: expected a multiple of num_key_heads={keys}, got {values}"

    def test_options_alone_are_checked_too(self):
        with pytest.raises(ValueError) as error:
            MixerOptions(content_rank="8")
        assert str(error.value) == "content_rank: expected an integer, got '8'"

    @pytest.mark.parametrize(
        "accepted",
        [
            {"content_chunk": 2 * CHUNK_TOKENS},
            {"content_rank": 0},
            {"erase_bias": -2},
            {"num_key_heads": 3, "num_value_heads": 9},
            {"conv_width": 1},
            {"output_gate_activation": "sigmoid", "content_grad": "detached", "negative_eigenvalues": True},
        ],
    )
    def test_edges_of_the_ranges_are_accepted(self, accepted):
        config = MixerConfig(**accepted)
        assert {name: getattr(config, name) for name in accepted} == accepted

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            MixerConfig().content_rank = 4


class TestSizes:
    def test_options_are_those_a_checkpoint_needs_beside_megatrons_sizes(self):
        config = MixerConfig(**TINY, content_rank=2, conv_bias=True)
        assert config.options == {
            "decay_projection": "low_rank",
            "output_gate_projection": "low_rank",
            "output_gate_activation": "silu",
            "short_convolution": "static",
            "convolution_rank": 16,
            "conv_bias": True,
            "negative_eigenvalues": False,
            "erase": "diagonal",
            "prediction": "previous",
            "erase_bias": None,
            "content_rank": 2,
            "content_chunk": 64,
            "content_grad": "full",
        }

    @pytest.mark.parametrize(
        ("kind", "options", "sizes"),
        [
            ("carve", {}, {"write": 4, "decay": 5, "gate": 5}),
            ("gdn2", {}, {"write": 20, "decay": 5, "gate": 5}),
            ("carve", {"decay_projection": "full_rank"}, {"write": 4, "decay": 6, "gate": 5}),
            ("kda", {}, {"write": 2, "decay": 5, "gate": 5}),
            ("gdn2", {"output_gate_projection": "full_rank"}, {"write": 20, "decay": 5, "gate": 20}),
            (
                "gdn2",
                {"short_convolution": "dynamic", "convolution_rank": 2},
                {"write": 20, "decay": 5, "gate": 5, "taps": 6},
            ),
            (
                "gdn2",
                {"decay_projection": "full_rank", "output_gate_projection": "full_rank"},
                {"write": 20, "decay": 6, "gate": 20},
            ),
        ],
    )
    def test_projection_sections(self, kind, options, sizes):
        sections = MixerConfig(**TINY, **options).projection_sections(kind)
        erase = {} if kind == "kda" else {"erase": 6}
        expected = {"query": 6, "key": 6, "value": 20, **erase, **sizes}
        assert [(s.name, s.size) for s in sections] == list(expected.items())

    @pytest.mark.parametrize(
        ("kind", "options", "expected"),
        [
            ("carve", {}, COMMON + CONV + LOW_DECAY + LOW_GATE + CONTENT),
            ("gdn2", {}, COMMON + CONV + LOW_DECAY + LOW_GATE),
            ("gdn2", {"conv_bias": True}, COMMON + CONV + CONV_BIAS + LOW_DECAY + LOW_GATE),
            (
                "carve",
                {"conv_bias": True, "decay_projection": "full_rank"},
                COMMON + CONV + CONV_BIAS + FULL_DECAY + LOW_GATE + CONTENT,
            ),
            ("gdn2", {"output_gate_projection": "full_rank"}, COMMON + CONV + LOW_DECAY + FULL_GATE),
            (
                "carve",
                {"decay_projection": "full_rank", "output_gate_projection": "full_rank"},
                COMMON + CONV + FULL_DECAY + FULL_GATE + CONTENT,
            ),
            ("carve", {"content_rank": 0, "output_gate_activation": "none"}, COMMON + CONV + LOW_DECAY),
            ("carve", {"short_convolution": "none", "conv_bias": True}, COMMON + LOW_DECAY + LOW_GATE + CONTENT),
            ("gdn2", {"short_convolution": "none", "output_gate_activation": "none"}, COMMON + LOW_DECAY),
            ("kda", {}, COMMON + CONV + LOW_DECAY + LOW_GATE),
            *(
                (
                    kind,
                    {"short_convolution": "dynamic", "convolution_rank": 2, "conv_bias": True},
                    COMMON + CONV + CONV_BIAS + DYNAMIC + LOW_DECAY + LOW_GATE,
                )
                for kind in ("gdn2", "kda")
            ),
        ],
    )
    def test_parameter_count_is_the_sum_of_the_tensors(self, kind, options, expected):
        expected += WRITE[kind] + RATES[kind] + (ERASE if kind == "carve" else 0)
        assert MixerConfig(**{**TINY, "content_rank": 2, **options}).parameter_count(kind, HIDDEN) == expected

    def test_the_papers_count_of_mixer_parameters(self):
        """q, k, v, erase, write, low-rank decay and content: 19.0 % fewer than GDN-2's 3,047,424 a layer at 125M."""
        recipe = load_recipe("carve_125m")
        carve, gdn2 = (recipe.mixer.paper_parameter_count(kind, 768) for kind in ("carve", "gdn2"))
        assert gdn2 == 768 * (4 * 768 + 768 + 64) + 64 * 768 == 3_047_424
        assert carve == 768 * (4 * 768 + 12 + 64) + 64 * 768 + 16 * (64 + 64)
        assert round(100 * (1 - carve / gdn2), 1) == 19.0

    @pytest.mark.parametrize(
        "irrelevant",
        [
            {"negative_eigenvalues": True},
            {"erase": "delta"},
            {"prediction": "decayed"},
            {"erase_bias": -1.0},
            {"content_chunk": 128},
            {"content_grad": "detached"},
            {"output_gate_activation": "sigmoid"},
        ],
    )
    def test_options_without_parameters_do_not_change_the_count(self, irrelevant):
        for kind in VARIANTS:
            assert MixerConfig(**TINY, **irrelevant).parameter_count(kind, HIDDEN) == MixerConfig(
                **TINY
            ).parameter_count(kind, HIDDEN)

    def test_content_rank_has_no_part_in_gdn2(self):
        assert MixerConfig(**TINY, content_rank=2).parameter_count("gdn2", HIDDEN) == MixerConfig(
            **TINY, content_rank=3
        ).parameter_count("gdn2", HIDDEN)

    def test_flops_add_the_recurrence_to_the_products(self):
        config = MixerConfig(**TINY, content_rank=2)
        recurrence = 4 * 8 * 3 * 5  # 8 K V for each of 4 value heads
        for kind in VARIANTS:
            assert config.flops_per_token(kind, HIDDEN) == 2 * config.parameter_count(kind, HIDDEN) + recurrence


class TestTensorParallel:
    @pytest.mark.parametrize(
        ("config", "legal"),
        [
            ({"num_key_heads": 12, "num_value_heads": 24, "value_head_dim": 8}, {1, 2, 4}),
            ({"num_key_heads": 12, "num_value_heads": 12, "value_head_dim": 9}, {1, 3}),
            ({"num_key_heads": 4, "num_value_heads": 4, "value_head_dim": 5}, {1}),
            ({"num_key_heads": 16, "num_value_heads": 16, "value_head_dim": 128}, {1, 2, 4, 8, 16}),
            # One low-rank projection is enough to tie the value head dim.
            (
                {"num_key_heads": 6, "num_value_heads": 6, "value_head_dim": 5, "decay_projection": "full_rank"},
                {1},
            ),
            # The features that dynamic taps are made of are divided too.
            (
                {
                    "num_key_heads": 8, "num_value_heads": 8, "value_head_dim": 8, "short_convolution": "dynamic",
                    "convolution_rank": 6,
                },
                {1, 2},
            ),
            # Without any, heads alone decide.
            (
                {
                    "num_key_heads": 6, "num_value_heads": 12, "value_head_dim": 5,
                    "decay_projection": "full_rank", "output_gate_projection": "full_rank",
                },
                {1, 2, 3, 6},
            ),
        ],
    )  # fmt: skip
    def test_legal_sizes(self, config, legal):
        config = MixerConfig(**config)
        listed = ", ".join(map(str, sorted(legal)))
        for size in range(1, 33):
            if size in legal:
                config.check_parallel(size)
                assert all(s.size % size == 0 for s in config.projection_sections("carve"))
            else:
                with pytest.raises(ValueError) as error:
                    config.check_parallel(size)
                assert f"tensor parallel size {size} does not divide" in str(error.value)
                assert str(error.value).endswith(f"legal sizes: {listed}")
                assert f"num_key_heads={config.num_key_heads}" in str(error.value)


def layer_parameters(recipe: Recipe) -> int:
    """Parameters of all layers, without embeddings and the final norm."""
    m = recipe.model
    h, heads = m.hidden_size, m.num_attention_heads
    head_dim = h // heads
    assert head_dim * heads == h
    counts = {
        "C": recipe.mixer.parameter_count("carve", h),
        "2": recipe.mixer.parameter_count("gdn2", h),
        "K": recipe.mixer.parameter_count("kda", h),
        "*": 4 * h * h + h,  # query, key, value and output projections, input norm
        "-": 3 * h * m.ffn_hidden_size + h,  # gate, up and down projections, input norm
    }
    return sum(counts[letter] for letter in m.pattern)


class TestPublishedSizes:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("gdn2_1p3b_recurrent", 1_302_638_112),
            ("gdn2_1p3b_hybrid", 1_300_314_384),
            ("gdn2_125m", 101_598_096),
            ("kda_125m", 87_552_912),
            ("kda_1p3b_hybrid", 1_253_206_560),
            ("carve_125m", 94_673_664),
            ("carve_1p3b_recurrent", 1_360_825_344),
            ("carve_1p3b_hybrid", 1_328_924_928),
        ],
    )
    def test_parameters_of_the_layers(self, name, parameters):
        assert layer_parameters(load_recipe(name)) == parameters

    def test_gdn2_125m_is_carve_125m_with_gdn2(self):
        carve, gdn2 = load_recipe("carve_125m"), load_recipe("gdn2_125m")
        assert gdn2.model == dataclasses.replace(carve.model, pattern="2-" * 12)
        assert (gdn2.mixer, gdn2.training) == (carve.mixer, carve.training)
        # Per layer: a write gate of 12 instead of 768 features, A_log and the erase bias of every channel, two maps.
        difference = 768 * (12 - 768) + (768 - 12) + 768 + 16 * (64 + 64)
        assert layer_parameters(carve) - layer_parameters(gdn2) == 12 * difference
