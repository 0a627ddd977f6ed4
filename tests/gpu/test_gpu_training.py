"""Whole training runs on a GPU: layers of both kinds, checkpoints between them, the 1.3B recipes."""

import importlib.util
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.train import losses, train

pytestmark = pytest.mark.gpu

needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)

STEPS = 40
SHORT = (
    "debug", f"training.steps={STEPS}", "training.micro_batch_size=4", "training.global_batch_size=4",
    "run.log_interval=1", "checkpoint.interval=20",
)  # fmt: skip
# Relative; runs drift apart by rounding as they go, here measured at 1e-6 after 10 steps and 3e-5 after 40.
SAME_CURVE = 2e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The debug recipe on the CPU, and on the GPU with each kind of layers."""
    folder = tmp_path_factory.mktemp("runs")
    words = {"cpu": ["run.device=cpu"], "local": ["model.layers=local"]}
    if importlib.util.find_spec("transformer_engine"):
        words["transformer_engine"] = ["model.layers=transformer_engine"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: train(folder, *SHORT, f"run.name={name}", *words[name], threads=2), words))
    return folder


@pytest.mark.parametrize("layers", ["local", pytest.param("transformer_engine", marks=needs_te)])
def test_gpu_gives_the_cpu_loss_curve(runs, layers):
    # Each device draws its own initial weights, so both continue from one checkpoint.
    name = f"cpu-to-{layers}"
    out = branch_off_at_step_20(runs, "cpu", name, f"model.layers={layers}")
    assert "saved on cpu" in out
    expected, actual = losses(runs, "cpu"), losses(runs, name)
    for step in range(21, STEPS + 1):
        assert actual[step] == pytest.approx(expected[step], rel=SAME_CURVE), f"step {step}"


@needs_te
def test_both_kinds_of_layers_give_one_loss_curve(runs):
    local, te = losses(runs, "local"), losses(runs, "transformer_engine")
    for step, loss in local.items():
        assert te[step] == pytest.approx(loss, rel=SAME_CURVE), f"step {step}"


@needs_te
@pytest.mark.parametrize(("source", "target"), [("local", "transformer_engine"), ("transformer_engine", "local")])
def test_checkpoint_of_one_kind_of_layers_resumes_in_the_other(runs, source, target):
    name = f"{source}-to-{target}"
    branch_off_at_step_20(runs, source, name, f"model.layers={target}")
    resumed, straight = losses(runs, name), losses(runs, source)
    for step in range(21, STEPS + 1):
        assert resumed[step] == pytest.approx(straight[step], rel=SAME_CURVE), f"step {step}"


@needs_te
@pytest.mark.parametrize("convolution", ["static", "dynamic"])
@pytest.mark.parametrize(("source", "target"), [("local", "transformer_engine"), ("transformer_engine", "local")])
def test_attention_is_convolved_alike_in_both_kinds_of_layers(tmp_path, source, target, convolution):
    words = [f"model.attention_convolution={convolution}", "model.num_query_groups=2"]
    train(tmp_path, *SHORT, *words, f"run.name={source}", f"model.layers={source}")
    branch_off_at_step_20(tmp_path, source, target, f"model.layers={target}", *words)
    resumed, straight = losses(tmp_path, target), losses(tmp_path, source)
    for step in range(21, STEPS + 1):
        assert resumed[step] == pytest.approx(straight[step], rel=SAME_CURVE), f"step {step}"


@needs_te
def test_deterministic_mode_resumes_to_the_last_bit(tmp_path):
    words = [
        "model.layers=transformer_engine", "model.pattern=C-*-2-*-", "training.precision=bf16",
        "megatron.deterministic_mode=true", "mixer.short_convolution=dynamic", "model.attention_convolution=dynamic",
    ]  # fmt: skip
    train(tmp_path, *SHORT, *words)
    branch_off_at_step_20(tmp_path, "debug", "resumed", *words)
    assert losses(tmp_path, "resumed") == losses(tmp_path, "debug")


def branch_off_at_step_20(folder, source, name, *words):
    """Copy the run `source` as it was at step 20 and continue it under another name; returns what was printed."""
    shutil.copytree(folder / "runs" / source, folder / "runs" / name)
    (folder / "runs" / name / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    out = train(folder, *SHORT, f"run.name={name}", *words).stdout
    assert "resuming at step 20" in out
    return out


def test_both_backends_and_recomputation_train_the_same_model(tmp_path):
    """200 steps on text (this project's own) in bfloat16, CARVE, attention and GDN-2."""
    sources = sorted(Path(__file__).parents[2].rglob("megatron_carve/**/*.py"))
    (tmp_path / "text.txt").write_text("\n".join(source.read_text() for source in sources))
    words = [
        "debug", "data.text=text.txt", "model.pattern=C-*-2-", "mixer.num_key_heads=2", "mixer.num_value_heads=2",
        "mixer.key_head_dim=64", "mixer.value_head_dim=64", "training.steps=200", "training.seq_length=192",
        "training.micro_batch_size=16", "training.global_batch_size=16", "training.precision=bf16", "training.lr=2e-3",
        "training.eval_interval=200", "checkpoint.interval=null", "run.log_interval=1",
    ]  # fmt: skip
    runs = {
        "torch": ["model.mixer_backend=torch"],
        "triton": ["model.mixer_backend=triton"],
        "recomputed": ["model.mixer_backend=triton", "model.mixer_recompute=true"],
    }
    with ThreadPoolExecutor() as pool:  # torch takes minutes, bound by its many launches
        list(pool.map(lambda run: train(tmp_path, *words, f"run.name={run}", *runs[run]), runs))
    curves = {name: torch.tensor(list(losses(tmp_path, name).values())) for name in runs}
    assert len(curves["torch"]) == 200
    assert curves["recomputed"].equal(curves["triton"])
    assert curves["torch"][-20:].mean() < 2.6 < 5 < curves["torch"][0]
    # bfloat16's rounding errors make two runs part; means over 20 steps stay together
    means = {name: curve.unflatten(0, (10, 20)).mean(1) for name, curve in curves.items()}
    difference = (means["triton"] / means["torch"] - 1).abs()
    print("relative difference of 20-step means:", [f"{x:.1e}" for x in difference.tolist()])
    assert difference.max() < 0.02


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(tmp_path, precision):
    train(tmp_path, *SHORT, f"training.precision={precision}", "training.lr=3e-3", "checkpoint.interval=null")
    curve = losses(tmp_path, "debug")
    assert curve[STEPS] < 3.6 < 4.5 < curve[1]


@needs_fla
def test_all_four_letters_of_our_stack_in_one_pattern(tmp_path):
    # Deterministic mode takes Megatron's GDN through torch, where the peer's kernels refuse some Triton versions.
    train(
        tmp_path, *SHORT, "model.pattern=C-2-*-G-", "megatron.deterministic_mode=true", "checkpoint.interval=null",
    )  # fmt: skip
    curve = losses(tmp_path, "debug")
    assert curve[STEPS] < 3.7 < curve[1]


@needs_te
@pytest.mark.parametrize(
    "recipe", ["carve_1p3b_hybrid", "carve_1p3b_recurrent", "gdn2_1p3b_hybrid", "gdn2_1p3b_recurrent"]
)
def test_optimizer_steps_of_a_full_size_recipe(tmp_path, recipe):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "sleeps"]
    text = " ".join(random.Random(0).choices(words, k=20_000))
    (tmp_path / "words.txt").write_text(text)
    train(
        tmp_path, recipe, "data.text=words.txt", "run.name=full", "training.tokens=null", "training.steps=2",
        "training.global_batch_size=1", "training.warmup_fraction=0", "training.eval_iters=1",
        "checkpoint.interval=null", "run.log_interval=1",
    )  # fmt: skip
    curve = losses(tmp_path, "full")
    assert 9 < curve[1] < 12  # log(32000) = 10.4 for a model that knows nothing
    assert curve[2] < curve[1]


OWN_LINES = (
    r"backend 'auto' on cuda: triton$|said: C-\*-C- on cuda, starting, |layers: |conv|"
    r"the first step compiles what torch fuses|compiling Triton kernels for |"
    r"\d+ kernels compiled in |set up and compiled in |step +\d+/\d+ \| loss |"
    r"  validation at step \d+: loss |trained |validation loss |loss curve "
)


def test_a_run_prints_its_own_lines_alone(runs):
    done = train(runs, *SHORT, "run.name=said")
    said = filter(None, (done.stdout + done.stderr).splitlines())
    assert [line for line in said if not re.match(OWN_LINES, line)] == []
    assert re.search(r"step +40/40 .* tokens/s, [\d.e+-]+ TFLOP/s", done.stdout)


def test_samples_and_tasks_leave_a_run_as_it_is(runs):
    (runs / "cats.txt").write_text("the cat sat on the mat, and then it sat again.\n" * 400)
    words = [*SHORT, "data.text=cats.txt", "training.eval_interval=20", "megatron.deterministic_mode=true"]
    train(runs, *words, "run.name=quiet")
    tasks = "run.evaluate='--tasks perplexity,single_1 --text cats.txt --samples 2 --needle-lengths 300'"
    out = train(runs, *words, "run.name=talks", "run.sample_prompts=[the cat]", tasks).stdout
    assert "  sample at step 20: " in out and out.count("  perplexity of cats.txt") == 2
    assert losses(runs, "talks") == losses(runs, "quiet")
