"""Megatron's arguments from a recipe: every one exists in the installed Megatron, and its own parser gives it back."""

import argparse
import sys

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_carve.recipe import RecipeError, load_recipe
from megatron_carve.recipe.arguments import WITHOUT_EFFECT, check_extra, default_settings, megatron_argv, owned_settings

RECIPES = ("debug", "carve_1p3b_hybrid", "gdn2_1p3b_recurrent")
PLACES = (("local", "cpu"), ("local", "cuda"), ("transformer_engine", "cuda"))

SMALL = """\
model: {pattern: C-*-, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4}
training: {steps: 10, seq_length: 128}
"""


@pytest.fixture(scope="module")
def parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the small recipe with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *overrides: load_recipe("small.yaml", overrides)


def argv(parser, recipe, layers="local", device="cpu", vocab_size=65):
    return megatron_argv(
        parser,
        owned_settings(recipe, vocab_size=vocab_size, layers=layers, device=device),
        default_settings(recipe, layers=layers, device=device),
        recipe.megatron,
    )


def parsed(parser, recipe, **options):
    """What Megatron's parser makes of the recipe; a word it does not know ends the test."""
    words = argv(parser, recipe, **options)
    assert all(isinstance(word, str) for word in words)
    return parser.parse_args(words)


def refusal(parser, recipe):
    with pytest.raises(RecipeError) as error:
        argv(parser, recipe)
    return str(error.value)


class TestNames:
    @pytest.mark.parametrize("name", RECIPES)
    @pytest.mark.parametrize(("layers", "device"), PLACES)
    def test_every_setting_is_an_argument_of_the_installed_megatron(self, parser, name, layers, device):
        recipe = load_recipe(name)
        known = {action.dest for action in parser._actions}
        owned = owned_settings(recipe, vocab_size=65, layers=layers, device=device)
        defaults = default_settings(recipe, layers=layers, device=device)
        assert set(owned) - known == set()
        assert set(defaults) - known == set()
        assert set(owned) & set(defaults) == set()

    def test_owners_are_recipe_keys(self):
        recipe = load_recipe("debug")
        values = recipe.to_dict()
        for key, _ in owned_settings(recipe, vocab_size=65, layers="local", device="cpu").values():
            section, _, name = key.partition(".")
            assert name in values[section], key


class TestParsedBack:
    @pytest.mark.parametrize("name", RECIPES)
    @pytest.mark.parametrize(("layers", "device"), PLACES)
    def test_every_setting_has_its_value(self, parser, name, layers, device):
        recipe = load_recipe(name)
        owned = owned_settings(recipe, vocab_size=65, layers=layers, device=device)
        settings = default_settings(recipe, layers=layers, device=device)
        settings |= {argument: value for argument, (_, value) in owned.items()}
        window = settings.pop("window_size")
        settings = {name: parser.get_default(name) if value is None else value for name, value in settings.items()}
        found = vars(parsed(parser, recipe, layers=layers, device=device))
        assert {argument: found[argument] for argument in settings} == settings
        expected = None if window is None else tuple(int(part) for part in window.split(","))
        assert found["window_size"] == expected

    def test_published_hybrid(self, parser):
        found = vars(
            parsed(
                parser,
                load_recipe("gdn2_1p3b_hybrid"),
                layers="transformer_engine",
                device="cuda",
                vocab_size=32000,
            )
        )
        expected = {
            "hybrid_layer_pattern": "2-*-" * 9, "hidden_size": 2304, "ffn_hidden_size": 6784,
            "num_attention_heads": 18, "kv_channels": None, "group_query_attention": False,
            "window_size": (2047, 0), "position_embedding_type": "rope", "rotary_base": 10000,
            "vocab_size": 32000, "make_vocab_size_divisible_by": 128,
            "untie_embeddings_and_output_weights": True, "layernorm_epsilon": 1e-5, "init_method_std": 0.02,
            "transformer_impl": "transformer_engine", "normalization": "RMSNorm", "swiglu": True,
            "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
            "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            "seq_length": 4096, "max_position_embeddings": 4096, "micro_batch_size": 1, "global_batch_size": 128,
            "train_iters": 190_734, "lr": 4e-4, "min_lr": 4e-5, "lr_decay_style": "cosine",
            "lr_warmup_fraction": 0.01, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
            "adam_eps": 1e-8, "clip_grad": 1.0, "bf16": True, "fp16": False, "seed": 1234,
            "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
            "sequence_parallel": False, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
            "overlap_param_gather": True, "distributed_backend": "nccl", "save_interval": 1000,
            "save": "runs/gdn2_1p3b_hybrid/checkpoints", "tensorboard_dir": "runs/gdn2_1p3b_hybrid/tensorboard",
            "create_attention_mask_in_dataloader": False, "no_persist_layer_norm": False,
            "masked_softmax_fusion": True, "bias_swiglu_fusion": True, "exit_signal_handler": True,
        }  # fmt: skip
        expected["min_lr"] = pytest.approx(4e-5)
        assert {name: found[name] for name in expected} == expected

    @pytest.mark.parametrize(
        ("overrides", "options", "expected"),
        [
            (["model.attention_window=null"], {}, {"window_size": None}),
            (["model.attention_window=1"], {}, {"window_size": (0, 0)}),
            (["model.pattern=C-|*-"], {}, {"hybrid_layer_pattern": "C-*-"}),
            (["model.pattern=C-|*-", "parallel.pipeline=2"], {}, {"hybrid_layer_pattern": "C-|*-"}),
            (["model.num_query_groups=2"], {}, {"group_query_attention": True, "num_query_groups": 2}),
            (["model.attention_head_dim=24"], {}, {"kv_channels": 24}),
            (["model.tie_embeddings=true"], {}, {"untie_embeddings_and_output_weights": False}),
            (["training.precision=bf16"], {}, {"bf16": True, "fp16": False}),
            (["training.precision=fp16"], {}, {"bf16": False, "fp16": True}),
            (["training.precision=fp32"], {}, {"bf16": False, "fp16": False}),
            (["checkpoint.interval=null"], {}, {"save": None, "save_interval": None}),
            (["training.steps=null", "training.tokens=1.6e6"], {}, {"train_iters": 97}),  # 16384 tokens a step
            (["training.lr=1e-7", "training.min_lr=0"], {}, {"lr": 1e-7, "min_lr": 0.0}),
            (
                ["parallel.overlap=false"],
                {},
                {"overlap_grad_reduce": False, "overlap_param_gather": False, "use_distributed_optimizer": True},
            ),
            (
                ["parallel.distributed_optimizer=false", "training.precision=fp32"],
                {},
                {
                    "overlap_grad_reduce": False, "overlap_param_gather": False, "use_distributed_optimizer": False,
                    "dist_ckpt_optim_fully_reshardable": False,
                },
            ),
            # The table stays as large as without tensor parallelism: Megatron multiplies by its size.
            (
                ["parallel.tensor=4"],
                {},
                {"sequence_parallel": True, "make_vocab_size_divisible_by": 32, "tensor_model_parallel_size": 4},
            ),
            (["parallel.tensor=4", "parallel.sequence=false"], {}, {"sequence_parallel": False}),
            # Megatron's p2p knows no windows; without one it stays.
            (["parallel.context=2", "model.attention_window=8"], {}, {"cp_comm_type": ["all_gather"]}),
            (["parallel.context=2"], {}, {"context_parallel_size": 2, "cp_comm_type": ["p2p"]}),
            (
                ["parallel.context=2", "model.attention_window=8", "megatron.cp_comm_type=a2a"],
                {},
                {"cp_comm_type": ["a2a"]},
            ),
            ([], {}, {"check_for_nan_in_loss_and_grad": False}),
            # Where there is no norm, or steps of no numbers are skipped, Megatron looks itself.
            (["training.clip_grad=0"], {}, {"check_for_nan_in_loss_and_grad": True}),
            (["megatron.loss_scale=8", "training.precision=fp16"], {}, {"check_for_nan_in_loss_and_grad": True}),
            (["run.folder=some where", "run.name=7"], {}, {"save": "some where/7/checkpoints"}),
            ([], {"device": "cpu"}, {"distributed_backend": "gloo", "num_workers": 0, "bias_swiglu_fusion": False}),
            ([], {"device": "cuda"}, {"distributed_backend": "nccl", "num_workers": 2, "bias_swiglu_fusion": True}),
            ([], {"layers": "local"}, {"masked_softmax_fusion": False, "apply_rope_fusion": False}),
            (
                [],
                {"layers": "transformer_engine", "device": "cuda"},
                {"masked_softmax_fusion": True, "apply_rope_fusion": True},
            ),
        ],
    )  # fmt: skip
    def test_choices(self, parser, load, overrides, options, expected):
        found = vars(parsed(parser, load(*overrides), **options))
        assert {name: found[name] for name in expected} == expected


def test_weights_and_biases(parser, load):
    names = ("wandb_project", "wandb_entity", "wandb_exp_name", "wandb_save_dir")
    found = parsed(parser, load("run.wandb=team/models", "run.name=it", "run.folder=there"))
    assert [getattr(found, n) for n in names] == ["models", "team", "it", "there/it/wandb"]
    assert parsed(parser, load("run.wandb=models")).wandb_project == "models"
    with pytest.raises(RecipeError, match=r"wandb: expected project or entity/project, got 'a/b/c'"):
        load("run.wandb=a/b/c")
    with pytest.raises(RecipeError, match=r"megatron\.wandb_project: set run\.wandb instead"):
        parsed(parser, load("run.wandb=models", "megatron.wandb_project=others"))


class TestMegatronSection:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("megatron.recompute_granularity=full", "full"),
            ("megatron.recompute_num_layers=2", 2),
            ("megatron.recompute_modules=[core_attn, mlp]", ["core_attn", "mlp"]),
            ("megatron.recompute_modules=mlp", ["mlp"]),
            ("megatron.iterations_to_skip=[3, 5]", [3, 5]),
            ("megatron.iterations_to_skip=3", [3]),
            ("megatron.rampup_batch_size=[1, 2, 3]", [1, 2, 3]),
            ("megatron.inference_wandb_logging=true", True),
            ("megatron.use_cpu_initialization=false", None),
            ("megatron.use_cpu_initialization=true", True),
            ("megatron.check_for_nan_in_loss_and_grad=false", False),
            ("megatron.check_for_nan_in_loss_and_grad=true", True),
            ("megatron.deterministic_mode=true", True),
            ("megatron.deterministic_mode=false", False),
            ("megatron.initial_loss_scale=1e4", 1e4),
            ("megatron.initial_loss_scale=65536", 65536.0),
            ("megatron.rotary_percent=0.5", 0.5),
            ("megatron.wandb_project=my project", "my project"),
            ("megatron.wandb_project=--odd", "--odd"),
            ("megatron.exit_duration_in_mins=-1", -1),
            ("megatron.exit_interval=null", None),
            # What this project sets differently from Megatron can be set back.
            ("megatron.swiglu=false", False),
            ("megatron.add_bias_linear=true", True),
            ("megatron.normalization=LayerNorm", "LayerNorm"),
            ("megatron.attention_dropout=0.1", 0.1),
            ("megatron.gradient_accumulation_fusion=true", True),
            ("megatron.masked_softmax_fusion=true", True),
            ("megatron.num_workers=3", 3),
            ("megatron.data_cache_path=elsewhere", "elsewhere"),
            ("megatron.exit_signal_handler=false", False),
        ],
    )
    def test_value_arrives(self, parser, load, override, expected):
        name = override.removeprefix("megatron.").partition("=")[0]
        assert getattr(parsed(parser, load(override)), name) == expected

    def test_the_rest_stays_as_it_was(self, parser, load):
        plain, changed = vars(parsed(parser, load())), vars(parsed(parser, load("megatron.swiglu=false")))
        assert {name for name in plain if plain[name] != changed[name]} == {"swiglu"}

    def test_unknown_name(self, parser, load):
        meant = {"recompute_granularty": "recompute_granularity", "recompute-granularity": "recompute_granularity"}
        for name, near in {**meant, "num_worker": "num_workers"}.items():
            text = refusal(parser, load(f"megatron.{name}=1"))
            said = f"unknown key megatron.{name}: Megatron has no such argument; did you mean megatron.{near}?"
            assert text == said

    def test_unknown_name_like_no_other(self, parser, load):
        text = refusal(parser, load("megatron.zzzzzzzzzzzzzzz=1"))
        assert text == "unknown key megatron.zzzzzzzzzzzzzzz: Megatron has no such argument"

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("hidden_size", "model.hidden_size"),
            ("bf16", "training.precision"),
            ("fp16", "training.precision"),
            ("window_size", "model.attention_window"),
            ("train_iters", "training.steps"),
            ("lr", "training.lr"),
            ("sequence_parallel", "parallel.sequence"),
            ("tensorboard_dir", "run.folder"),
            ("linear_key_head_dim", "mixer.key_head_dim"),
            ("tokenizer_type", "data.tokenizer"),
            ("save", "checkpoint.interval"),
            ("load", "checkpoint.load"),
            ("finetune", "checkpoint.weights_only"),
            ("train_samples", "training.steps"),
            ("num_layers", "model.pattern"),
            ("data_path", "data.indexed"),
            ("vocab_file", "data.tokenizer"),
        ],
    )
    def test_owned_name_points_at_our_key(self, parser, load, name, key):
        assert refusal(parser, load(f"megatron.{name}=1")) == f"megatron.{name}: set {key} instead, which decides it"

    @pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
    def test_without_effect(self, parser, load, name):
        assert name in {action.dest for action in parser._actions}, "has another name now and would be let through"
        assert refusal(parser, load(f"megatron.{name}=1")) == f"megatron.{name}: has no effect in this program"

    @pytest.mark.parametrize(
        ("override", "complaint"),
        [
            ("megatron.swiglu=1", "expected true or false, got 1"),
            ("megatron.swiglu=yes please", "expected true or false, got 'yes please'"),
            ("megatron.swiglu=null", "expected true or false, got None"),
            ("megatron.recompute_granularity=all", "expected one of full, selective, got 'all'"),
            ("megatron.normalization=[RMSNorm]", "expected one value, got ['RMSNorm']"),
            ("megatron.recompute_num_layers=two", "expected int as --recompute-num-layers takes it, got 'two'"),
            ("megatron.recompute_num_layers=2.5", "expected int as --recompute-num-layers takes it, got '2.5'"),
            ("megatron.recompute_num_layers=true", "expected int as --recompute-num-layers takes it, got 'True'"),
            ("megatron.recompute_num_layers=[1, 2]", "expected one value, got [1, 2]"),
            ("megatron.iterations_to_skip=[3, x]", "expected int as --iterations-to-skip takes it, got 'x'"),
            ("megatron.initial_loss_scale=big", "expected float as --initial-loss-scale takes it, got 'big'"),
            ("megatron.rampup_batch_size=[1, 2]", "expected 3 values, got 2"),
            ("megatron.rampup_batch_size=1", "expected 3 values, got 1"),
            ("megatron.recompute_modules=[]", "expected at least one values, got 0"),
        ],
    )
    def test_wrong_value(self, parser, load, override, complaint):
        name = override.partition("=")[0]
        assert refusal(parser, load(override)) == f"{name}: {complaint}"

    @pytest.mark.parametrize("value", [True, False])
    def test_every_switch_of_megatron_comes_out_as_asked(self, parser, value):
        """Where Megatron has no flag for it, it is refused instead of being ignored."""
        by_name = {}
        for action in parser._actions:
            by_name.setdefault(action.dest, []).append(action)
        del by_name["help"]
        switches = {name for name, actions in by_name.items() if all(a.nargs == 0 for a in actions)} - WITHOUT_EFFECT
        assert len(switches) > 200
        refused = []
        for name in sorted(switches):
            try:
                words = megatron_argv(parser, {}, {}, {name: value})
            except RecipeError as error:
                assert str(error) == f"megatron.{name}: Megatron has no way to set it to {str(value).lower()}"
                refused.append(name)
            else:
                assert bool(getattr(parser.parse_args(words), name)) is value, (name, words)
        assert all({a.const for a in by_name[name]} == {not value} for name in refused)
        assert len(refused) < 5

    @pytest.mark.parametrize("default", [True, False, None])
    @pytest.mark.parametrize("value", [True, False])
    def test_switches_with_two_flags(self, default, value):
        parser = argparse.ArgumentParser()
        parser.add_argument("--caching", action=argparse.BooleanOptionalAction, default=default)
        assert bool(parser.parse_args(megatron_argv(parser, {}, {}, {"caching": value})).caching) is value


class TestPackages:
    @pytest.mark.parametrize(
        ("option", "module", "says"),
        [
            (
                "optimizer=muon", "emerging_optimizers",
                'emerging-optimizers is not installed; pip install "megatron-carve[muon]"',
            ),
            ("use_megatron_fsdp=true", "einops", "einops is not installed; pip install einops"),
            ("wandb_project=x", "wandb", "wandb is not installed; pip install wandb"),
        ],
    )  # fmt: skip
    def test_a_missing_one_is_named(self, load, monkeypatch, option, module, says):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError) as error:
            check_extra(load(f"megatron.{option}"))
        assert str(error.value) == f"megatron.{option.removesuffix('=true').removesuffix('=x')}: the package {says}"


class TestOverlap:
    """What would come out wrong of Transformer Engine's user buffers, or stop in the midst of a step."""

    WORDS = ("parallel.tensor=2", "megatron.tp_comm_overlap=true")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["parallel.tensor=1"], "parallel.tensor: expected 2, 4 or 8 with megatron.tp_comm_overlap, got 1"),
            (["parallel.tensor=16"], "parallel.tensor: expected 2, 4 or 8 with megatron.tp_comm_overlap, got 16"),
            (["parallel.sequence=false"], "parallel.sequence: expected true with megatron.tp_comm_overlap, got false"),
            (["training.precision=fp16"], "training.precision: expected bf16 with megatron.tp_comm_overlap, got fp16"),
            (
                ["model.hidden_size=80"],
                "model.hidden_size: expected a multiple of 32 with megatron.tp_comm_overlap, got 80",
            ),
            (
                ["model.pattern=C-+-"],
                "model.pattern: expected no layers D and +, whose projections are others with "
                "megatron.tp_comm_overlap, got C-+-",
            ),
            (
                ["megatron.eval_micro_batch_size=2"],
                "megatron.eval_micro_batch_size: expected training.micro_batch_size=1 with megatron.tp_comm_overlap, "
                "got 2",
            ),
            (
                ["model.pattern='*-'", "megatron.fp8=hybrid", "megatron.fp8_recipe=blockwise"],
                "megatron.fp8_recipe: expected delayed or tensorwise with megatron.tp_comm_overlap, got blockwise",
            ),
            (
                ["megatron.overlap_moe_expert_parallel_comm=true"],
                "megatron.overlap_moe_expert_parallel_comm: expected false with megatron.tp_comm_overlap, got true",
            ),
            (
                ["megatron.tp_comm_bootstrap_backend=mpi"],
                "megatron.tp_comm_bootstrap_backend: expected nccl or gloo with megatron.tp_comm_overlap, got mpi",
            ),
            (
                ["megatron.tp_comm_overlap_cfg=none.yaml"],
                "megatron.tp_comm_overlap_cfg: expected a file with megatron.tp_comm_overlap, got none.yaml",
            ),
        ],
    )
    def test_what_buffers_do_not_carry_is_refused(self, load, words, message):
        with pytest.raises(RecipeError) as error:
            check_extra(load(*self.WORDS, *words))
        assert str(error.value) == message
        check_extra(load(*self.WORDS, *words, "megatron.tp_comm_overlap=false"))

    @pytest.mark.parametrize(
        "words",
        [
            [], ["parallel.tensor=4", "model.pattern='*-'", "megatron.fp8=hybrid"],
            ["megatron.eval_micro_batch_size=1", "model.pattern=C-*-/C-"],
            ["megatron.tp_comm_overlap_cfg=small.yaml", "megatron.tp_comm_bootstrap_backend=gloo"],
        ],
    )  # fmt: skip
    def test_what_they_carry_is_not(self, load, words):
        check_extra(load(*self.WORDS, *words))
