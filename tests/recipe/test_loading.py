"""Recipes: the shipped ones are the published setup; every mistake names its place, its key and what was expected."""

import dataclasses
import math
import re

import pytest
import yaml

from megatron_carve.model.config import MixerConfig
from megatron_carve.recipe import Recipe, RecipeError, load_recipe, recipe_names

MINIMAL = """\
model: {pattern: C-*-, hidden_size: 64, ffn_hidden_size: 160}
training: {steps: 10}
"""
APART = ("data.text=x.jsonl", "data.documents=apart")


SMALL = """\
model: {pattern: C-*-C-*-, hidden_size: 128, ffn_hidden_size: 352, num_attention_heads: 4}
mixer: {num_key_heads: 4, num_value_heads: 4, key_head_dim: 32, value_head_dim: 32, content_rank: 8}
training: {steps: 400, seq_length: 128, micro_batch_size: 16, global_batch_size: 16, lr: 2e-3, precision: fp32}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory but for small.yaml."""
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(here):
    """Write a recipe into the working directory and return its path."""

    def to_file(text, name="mine.yaml"):
        path = here / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to_file


def message(name_or_path, *overrides):
    """What loading it says; it must fail."""
    with pytest.raises(RecipeError) as error:
        load_recipe(name_or_path, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


class TestShipped:
    def test_names(self):
        assert recipe_names() == [
            "carve_125m", "carve_125m_moe", "carve_1p3b_hybrid", "carve_1p3b_recurrent", "debug", "gdn2_125m",
            "gdn2_1p3b_hybrid", "gdn2_1p3b_recurrent", "kda_125m", "kda_1p3b_hybrid",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "pattern", "ffn", "window", "positions"),
        [
            ("gdn2_1p3b_recurrent", "2-" * 18, 6208, None, "none"),
            ("gdn2_1p3b_hybrid", "2-*-" * 9, 6784, 2048, "rope"),
        ],
    )
    def test_setup_of_the_gdn2_paper(self, name, pattern, ffn, window, positions):
        recipe = load_recipe(name)
        model, training = recipe.model, recipe.training
        assert model.pattern == pattern
        assert (model.hidden_size, model.ffn_hidden_size, model.vocab_size) == (2304, ffn, 32000)
        assert (model.attention_window, model.position_embedding) == (window, positions)
        assert (model.num_attention_heads, model.attention_head_dim, model.num_query_groups) == (18, None, None)
        mixer = recipe.mixer
        assert (mixer.num_key_heads, mixer.num_value_heads) == (16, 16)
        assert (mixer.key_head_dim, mixer.value_head_dim, mixer.conv_width) == (128, 128, 4)
        assert (training.lr, training.warmup_fraction) == (4e-4, 0.01)
        assert (training.seq_length, training.tokens_per_step, training.tokens) == (4096, 524_288, 100e9)
        assert training.total_steps == 190_734  # 100e9 / 524288 = 190734.86
        self.check_what_all_share(name, recipe)

    @pytest.mark.parametrize(
        ("name", "pattern", "sizes", "window", "positions"),
        [
            ("carve_125m", "C-" * 12, (768, 2048, 12, 64, 16, 64), None, "none"),
            ("gdn2_125m", "2-" * 12, (768, 2048, 12, 64, 16, 64), None, "none"),
            ("carve_1p3b_recurrent", "C-" * 24, (2048, 5632, 16, 128, 32, 128), None, "none"),
            ("carve_1p3b_hybrid", "C-C-C-*-" * 6, (2048, 5632, 16, 128, 32, 128), 1024, "rope"),
        ],
    )
    def test_setup_of_the_carve_paper(self, name, pattern, sizes, window, positions):
        recipe = load_recipe(name)
        model, training, mixer = recipe.model, recipe.training, recipe.mixer
        hidden, ffn, heads, width, rank, chunk = sizes
        assert model.pattern == pattern
        assert (model.hidden_size, model.ffn_hidden_size, model.vocab_size) == (hidden, ffn, 32000)
        assert (model.attention_window, model.position_embedding) == (window, positions)
        assert (model.num_attention_heads, model.attention_head_dim, model.num_query_groups) == (heads, None, None)
        assert (mixer.num_key_heads, mixer.num_value_heads) == (heads, heads)
        assert (mixer.key_head_dim, mixer.value_head_dim, mixer.conv_width) == (width, width, 4)
        assert (mixer.content_rank, mixer.content_chunk) == (rank, chunk)
        assert (mixer.erase, mixer.prediction, mixer.content_grad) == ("diagonal", "previous", "full")
        if "1p3b" in name:
            assert (training.lr, training.seq_length, training.tokens) == (1.5e-4, 4096, 100e9)
            assert training.tokens_per_step == 2**22
            assert round(training.warmup_fraction * training.total_steps) == 10_000
        else:
            assert (training.lr, training.seq_length, training.micro_batch_size) == (3e-4, 1024, 8)
            assert round(training.warmup_fraction * training.total_steps) == 1_000
        self.check_what_all_share(name, recipe)

    @staticmethod
    def check_what_all_share(name, recipe):
        training = recipe.training
        assert (training.final_lr, training.lr_schedule) == (pytest.approx(training.lr / 10), "cosine")
        assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)
        assert (training.weight_decay, training.clip_grad, training.precision) == (0.1, 1.0, "bf16")
        assert recipe.run.name == name

    def test_debug_is_small_and_needs_no_files(self):
        recipe = load_recipe("debug")
        assert recipe.data.source == "recall"
        assert {"C", "*", "-"} == set(recipe.model.pattern)
        assert recipe.model.hidden_size <= 256
        assert recipe.training.precision == "fp32"

    def test_carve_and_gdn2_differ_in_the_letter_alone(self):
        carve, gdn2 = load_recipe("carve_125m").to_dict(), load_recipe("gdn2_125m").to_dict()
        carve["model"]["pattern"] = carve["model"]["pattern"].replace("C", "2")
        carve["run"]["name"] = gdn2["run"]["name"]
        assert carve == gdn2


class TestKeys:
    @pytest.mark.parametrize(
        ("text", "key", "nearest"),
        [
            ("modle: {pattern: C-}", "modle", "model"),
            ("trainning: {steps: 3}", "trainning", "training"),
            ("model: {hiden_size: 3}", "model.hiden_size", "model.hidden_size"),
            ("mixer: {content_ranks: 3}", "mixer.content_ranks", "mixer.content_rank"),
            ("data: {recall: {num_key: 3}}", "data.recall.num_key", "data.recall.num_keys"),
            # A right name in a wrong section is a better guess than a similar name nearby.
            ("model: {seq_length: 64}", "model.seq_length", "training.seq_length"),
            ("training: {num_pairs: 3}", "training.num_pairs", "data.recall.num_pairs"),
            ("lr: 1e-3", "lr", "training.lr"),
        ],
    )
    def test_unknown_key_names_itself_the_file_and_the_nearest(self, write, text, key, nearest):
        path = write(text)
        assert message(path) == f"{path}: unknown key {key}; did you mean {nearest}?"

    def test_a_key_like_no_other_gets_no_suggestion(self, write):
        path = write("zzzzzzzzzzzzzzzzzzzzzzzzzz: 1")
        assert message(path) == f"{path}: unknown key zzzzzzzzzzzzzzzzzzzzzzzzzz"

    def test_unknown_key_in_an_ancestor_names_the_ancestor(self, write):
        parent = write(MINIMAL + "run: {nme: x}\n", "parent.yaml")
        child = write("inherit: parent.yaml\n")
        assert message(child).startswith(f"{parent}: unknown key run.nme; did you mean run.name?")

    @pytest.mark.parametrize(
        ("text", "line", "key"),
        [
            ("model:\n  pattern: C-\nmodel:\n  pattern: 2-\n", 3, "model"),
            ("model:\n  pattern: C-\n  hidden_size: 8\n  pattern: 2-\n", 4, "pattern"),
            ("data: {recall: {num_keys: 3, num_keys: 4}}", 1, "num_keys"),
        ],
    )
    def test_duplicate_key(self, write, text, line, key):
        path = write(text)
        assert message(path) == f"{path}: line {line}: key '{key}' appears twice"

    def test_merged_keys_give_way_to_those_written_out(self, write):
        sizes = "{num_keys: 9, num_values: 7, num_pairs: 5}"
        recipe = load_recipe(write(MINIMAL + f"data: {{recall: {{num_keys: 11, <<: {sizes}}}}}\n"))
        assert (recipe.data.recall.num_keys, recipe.data.recall.num_values) == (11, 7)

    def test_from_a_dict_as_from_a_file(self, write):
        recipe = load_recipe(write(MINIMAL + "run: {name: a, folder: ~/runs}\n"))
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        for values, complaint in (
            ({**recipe.to_dict(), "modle": {}}, "here: unknown key modle; did you mean model?"),
            ({**recipe.to_dict(), "inherit": "debug"}, "here: inherit: a file alone inherits, got 'debug'"),
            ({**recipe.to_dict(), "training": {"steps": -1}}, "here: training.steps: expected at least 1, got -1"),
        ):
            with pytest.raises(RecipeError) as error:
                Recipe.from_dict(values, origin="here")
            assert str(error.value) == complaint

    def test_same_name_in_two_sections_is_no_duplicate(self, write):
        recipe = load_recipe(write(MINIMAL + "checkpoint: {interval: 5}\nrun: {name: a}\nmixer: {}\n"))
        assert (recipe.checkpoint.interval, recipe.run.name) == (5, "a")

    @pytest.mark.parametrize(
        ("removed", "key", "expected"),
        [
            ("pattern: C-*-, ", "model.pattern", "text"),
            (", hidden_size: 64", "model.hidden_size", "an integer"),
            (", ffn_hidden_size: 160", "model.ffn_hidden_size", "an integer"),
        ],
    )
    def test_required_keys(self, write, removed, key, expected):
        assert removed in MINIMAL
        path = write(MINIMAL.replace(removed, ""))
        assert message(path) == f"{path}: {key}: required, expected {expected}"

    def test_missing_section_names_its_first_required_key(self, write):
        path = write("training: {steps: 10}")
        assert message(path) == f"{path}: model.pattern: required, expected text"


class TestYaml:
    @pytest.mark.parametrize(
        "text", ["model: {pattern: C-", "a: b: c", "model:\n\t- x", "%", "model: !!python/name:os"]
    )
    def test_syntax_error_names_file_and_line(self, write, text):
        path = write(text)
        assert message(path).startswith(f"{path}: not valid YAML: ")
        assert "line 1" in message(path) or "line 2" in message(path)

    @pytest.mark.parametrize("text", ["", "- model\n- training\n", "just words", "3"])
    def test_not_a_mapping(self, write, text):
        path = write(text)
        expected = f"{path}: expected sections such as model and training, got "
        assert message(path) == expected + repr(yaml.safe_load(text))

    def test_not_utf8(self, write, tmp_path):
        (tmp_path / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))
        assert message("latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}: cannot be read: 'utf-8' codec")

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("4e-4", 4e-4), ("4E-4", 4e-4), ("4.e-4", 4e-4), (".4e-3", 4e-4), ("+4e-4", 4e-4), ("0.0004", 4e-4),
            ("4.0e-4", 4e-4), ("1", 1.0), ("1_0e-1", 1.0),
        ],
    )  # fmt: skip
    def test_numbers_as_people_write_them(self, write, text, value):
        path = write(MINIMAL.replace("steps: 10", f"steps: 10, lr: {text}"))
        assert load_recipe(path).training.lr == value
        assert load_recipe("small.yaml", [f"training.lr={text}", "training.min_lr=0"]).training.lr == value

    def test_what_only_looks_like_a_number_stays_text(self, write):
        recipe = load_recipe(write(MINIMAL + "run: {name: 4e-4x}\ndata: {text_key: e4}\n"))
        assert (recipe.run.name, recipe.data.text_key) == ("4e-4x", "e4")

    def test_a_section_may_be_empty(self, write):
        assert load_recipe(write(MINIMAL + "run:\ndata: {recall:}\n")) == load_recipe(write(MINIMAL))

    def test_an_empty_megatron_section(self, write):
        assert load_recipe(write(MINIMAL + "megatron:\n")).megatron == {}

    @pytest.mark.parametrize(
        ("text", "line", "key"),
        [("? [a, b]\n: c\n", 1, ["a", "b"]), ("run:\n  2026: x\n", 2, 2026), ("? {a: b}\n: c\n", 1, {"a": "b"})],
    )
    def test_a_key_is_a_name(self, write, text, line, key):
        path = write(text)
        assert message(path) == f"{path}: line {line}: expected a name as key, got {key!r}"

    def test_a_date_that_does_not_exist(self, write):
        path = write(MINIMAL + "run: {name: 2026-13-45}\n")
        assert message(path) == f"{path}: month must be in 1..12"


class TestPaths:
    def test_home_at_the_beginning_of_a_path(self, write, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        words = ["run.folder=~/runs", "checkpoint.load=~/runs/other", "data.cache=~/cache"]
        recipe = load_recipe(write("data: {text: ~/a~b.txt}\n" + SMALL), words)
        assert recipe.data.text == "/home/someone/a~b.txt"
        assert (recipe.data.cache, recipe.run.folder) == ("/home/someone/cache", "/home/someone/runs")
        assert recipe.checkpoint.load == "/home/someone/runs/other"
        indexed = load_recipe(write(SMALL), ["data.indexed=[0.3, ~/a, 0.7, b/~c]"])
        assert indexed.data.indexed == ["0.3", "/home/someone/a", "0.7", "b/~c"]


class TestTypes:
    @pytest.mark.parametrize(
        ("section", "text", "expected", "actual"),
        [
            ("training", "seq_length: 4096.0", "an integer", "4096.0"),
            ("training", "seq_length: true", "an integer", "True"),
            ("training", "seq_length: '4096'", "an integer", "'4096'"),
            ("training", "seq_length: [4096]", "an integer", "[4096]"),
            ("training", "seq_length: null", "an integer", "None"),
            ("training", "lr: fast", "a number", "'fast'"),
            ("training", "lr: false", "a number", "False"),
            ("training", "precision: fp8", "one of bf16, fp16, fp32", "'fp8'"),
            ("training", "precision: 16", "one of bf16, fp16, fp32", "16"),
            ("training", "min_lr: low", "a number or null", "'low'"),
            ("mixer", "conv_bias: 1", "true or false", "1"),
            ("mixer", "conv_bias: 'false'", "true or false", "'false'"),
            ("data", "tokenizer: 7", "text", "7"),
            ("data", "tokenizer: [bytes]", "text", "['bytes']"),
            ("data", "indexed: corpus", "a list of text or null", "'corpus'"),
            ("data", "indexed: [corpus, [other]]", "a list of text or null", "['corpus', ['other']]"),
            ("run", "name: 2026", "text or null", "2026"),
            ("checkpoint", "interval: 1.5", "an integer or null", "1.5"),
        ],
    )
    def test_each_kind_in_a_file(self, write, section, text, expected, actual):
        key = f"{section}.{text.partition(':')[0]}"
        if section == "training":
            path = write(MINIMAL.replace("steps: 10", f"steps: 10, {text}"))
        else:
            path = write(MINIMAL + f"{section}: {{{text}}}\n")
        assert message(path) == f"{path}: {key}: expected {expected}, got {actual}"

    def test_in_an_override(self):
        for override, said in {
            "model.hiden_size=3": "unknown key model.hiden_size; did you mean model.hidden_size?",
            "training={lrr: 3}": "unknown key training.lrr; did you mean training.lr?",
            "steps=3": "unknown key steps; did you mean training.steps?",
            "data.recall.num_pair=3": "unknown key data.recall.num_pair; did you mean data.recall.num_pairs?",
            "training.seq_length=long": "training.seq_length: expected an integer, got 'long'",
            "training.lr=": "training.lr: expected a number, got None",
            "parallel.sequence=1": "parallel.sequence: expected true or false, got 1",
            "model.layers=TE": "model.layers: expected one of auto, transformer_engine, local, got 'TE'",
            "data.recall.num_keys=many": "data.recall.num_keys: expected an integer, got 'many'",
            "data.indexed=corpus": "data.indexed: expected a list of text or null, got 'corpus'",
        }.items():
            assert message("small.yaml", override) == f"command line: {said}"

    @pytest.mark.parametrize("value", ["7", "[a]", "text", "true"])
    def test_a_section_is_keys_and_values(self, write, value):
        for key in ("model", "megatron"):
            path = write(MINIMAL.partition("\n")[2] + f"{key}: {value}\n")
            actual = repr(yaml.safe_load(value))
            assert message(path) == f"{path}: {key}: expected keys and values, got {actual}"
        assert message("small.yaml", "data.recall=3") == "command line: data.recall: expected keys and values, got 3"


class TestRanges:
    @pytest.mark.parametrize(
        ("override", "complaint"),
        [
            ("model.hidden_size=0", "expected at least 1, got 0"),
            ("model.vocab_multiple=-1", "expected at least 1, got -1"),
            ("model.attention_window=0", "expected at least 1, got 0"),
            ("model.init_std=0", "expected a number above 0, got 0"),
            ("model.norm_epsilon=.inf", "expected a number above 0, got inf"),
            ("model.num_query_groups=3", "expected a divisor of num_attention_heads=4, got 3"),
            ("model.num_attention_heads=3", "expected a divisor of hidden_size=128 (or attention_head_dim), got 3"),
            ("model.pattern=C-X-y", "expected letters of C2K*-GMD+E and | /, got 'X', 'y' in 'C-X-y'"),
            ("model.pattern=C-||C-", "expected layers on both sides of | and /, got 'C-||C-'"),
            ("model.pattern=C-|", "expected layers on both sides of | and /, got 'C-|'"),
            ("model.pattern=C-/", "expected layers on both sides of | and /, got 'C-/'"),
            ("model.pattern=C-/C|-", "expected the same layers, without |, after every /, got 'C-/C|-'"),
            ("model.pattern=C-/C-/2-", "expected the same layers, without |, after every /, got 'C-/C-/2-'"),
            ("model.attention_head_dim=15", "expected an even number with rope, got 15"),
            ('model.pattern=""', "expected layers on both sides of | and /, got ''"),
            ("mixer.content_chunk=100", "expected a positive multiple of 64, got 100"),
            ("data.validation_fraction=1", "expected above 0 and below 1, got 1"),
            ("data.validation_fraction=.nan", "expected above 0 and below 1, got nan"),
            ("data.split=95,5", "expected three numbers like 95,5,0, got '95,5'"),
            ("data.split=0,5,5", "expected three numbers like 95,5,0, got '0,5,5'"),
            ("data.split=95,-5,0", "expected three numbers like 95,5,0, got '95,-5,0'"),
            ("data.split=a,b,c", "expected three numbers like 95,5,0, got 'a,b,c'"),
            ("training.steps=0", "expected at least 1, got 0"),
            ("training.seq_length=0", "expected at least 1, got 0"),
            ("training.eval_iters=0", "expected at least 1, got 0"),
            ("training.lr=0", "expected a number above 0, got 0"),
            ("training.lr=-1e-3", "expected a number above 0, got -0.001"),
            ("training.lr=.nan", "expected a number above 0, got nan"),
            ("training.weight_decay=-0.1", "expected at least 0, got -0.1"),
            ("training.clip_grad=.nan", "expected at least 0, got nan"),
            ("training.seed=0", "expected above 0 and below 2**32, got 0"),
            ("training.seed=4294967296", "expected above 0 and below 2**32, got 4294967296"),
            ("training.seed=-1", "expected above 0 and below 2**32, got -1"),
            ("training.adam_beta1=1", "expected at least 0 and below 1, got 1"),
            ("training.adam_beta2=-0.1", "expected at least 0 and below 1, got -0.1"),
            ("training.warmup_fraction=1.0", "expected at least 0 and below 1, got 1.0"),
            ("training.min_lr=1", "expected at most lr=0.002, got 1"),
            ("training.global_batch_size=20", "expected a multiple of micro_batch_size=16, got 20"),
            ("parallel.tensor=0", "expected at least 1, got 0"),
            ("checkpoint.interval=0", "expected at least 1, got 0"),
            ("checkpoint.weights_only=true", "expected load to name a run, got null"),
            ("run.log_interval=0", "expected at least 1, got 0"),
            ("run.name=a/b", "expected a file name without separators, got 'a/b'"),
            ('run.name=""', "expected a file name without separators, got ''"),
            ("run.name=..", "expected a file name without separators, got '..'"),
            ("run.name=.", "expected a file name without separators, got '.'"),
        ],
    )
    def test_refused(self, override, complaint):
        key = override.partition("=")[0]
        assert message("small.yaml", override) == f"command line: {key}: {complaint}"

    @pytest.mark.parametrize(
        "values",
        [
            {"model.attention_window": 1},
            {"training.min_lr": 0},
            {"training.min_lr": 0.002, "training.lr": 0.002},
            {"training.adam_beta1": 0, "training.warmup_fraction": 0, "training.weight_decay": 0},
            {"training.clip_grad": 0, "data.split": "1,0,0"},
            {"training.seed": 1},
            {"training.seed": 2**32 - 1},
            {"model.attention_head_dim": 15, "model.position_embedding": "none"},
            {"model.attention_head_dim": 15, "model.pattern": "C-2-"},
            {"model.num_attention_heads": 3, "model.attention_head_dim": 10, "model.num_query_groups": 3},
            {"model.pattern": "C-|*-|2-|G-/C-", "parallel.pipeline": 2},
            {"parallel.tensor": 4, "training.seq_length": 64},
            {"parallel.tensor": 4, "training.seq_length": 66, "parallel.sequence": False},
        ],
        ids=lambda values: " ".join(f"{k}={v}" for k, v in values.items()),
    )
    def test_edges_are_accepted(self, values):
        recipe = load_recipe(
            "small.yaml", [f"{key}={str(value).lower() if value is False else value}" for key, value in values.items()]
        )
        for key, value in values.items():
            section, _, name = key.partition(".")
            assert getattr(getattr(recipe, section), name) == value

    @pytest.mark.parametrize(
        ("overrides", "complaint"),
        [
            (
                ["parallel.tensor=2", "training.seq_length=65"],
                "training.seq_length: expected a multiple of parallel.tensor * parallel.context = 2 * 1 under sequence "
                "parallelism, got 65",
            ),
            (
                ["model.pattern=C-|*-|C-", "parallel.pipeline=2"],
                "model.pattern: expected a number of '|'-separated stages that parallel.pipeline=2 divides, got 3",
            ),
            (
                ["model.pattern=C-*-", "parallel.pipeline=3"],
                "parallel.pipeline: expected a divisor of the pattern's 4 layers (or '|' between stages in "
                "model.pattern), got 3",
            ),
            (
                ["parallel.tensor=3", "training.seq_length=66"],
                "parallel.tensor: tensor parallel size 3 does not divide num_key_heads=4 and value_head_dim=32; "
                "legal sizes: 1, 2, 4",
            ),
            (
                ["parallel.tensor=4", "parallel.context=2", "training.seq_length=68"],
                "training.seq_length: expected a multiple of parallel.tensor * parallel.context = 4 * 2 under sequence "
                "parallelism, got 68",
            ),
            (
                ["parallel.context=2", "training.seq_length=66"],
                "training.seq_length: expected a multiple of 2 * parallel.context = 4, got 66",
            ),
            (
                ["parallel.tensor=2", "parallel.context=4", "parallel.context_method=heads", "training.seq_length=64"],
                "parallel.context: context parallel size 4 does not divide the 2 key heads of a tensor-parallel rank "
                "(num_key_heads=4, tensor parallel size 2); legal sizes: 1, 2",
            ),
            (
                ["megatron.fp8=hybrid", "parallel.tensor=2", "mixer.num_key_heads=16", "mixer.num_value_heads=16"],
                "megatron.fp8: expected multiples of 16 on a tensor-parallel rank, got input projection 1064; "
                "legal tensor parallel sizes: 1",
            ),
            (
                ["parallel.distributed_optimizer=false", "training.precision=bf16"],
                "parallel.distributed_optimizer: expected true with mixer layers in bf16, since Megatron's plain "
                "optimizer cannot save their float32 decay",
            ),
            (
                [*APART, "model.num_query_groups=2", "parallel.context=4"],
                "model.num_query_groups: expected a multiple of parallel.tensor * parallel.context = 1 * 4 with "
                "data.documents: apart, got 2",
            ),
            (
                [*APART, "parallel.tensor=2", "parallel.context=4"],
                "model.num_attention_heads: expected a multiple of parallel.tensor * parallel.context = 2 * 4 with "
                "data.documents: apart, got 4",
            ),
            *(
                (
                    [*APART, "parallel.context=2", f"megatron.{name}={given}"],
                    f"megatron.{name}: expected {expected} with data.documents: apart and parallel.context > 1, where "
                    f"ranks exchange tokens for heads of attention, got {given}",
                )
                for name, expected, given in (("softmax_type", "vanilla", "learnable"), ("cp_comm_type", "null", "a2a"))
            ),
            (
                ["model.attention_convolution=static", "model.pattern=C-2-"],
                "model.attention_convolution: static is for the layers *, got model.pattern 'C-2-'",
            ),
            (
                ["model.attention_convolution=dynamic", "model.pattern=C-*-", "megatron.attention_output_gate=true"],
                "model.attention_convolution: dynamic takes megatron.attention_output_gate false, got true",
            ),
        ],
    )
    def test_across_sections(self, overrides, complaint):
        text = message("small.yaml", *overrides)
        assert text.endswith(complaint)
        assert "command line" in text

    @pytest.mark.parametrize("other", ["training.precision=fp32", "model.pattern=-*"])
    def test_the_plain_optimizer_where_all_parameters_are_of_one_kind(self, other):
        words = ["parallel.distributed_optimizer=false", "training.precision=bf16", other]
        assert not load_recipe("small.yaml", words).parallel.distributed_optimizer

    @pytest.mark.parametrize("other", ["model.pattern=C-2-", "data.documents=joined", "parallel.context=1"])
    def test_heads_of_attention_need_not_divide_where_none_are_exchanged(self, other):
        words = [*APART, "model.num_query_groups=1", "megatron.cp_comm_type=p2p", "parallel.context=2", other]
        assert load_recipe("small.yaml", words).model.num_query_groups == 1

    def test_heads_need_not_divide_where_no_mixer_has_them(self):
        recipe = load_recipe("small.yaml", ["parallel.tensor=3", "training.seq_length=66", "model.pattern=-*-*"])
        assert recipe.parallel.tensor == 3

    def test_steps_or_tokens(self, write):
        both = write(MINIMAL.replace("steps: 10", "steps: 10, tokens: 1e9"))
        assert message(both).startswith(f"{both}: training.steps: expected exactly one of steps and tokens, got both")
        neither = write(MINIMAL.replace("steps: 10", "seq_length: 64"))
        assert message(neither) == f"{neither}: training.steps: expected exactly one of steps and tokens, got neither"
        few = write(MINIMAL.replace("steps: 10", "tokens: 524287"))
        assert message(few) == f"{few}: training.tokens: expected at least one step of 524288, got 524287"

    def test_tokens_are_whole_steps(self, write):
        training = load_recipe(write(MINIMAL.replace("steps: 10", "tokens: 1572863"))).training
        assert training.total_steps == 2  # three steps would be 1572864

    def test_min_lr_is_a_tenth_unless_given(self):
        assert load_recipe("small.yaml", ["training.lr=1e-3"]).training.final_lr == pytest.approx(1e-4)
        assert load_recipe("small.yaml", ["training.lr=1e-3", "training.min_lr=0"]).training.final_lr == 0
        assert load_recipe("small.yaml", ["training.lr=1e-3", "training.min_lr=5e-4"]).training.final_lr == 5e-4

    def test_text_and_indexed(self):
        text = message("small.yaml", "data.text=a.txt", "data.indexed=[b]")
        assert text == "command line: data.text: expected either text or indexed, got both"

    @pytest.mark.parametrize(
        ("word", "complaint"),
        [
            ("data.validation=a.txt", "data.validation: expected text or indexed beside it, got neither"),
            ("data.loss_on=completion", "data.loss_on: expected text or indexed beside completion, got neither"),
            ("data.loss_on=all", "data.loss_on: expected one of text, completion, got 'all'"),
            ("data.text=[]", "data.text: expected at least one, got an empty list"),
            ("data.text=[1.5e3, a]", None),
            ("data.workers=0", "data.workers: expected at least 1, got 0"),
        ],
    )
    def test_data(self, word, complaint):
        if complaint is None:
            assert load_recipe("small.yaml", [word]).data.text == ["1500.0", "a"]
        else:
            assert message("small.yaml", word) == f"command line: {complaint}"

    def test_layers_are_the_decoders(self):
        assert load_recipe("small.yaml", ["model.pattern=C-|*-/C-/C-", "parallel.pipeline=2"]).model.num_layers == 4


class TestInheritance:
    def test_from_a_name(self, write):
        recipe = load_recipe(write("inherit: gdn2_1p3b_hybrid\nmodel: {vocab_size: 50000}\n"))
        parent = load_recipe("gdn2_1p3b_hybrid")
        assert recipe.run.name == "mine"
        changed = dataclasses.replace(parent.model, vocab_size=50000)
        assert recipe == dataclasses.replace(parent, model=changed, run=recipe.run)

    def test_from_a_path_relative_to_the_file(self, write, tmp_path, monkeypatch):
        write(MINIMAL, "folder/base.yaml")
        child = write("inherit: base.yaml\ntraining: {lr: 1e-3}\n", "folder/child.yaml")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        recipe = load_recipe(child)
        assert (recipe.model.hidden_size, recipe.training.steps, recipe.training.lr) == (64, 10, 1e-3)
        # A path on the command line is relative to where the user is.
        assert load_recipe("../folder/child.yaml") == recipe

    def test_sections_merge_key_by_key_over_generations(self, write):
        write(MINIMAL + "data: {recall: {num_keys: 9, num_pairs: 3}}\nmegatron: {num_workers: 1}\n", "a.yaml")
        write("inherit: a.yaml\ndata: {recall: {num_keys: 8}}\nmegatron: {recompute_num_layers: 2}\n", "b.yaml")
        recipe = load_recipe(write("inherit: b.yaml\ndata: {recall: {num_pairs: 2}}\n"))
        assert (recipe.data.recall.num_keys, recipe.data.recall.num_pairs) == (8, 2)
        assert recipe.megatron == {"num_workers": 1, "recompute_num_layers": 2}

    def test_null_takes_a_parents_choice_back(self, write):
        write(MINIMAL + "checkpoint: {interval: 7}\n", "a.yaml")
        assert load_recipe(write("inherit: a.yaml\ncheckpoint: {interval: null}\n")).checkpoint.interval is None
        assert load_recipe("a.yaml", ["training.steps=null", "training.tokens=1e6"]).training.total_steps == 1

    @pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
    def test_cycles(self, write, tmp_path, chain):
        for name, parent in zip(chain, [*chain[1:], chain[0]], strict=True):
            write(f"inherit: {parent}.yaml\n", f"{name}.yaml")
        path = " -> ".join(f"{name}.yaml" for name in chain)
        assert message("a.yaml") == f"{tmp_path / 'a.yaml'}: inherits from itself through {path}"

    def test_a_cycle_through_a_link(self, write, tmp_path):
        write("inherit: link.yaml\n", "a.yaml")
        (tmp_path / "link.yaml").symlink_to("a.yaml")
        assert message("a.yaml") == f"{tmp_path / 'a.yaml'}: inherits from itself through a.yaml"

    def test_missing_parent_names_the_file_that_wants_it(self, write):
        path = write("inherit: gdn3_1p3b\n")
        names = ", ".join(recipe_names())
        assert message(path) == f"{path}: no recipe 'gdn3_1p3b': neither a file nor one of {names}"

    def test_missing_recipe(self, write):
        assert message("nowhere.yaml").startswith("command line: no recipe 'nowhere.yaml': neither a file nor one of")

    def test_parent_must_be_a_name(self, write):
        path = write("inherit: [a, b]\n")
        assert message(path) == f"{path}: inherit: expected a recipe's name or path, got ['a', 'b']"

    def test_fault_in_a_parent_is_the_parents(self, write):
        parent = write(MINIMAL.replace("steps: 10", "steps: ten"), "parent.yaml")
        child = write("inherit: parent.yaml\ntraining: {lr: 1e-3}\n")
        assert message(child) == f"{parent}: training.steps: expected an integer or null, got 'ten'"

    def test_fault_in_a_child_is_the_childs(self, write):
        write(MINIMAL, "parent.yaml")
        child = write("inherit: parent.yaml\ntraining: {steps: ten}\n")
        assert message(child) == f"{child}: training.steps: expected an integer or null, got 'ten'"

    def test_fault_on_the_command_line_is_the_command_lines(self, write):
        path = write(MINIMAL)
        for override, complaint in [
            ("training.steps=ten", "training.steps: expected an integer or null, got 'ten'"),
            ("training={steps: ten}", "training.steps: expected an integer or null, got 'ten'"),
            ("data.recall.num_keys=x", "data.recall.num_keys: expected an integer, got 'x'"),
        ]:
            assert message(path, override) == f"command line: {complaint}"

    @pytest.mark.parametrize(
        "override",
        ["training.tokens=1e9", "model.hidden_size=66", "training.steps={a: 1}", "model.pattern.x=C-"],
    )
    def test_an_override_that_breaks_a_key_of_the_file(self, write, override):
        path = write(MINIMAL.replace("hidden_size: 64", "hidden_size: 64, num_attention_heads: 4"))
        assert "command line" in message(path, override)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("training.seq_length=96", 96),
            ("training.lr=1e-2", 0.01),
            ("training.lr=1", 1),
            ("mixer.conv_bias=true", True),
            ("parallel.sequence=false", False),
            ("data.indexed=[a, b]", ["a", "b"]),
            ("data.text=[a.txt, 'b c/*.jsonl']", ["a.txt", "b c/*.jsonl"]),
            ("data.text=corpus/[ab].txt", "corpus/[ab].txt"),
            ("data.text=corpus.txt", "corpus.txt"),
            ("data.text=null", None),
            ("data.text=", None),
            ("checkpoint.interval=null", None),
            ("checkpoint.interval=~", None),
            ("training.precision=bf16", "bf16"),
            ("data.split=90,9,1", "90,9,1"),
            ("data.tokenizer=sentencepiece:a=b.model", "sentencepiece:a=b.model"),
            # A text takes what was typed, whatever YAML would make of it.
            ("run.name=2026", "2026"),
            ("run.name=007", "007"),
            ("run.name=1e5", "1e5"),
            ("run.name=true", "true"),
            ("run.name=2026-01-02", "2026-01-02"),
            ("run.name='2026'", "2026"),
            ("model.pattern=22", "22"),
            ("run.name=[a]", "[a]"),
            ("megatron.recompute_granularity=full", "full"),
            ("megatron.recompute_num_layers=2", 2),
            ("megatron.moe_layer_freq=[1, 0]", [1, 0]),
        ],
    )
    def test_value(self, override, value):
        found = load_recipe("small.yaml", [override]).to_dict()
        for part in override.partition("=")[0].split("."):
            found = found[part]
        assert found == value
        assert type(found) is type(value)

    def test_the_last_one_wins(self):
        assert load_recipe("small.yaml", ["training.steps=5", "training.lr=1", "training.steps=6"]).training.steps == 6

    def test_override_of_a_section_keeps_its_other_keys(self):
        plain, changed = load_recipe("small.yaml"), load_recipe("small.yaml", ["training={lr: 1e-4, steps: 3}"])
        assert changed.training == dataclasses.replace(plain.training, lr=1e-4, steps=3)

    @pytest.mark.parametrize("word", ["training.steps", "--training.steps", "=3", "steps 3", ""])
    def test_bad_words(self, word):
        assert message("small.yaml", word) == f"command line: expected section.key=value, got {word!r}"

    @pytest.mark.parametrize(
        ("word", "complaint"),
        [
            ("training.steps=[1", "command line: training.steps: not valid YAML: "),
            ("training={lr: 1, lr: 2}", "command line: training: line 1: key 'lr' appears twice"),
            ("model..pattern=C-", "command line: unknown key model."),
            ("inherit=debug", "command line: unknown key inherit"),
        ],
    )
    def test_bad_values(self, word, complaint):
        assert message("small.yaml", word).startswith(complaint)

    def test_a_pattern_that_begins_with_attention(self):
        assert load_recipe("small.yaml", ["model.pattern=*-C-"]).model.pattern == "*-C-"

    def test_a_name_like_an_impossible_date(self):
        assert load_recipe("small.yaml", ["run.name=2026-13-45"]).run.name == "2026-13-45"

    @pytest.mark.parametrize("name", ["#1.txt", "corpus #1.txt"])
    def test_a_text_with_a_hash(self, name):
        assert load_recipe("small.yaml", [f"data.text={name}"]).data.text == name

    def test_weights_of_indexed_data(self):
        recipe = load_recipe("small.yaml", ["data.indexed=[0.3, a, 0.7, b]"])
        assert recipe.data.indexed == ["0.3", "a", "0.7", "b"]

    def test_null_takes_all_of_a_section_back(self):
        recipe = load_recipe("small.yaml", ["mixer=null"])
        assert recipe.mixer == MixerConfig()
        assert recipe.mixer != load_recipe("small.yaml").mixer


class TestRunName:
    def test_is_the_recipes_name(self, write):
        assert load_recipe(write(MINIMAL, "tuned.v2.yaml")).run.name == "tuned.v2"

    def test_has_the_texts_name(self):
        assert load_recipe("small.yaml", ["data.text=corpora/tiny.stories.txt"]).run.name == "small-tiny.stories"

    def test_has_the_names_of_indexed_data(self):
        recipe = load_recipe("small.yaml", ["data.indexed=[0.3, corpora/web, 0.7, code]"])
        assert recipe.run.name == "small-web-code"

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("corpora/web.jsonl.gz", "web"),
            ("corpora/web/*.parquet", "web"),
            ("corpora/web/", "web"),
            ("*.txt", "texts"),
            ("[a.txt, b/c.jsonl.zst]", "a-c"),
            ("[a.txt, b.txt, c.txt, d.txt]", "a-b-2-more"),
        ],
    )
    def test_has_the_name_of_files_folders_and_globs(self, text, name):
        assert load_recipe("small.yaml", [f"data.text={text}"]).run.name == f"small-{name}"

    def test_may_be_given(self):
        recipe = load_recipe("small.yaml", ["data.text=a.txt", "run.name=mine", "run.folder=elsewhere"])
        assert recipe.run.name == "mine"
        assert str(recipe.run.path) == "elsewhere/mine"


class TestDump:
    @pytest.mark.parametrize("name", recipe_names())
    def test_shipped_recipes_come_back(self, write, name):
        recipe = load_recipe(name)
        assert load_recipe(write(recipe.dump(), "recipe.yaml")) == recipe

    def test_unusual_values_come_back(self, write):
        recipe = load_recipe(
            "small.yaml",
            [
                "run.name=2026", "data.text=ä ö: #1.txt", "training.lr=1e-07", "training.adam_eps=1e-12",
                "checkpoint.interval=null", "data.tokenizer='null'", "data.text_key='yes'", "run.folder=~/a b",
                "megatron={recompute_modules: [core_attn, mlp], num_workers: 3, fp8: null}",
                "model.pattern=22", "training.clip_grad=2",
            ],
        )  # fmt: skip
        assert (recipe.data.text_key, recipe.data.tokenizer, recipe.run.name) == ("yes", "null", "2026")
        assert load_recipe(write(recipe.dump(), "recipe.yaml")) == recipe

    def test_a_text_like_a_float_comes_back(self, write):
        recipe = load_recipe("small.yaml", ["run.name=4e-4"])
        assert recipe.run.name == "4e-4"
        assert load_recipe(write(recipe.dump(), "recipe.yaml")) == recipe

    def test_is_plain_yaml_with_every_key(self):
        recipe = load_recipe("small.yaml")
        values = yaml.safe_load(recipe.dump())
        assert list(values) == [f.name for f in dataclasses.fields(Recipe)]
        assert values["mixer"]["content_rank"] == recipe.mixer.content_rank
        assert values["data"]["recall"]["num_pairs"] == recipe.data.recall.num_pairs
        assert math.isclose(values["training"]["lr"], recipe.training.lr)
        assert not re.search(r"[&*]id\d", recipe.dump())
