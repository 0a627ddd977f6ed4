"""A run as a Hugging Face folder and back: the same logits, the same texts, the same weights, from any layout."""

import dataclasses
import json
import math
import resource
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support.programs import assert_complaints, program
from support.train import losses, train, train_ranks

from megatron_carve.kernels import chunk_carve, chunk_gdn2
from megatron_carve.model.config import MixerConfig
from megatron_carve.model.variants import VARIANTS
from megatron_carve.use import modeling_carve
from megatron_carve.use.hugging_face import write_folder

TINY = """
inherit: debug
model: {pattern: C-*-2-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
  attention_convolution: dynamic}
mixer: {num_key_heads: 2, num_value_heads: 4, key_head_dim: 16, value_head_dim: 12, content_rank: 4}
training: {steps: 30, seq_length: 150, micro_batch_size: 2, global_batch_size: 2}
checkpoint: {interval: 30}
data: {text: cats.txt}
"""  # with the window of 32 keys of the recipe it inherits
# What else a mixer can be, and a model.
OTHER = [
    "model.pattern=C-*-K-2-",
    "model.tie_embeddings=true", "model.position_embedding=none", "model.attention_window=null", "mixer.conv_bias=true",
    "mixer.decay_projection=full_rank", "mixer.output_gate_projection=full_rank", "mixer.negative_eigenvalues=true",
    "mixer.output_gate_activation=sigmoid", "mixer.content_chunk=128", "mixer.conv_width=2", "mixer.erase=delta",
    "mixer.short_convolution=dynamic", "mixer.convolution_rank=3", "model.attention_convolution=static",
]  # fmt: skip
LEAST = [
    "mixer.prediction=decayed", "mixer.content_rank=0", "mixer.short_convolution=none",
    "mixer.output_gate_activation=none", "model.attention_convolution=none",
]  # fmt: skip
RUNS = {"plain": [], "other": OTHER, "least": LEAST}
EACH = [
    "plain",
    pytest.param("other", marks=pytest.mark.slow),
    pytest.param("least", marks=pytest.mark.long),
]
# In a process of its own, from a folder where the project's sources are not.
COMPARE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
out, run = sys.argv[1:]
ids = torch.randint(257, (2, 200), generator=torch.Generator().manual_seed(1))
if run == "theirs":
    sys.modules["megatron_carve"] = None  # as where it is not installed
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        logits = model(ids).logits
        cache, parts = None, []
        for part in ids.split([3, 64, 1, 1, 100, 31], 1):
            step = model(part, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    greedy = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1]:]
    text = "the ünïcode cat\\n sat"
    result = {"dtype": str(next(model.parameters()).dtype), "text": tokenizer.decode(greedy),
              "ids": tokenizer(text).input_ids, "round": tokenizer.decode(tokenizer(text).input_ids) == text,
              "float32": sorted(n for n, p in model.named_parameters() if p.dtype == torch.float32),
              "stored": max(x.untyped_storage().nbytes() / x.nbytes for layer in cache.layers for x in
                            (x for v in layer.parts.values() for x in (v if isinstance(v, tuple) else [v]))),
              "logits": logits.tolist(), "parts": torch.cat(parts, 1).tolist()}
else:
    from megatron_carve.use.generation import Sampling, generate
    from megatron_carve.use.trained import trained_model
    with trained_model(out, device="cpu") as trained:
        with torch.no_grad():
            logits = trained.model(ids, torch.arange(200).expand(2, -1), None)
        prompt = torch.from_numpy(trained.tokenizer.encode("the cat")).long()
        tokens = generate(trained.model, [prompt], max_new_tokens=40, sampling=Sampling(temperature=0), vocab_size=257)
        result = {"text": trained.tokenizer.decode(torch.cat(list(tokens)).numpy()), "logits": logits.tolist(),
                  "ids": trained.tokenizer.encode("the ünïcode cat\\n sat").tolist()}
json.dump(result, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "cats.txt").write_text("the cat sat on the mat. " * 800)
    return folder


def results(folder, place, run):
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, place, run], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


class Exports(dict):
    """Run of RUNS -> its exported folder; trained and exported when it is first asked for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        train(self.folder, "tiny.yaml", f"run.name={name}", *RUNS[name])
        done = program(self.folder, "export", f"runs/{name}", f"out/{name}")
        assert f"out/{name}: step 30, " in done.stdout
        self[name] = f"out/{name}"
        return self[name]


@pytest.fixture(scope="module")
def exported(folder):
    return Exports(folder)


@pytest.mark.parametrize("name", EACH)
def test_transformers_computes_and_generates_the_same(folder, exported, name):
    theirs, ours = results(folder, exported[name], "theirs"), results(folder, f"runs/{name}", "ours")
    expected = torch.tensor(ours["logits"])
    for key in ("logits", "parts"):
        torch.testing.assert_close(torch.tensor(theirs[key]), expected, rtol=1e-4, atol=2e-4)
    assert theirs["text"] == ours["text"] and len(ours["text"]) > 20
    assert theirs["ids"] == ours["ids"] and theirs["round"]
    assert theirs["dtype"] == "torch.float32"
    assert theirs["stored"] == 1  # the memory holds what it needs and nothing around it


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_import_goes_back_to_the_same_weights(folder, exported, name):
    program(folder, "import", exported[name], f"back/{name}")
    program(folder, "export", f"back/{name}", f"again/{name}")
    first, second = (load_file(folder / place / name / "model.safetensors") for place in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) and first[key].abs().sum() > 0 for key in first)
    configs = [json.loads((folder / place / name / "config.json").read_text()) for place in ("out", "again")]
    assert configs[0] == configs[1]


@pytest.mark.long
def test_an_imported_run_can_be_trained_on(folder, exported):
    program(folder, "import", exported["plain"], "runs/imported")
    words = ["tiny.yaml", "checkpoint.weights_only=true", "training.steps=2", "training.lr=1e-9", "run.log_interval=1"]
    train(folder, *words, "run.name=from_import", "checkpoint.load=runs/imported")
    train(folder, *words, "run.name=from_run", "checkpoint.load=runs/plain")
    assert losses(folder, "from_import") == losses(folder, "from_run")


@pytest.mark.long
def test_a_run_of_two_processes_exports_the_same(folder, exported):
    words = ["tiny.yaml", "run.name=two", "checkpoint.load=runs/plain", "training.steps=31", "training.lr=1e-12"]
    train_ranks(2, folder, *words, "parallel.tensor=2")
    program(folder, "export", "runs/two", "out/two")
    two, one = (load_file(folder / "out" / name / "model.safetensors") for name in ("two", "plain"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
def test_a_bfloat16_run_keeps_decay_and_erase_bias_in_float32(folder):
    train(folder, "tiny.yaml", "run.name=half", "training.precision=bf16", "training.steps=3", "checkpoint.interval=3")
    program(folder, "export", "runs/half", "out/half")
    kinds = {name: w.dtype for name, w in load_file(folder / "out" / "half" / "model.safetensors").items()}
    in_float32 = {name for name, kind in kinds.items() if kind == torch.float32}
    assert in_float32 == {name for name in kinds if name.endswith(("A_log", "dt_bias", "erase_bias"))}
    theirs, ours = results(folder, "out/half", "theirs"), results(folder, "runs/half", "ours")
    assert theirs["dtype"] == "torch.bfloat16"
    assert theirs["float32"] == sorted(in_float32)
    theirs, ours = torch.tensor(theirs["logits"]), torch.tensor(ours["logits"])
    assert (theirs - ours).norm() < 0.02 * ours.norm()  # two orders of rounding


@pytest.mark.long
def test_a_hugging_face_tokenizer_goes_along(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "the", "cat", "sat", "on", "mat", ".", "<end>"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", unk_token="<unk>").save_pretrained(
        folder / "words"
    )
    options = ["data.tokenizer=huggingface:./words", "training.steps=2", "checkpoint.interval=2"]
    train(folder, "tiny.yaml", "run.name=words", *options)
    program(folder, "export", "runs/words", "out/words")
    config = json.loads((folder / "out" / "words" / "config.json").read_text())
    assert config["recipe"]["data"] == {"tokenizer": "huggingface:./words", "text": "cats.txt"}
    assert (folder / "out" / "words" / "tokenizer.json").exists()
    (folder / "words").rename(folder / "gone")  # as on another machine
    program(folder, "import", "out/words", "runs/words_back")
    recipe = (folder / "runs" / "words_back" / "recipe.yaml").read_text()
    assert "tokenizer: huggingface:./words" in recipe and "device: auto" in recipe
    (folder / "elsewhere").mkdir()
    for run in ("words", "words_back"):  # and from another folder
        words = [f"../runs/{run}", "--prompt", "the cat", "--max-new-tokens", "3"]
        assert program(folder / "elsewhere", "generate", *words).stdout.strip()
    out = train(folder, "tiny.yaml", "run.name=words", *options, "training.steps=3").stdout
    assert "resuming at step 2" in out and "data.tokenizer" not in out


def changed(config, sections):
    """A config.json with other values in its recipe."""
    for section, values in sections.items():
        kept = config["recipe"][section]
        config["recipe"][section] = {**kept, **values} if isinstance(values, dict) else values
    return config


def test_mistakes_end_in_one_line(folder, exported):
    from safetensors.torch import load_file, save_file

    other, damaged = folder / "other_model", folder / "damaged"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    damaged.mkdir()
    (damaged / "config.json").write_text((folder / exported["plain"] / "config.json").read_text())
    weights = load_file(folder / exported["plain"] / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors")
    earlier = folder / "earlier_form"
    earlier.mkdir()
    config = json.loads((folder / exported["plain"] / "config.json").read_text())
    del config["recipe"]["mixer"]["erase"]
    (earlier / "config.json").write_text(json.dumps(config))
    odd = {  # folder -> config.json
        "no_json": "{", "a_list": "[]", "no_data": {"data": None}, "no_training": {"training": 3},
        "odd_tokenizer": {"data": {"tokenizer": 5}}, "odd_size": {"model": {"hidden_size": "wide"}},
        "odd_key": {"mixer": {"width": 1}},
    }  # fmt: skip
    whole = (folder / exported["plain"] / "config.json").read_text()
    for name, change in odd.items():
        (folder / name).mkdir()
        text = change if isinstance(change, str) else json.dumps(changed(json.loads(whole), change))
        (folder / name / "config.json").write_text(text)
    data = (folder / exported["plain"] / "model.safetensors").read_bytes()
    for name, damage in (
        ("cut", data[:-1]), ("cut_head", data[:50]), ("flipped", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(whole)
        (folder / name / "model.safetensors").write_bytes(damage)
    exports = [
        (["runs/none", "out/none"], "runs/none: expected the folder of a run"),
        (["runs/plain", "."], ".: expected a new or empty folder"),
    ]
    assert_complaints(folder, "export", exports)
    imports = [
        (["runs/plain", "back/none"], "config.json"),
        (["other_model", "back/none"], "expected a folder that megatron_carve.export wrote, got model_type 'llama'"),
        (["earlier_form", "back/none"], "earlier_form: the model is CARVE as this package built it before the paper's"),
        (["damaged", "back/none"], "model.safetensors: expected 58 tensors, but model.norm.weight is missing"),
        ([exported["plain"], "runs/plain"], "runs/plain: expected a new or empty folder"),
        (["no_json", "back/none"], "no_json/config.json: expected JSON: Expecting property name"),
        (["a_list", "back/none"], "a_list: expected a folder that megatron_carve.export wrote, got model_type None"),
        (["no_data", "back/none"], "config.json: recipe.data: expected the section of a recipe, got None"),
        (["no_training", "back/none"], "config.json: recipe.training: expected the section of a recipe, got 3"),
        (["odd_tokenizer", "back/none"], "config.json: recipe.data.tokenizer: expected a string, got 5"),
        (["odd_size", "back/none"], "config.json: model.hidden_size: expected an integer, got 'wide'"),
        (["odd_key", "back/none"], "config.json: unknown key mixer.width"),
        (["cut", "back/none"], "cut/model.safetensors: is damaged: "),
        (["cut_head", "back/none"], "cut_head/model.safetensors: is damaged: "),
        (["flipped", "back/none"], "flipped/model.safetensors: is damaged: its weights have another checksum"),
    ]
    assert_complaints(folder, "import", imports)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "import"])
def test_a_killed_program_leaves_nothing_in_its_own_way(folder, exported, name):
    words = ["runs/plain", "out/killed"] if name == "export" else [exported["plain"], "back/killed"]
    target = folder / words[1]
    process = subprocess.Popen([sys.executable, "-m", f"megatron_carve.{name}", *words], cwd=folder)
    deadline = time.monotonic() + 120
    while not any((target / ".partial").glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait(60)
    assert [found.name for found in target.iterdir()] == [".partial"]
    program(folder, name, *words)
    assert (target / ("model.safetensors" if name == "export" else "checkpoints")).exists()
    assert not (target / ".partial").exists()


@pytest.mark.slow
def test_where_the_disk_is_full_no_half_export_stays(folder, exported):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    words = [sys.executable, "-m", "megatron_carve.export", "runs/plain", "out/full"]
    assert exported["plain"]
    run = subprocess.run(words, cwd=folder, preexec_fn=no_large_files, capture_output=True, text=True)
    assert run.returncode == 1 and "File too large; what was being written is not whole" in run.stderr.splitlines()[-1]
    assert not (folder / "out/full").exists()


def small_model(**options):
    """A CARVE model of transformers that no run was exported from."""
    sizes = {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 128, "value_head_dim": 128}
    mixer = dataclasses.asdict(MixerConfig(**sizes, **options))
    return modeling_carve.CarveForCausalLM(modeling_carve.CarveConfig(pattern="C-", mixer=mixer))


def test_a_new_model_begins_as_the_package_does():
    torch.manual_seed(1)
    mixer = small_model().model.layers[0].mixer
    assert torch.equal(mixer.erase_bias, torch.full((256,), -4.0))
    assert mixer.content_down.detach().std() == pytest.approx(128**-0.5, rel=0.05)
    assert not mixer.content_up.any()
    assert mixer.A_log.min() >= 0 and mixer.A_log.max() <= math.log(16) and mixer.A_log.exp().mean() > 6
    steps = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 0.001 <= steps.min() < 0.002 < 0.05 < steps.max() <= 0.1001
    assert 0.4 < mixer.conv_weight.abs().max() <= 0.5
    assert not small_model(erase="delta").model.layers[0].mixer.erase_bias.any()
    assert (small_model(erase_bias=-2.5).model.layers[0].mixer.erase_bias == -2.5).all()


def test_what_was_loaded_is_not_begun_anew():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # the mark of transformers, whose 5.0 asks for all of them
    for module in model.modules():
        model._init_weights(module)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]), name


def test_generation_reads_every_token_once():
    """Whatever transformers calls the cache; and goes on from one that it returned."""
    model = small_model().eval()
    read = []
    model.model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    prompt = torch.randint(256, (1, 24))

    def go_on(ids, new, **more):
        # with a mask, or transformers would take the padding's number for padding
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, **more,
        )  # fmt: skip

    first = go_on(prompt, 4)
    assert read == [24, 1, 1, 1]
    whole = go_on(prompt, 7).sequences
    read.clear()
    more = go_on(first.sequences, 3, **{modeling_carve.CACHE: first[modeling_carve.CACHE]}).sequences
    assert read == [1, 1, 1]
    assert torch.equal(more, whole)


def test_weights_in_several_files_are_read(tmp_path):
    from megatron_carve.use import hugging_face

    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found, expected = hugging_face.read_weights(tmp_path), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (tmp_path / hugging_face.INDEX).write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    with pytest.raises(ValueError, match=r"index\.json: expected a weight_map of tensors to files of the folder"):
        hugging_face.read_weights(tmp_path)


def test_packed_batches_and_unknown_arguments_are_refused():
    model = small_model().eval()
    tokens = torch.randint(256, (1, 6))
    for name in ("cu_seq_lens_q", "seq_idx"):
        with pytest.raises(ValueError, match=f"{name}: this model takes no such argument"):
            model(tokens, **{name: torch.tensor([0, 2, 6])})
    with pytest.raises(ValueError, match="position_ids: expected 6 consecutive positions from 0 on"):
        model(tokens, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]))
    plain = model(tokens).logits
    assert torch.equal(model(tokens, position_ids=torch.arange(6)[None], return_dict=True).logits, plain)
    begun = model(tokens[:, :4], use_cache=True)
    later = model(
        tokens[:, 4:], position_ids=torch.tensor([[4, 5]]), **{modeling_carve.CACHE: begun[modeling_carve.CACHE]}
    )
    torch.testing.assert_close(later.logits, plain[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steepest", [-1e5, -1e7, -math.inf])
def test_the_exported_recurrences_stay_right_however_steep_a_token_decays(steepest):
    B, T, H, K, V = 1, 150, 2, 16, 12
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    v, g, erase = torch.randn(B, T, H, V), -torch.rand(B, T, H, K), torch.randn(B, T, H, K)
    g[:, 70], g[:, 100, :, ::2] = steepest, steepest
    w, D, U = torch.rand(B, T, H), torch.randn(4, V) / 4, torch.randn(K, 4)
    wide = w[..., None].expand_as(v)

    def compare(found, op, *inputs):
        expected = op(*(x.double() for x in inputs), backend="torch")[0]
        assert (found - expected).norm() < 2e-5 * expected.norm()

    compare(
        modeling_carve.gdn2(q, k, v, g, erase.sigmoid(), wide, None)[0], chunk_gdn2, q, k, v, g, erase.sigmoid(), wide
    )
    options = {"content_chunk": 64, "content_grad": "full", "erase": "diagonal", "prediction": "previous"}
    found, _ = modeling_carve.carve_recurrence(q, k, v, g, erase, w, 1.0, (D, U), options, None)
    compare(found, chunk_carve, q, k, v, g, erase, w, D, U)


def test_the_exported_code_knows_the_mixers():
    for variant in VARIANTS.values():
        theirs = modeling_carve.MIXERS[variant.letter]
        assert theirs == {name: getattr(variant, name) for name in ("op", "erase", "write", "sees_state")}


def test_layers_that_no_kernel_has_the_widths_of_take_torch():
    mixer, without_content = (small_model(**options).model.layers[0].mixer for options in ({}, {"content_rank": 0}))
    delta = small_model(erase="delta", content_rank=0).model.layers[0].mixer
    assert mixer._kernels_take(torch.bfloat16) and delta._kernels_take(torch.float32)
    assert not mixer._kernels_take(torch.float32) and not without_content._kernels_take(torch.float16)


def test_the_same_model_is_the_same_files_whenever_it_is_written(tmp_path):
    weights = {"b.weight": torch.randn(3, 4), "a.weight": torch.randn(5).bfloat16()}
    config = {"eos_token_id": 9, "vocab_size": 12}
    written = set()
    for i in range(12):  # by chance alone they would be alike once in thousands
        out = tmp_path / f"{i}"
        write_folder(out, weights, config, vocab_size=10, tokenizer=None)
        written.add(tuple((file.name, file.read_bytes()) for file in sorted(out.iterdir())))
    assert len(written) == 1
    read = load_file(tmp_path / "0/model.safetensors")
    assert all(torch.equal(read[name], x) for name, x in weights.items())
