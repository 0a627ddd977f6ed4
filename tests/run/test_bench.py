"""The program that measures training steps, run as a user does, on the CPU."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.parallel import launch

from megatron_carve import bench
from megatron_carve.recipe import estimate, load_recipe
from megatron_carve.run.breakdown import PARTS


def run(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "megatron_carve.bench", *words], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_measured_step_of_the_debug_recipe(tmp_path):
    words = ["debug", "training.global_batch_size=32", "run.device=cpu"]
    done = run(tmp_path, *words, "--warmup", "1", "--steps", "3", "--json", "n.json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "n.json").read_text())
    recipe = load_recipe("debug", words[1:])
    vocab = 32 + 32 + 1
    assert numbers["parameters"] == sum(estimate.parameters(recipe, vocab).values())
    assert numbers["tokens_per_step"] == 32 * 128
    assert len(numbers["all_seconds"]) == 3
    assert len(numbers["losses"]) == 1 + 3 + 1 and all(3 < loss < 5 for loss in numbers["losses"])
    assert numbers["seconds_per_step"] == sorted(numbers["all_seconds"])[1]
    assert numbers["tokens_per_second_and_gpu"] == pytest.approx(32 * 128 / numbers["seconds_per_step"])
    flops = 3 * estimate.forward_flops_per_token(recipe, vocab)
    assert numbers["model_tflops_per_second_and_gpu"] == pytest.approx(
        flops * numbers["tokens_per_second_and_gpu"] / 1e12
    )
    assert numbers["utilisation"] is None and numbers["peak_allocated_bytes"] is None
    parts = numbers["seconds_by_part"]
    assert list(parts) == list(PARTS) and all(seconds > 0 for seconds in parts.values())
    # the profiled step is as long as the timed ones, within what a profiler and a busy machine change
    assert 0.4 < sum(parts.values()) / numbers["seconds_per_step"] < 2.5
    for expected in (f"{numbers['parameters']:,} parameters", "tokens/s", "mixer op", "optimizer"):
        assert expected in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["n.json"]  # nothing else is left
    on_gpu = {**numbers, "peak_allocated_bytes": 1, "peak_reserved_bytes": 1}
    assert any("the GPU's work" in line for line in bench.report(on_gpu))


@pytest.mark.parametrize("letter", ["E", "M"])
def test_numbers_of_layers_on_a_gpu(letter, monkeypatch):
    """Called as on a GPU; of Megatron's M neither operations nor memory are known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    recipe = load_recipe("debug", [f"model.pattern=C-{letter}-", "megatron.num_experts=4"])
    start = SimpleNamespace(vocab_size=100)
    timer = bench.StepTimer(
        SimpleNamespace(recipe=recipe, device="cuda", start=start, layers="local"), warmup=1, steps=1
    )
    timer.ends, timer.peak_bytes, timer.parts = [1.0, 2.0], (1, 2), {"MLP": 1.0}
    numbers = timer.numbers(peak_tflops=100.0)
    for name in ("model_gflop_per_token", "model_tflops_per_second_and_gpu", "utilisation", "planned_bytes"):
        assert (numbers[name] is None) == (letter == "M"), name
    said = "\n".join(bench.report(numbers))
    assert f"{16 * 128:,} tokens/s and GPU" in said
    assert ("TFLOP/s" in said, "planned" in said) == (letter == "E", letter == "E")


@pytest.mark.slow
def test_two_processes_measure_one_step_of_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    words = ["debug", "data.text=text.txt", "parallel.tensor=2", "--warmup", "1", "--steps", "1", "--json", "n.json"]
    again = [f"megatron.recompute_{name}" for name in ("granularity=full", "method=uniform", "num_layers=1")]
    launch(2, ["-m", "megatron_carve.bench", *words, *again], cwd=tmp_path)
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["gpus"] == 2 and len(numbers["losses"]) == 3
    speed = numbers["tokens_per_step"] / numbers["seconds_per_step"]
    assert numbers["tokens_per_second_and_gpu"] == pytest.approx(speed / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.json", "text.txt"]


def test_measured_steps_warm_up_as_the_recipe_does():
    """Learning rates rise as in the whole run, and stay at its highest afterwards."""

    def rates(training, steps):
        warmup = training.warmup_fraction * training.total_steps
        return [training.lr * min(1, step / warmup) for step in range(1, steps + 1)]

    for words in ([], ["training.warmup_fraction=2e-5"], ["training.tokens=1e8", "training.warmup_fraction=0.005"]):
        whole = load_recipe("carve_1p3b_hybrid", words).training
        overrides = ["training.tokens=null", "training.steps=20", *bench._beginning(whole, 20)]
        found = load_recipe("carve_1p3b_hybrid", overrides).training
        assert found.lr_schedule == "constant"
        expected = rates(whole, 19)
        assert rates(found, 19) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["debug", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["debug", "--warmup", "0"], "--warmup: expected at least 1, got 0"),
        (["debug", "--peak-tflops", "-1"], "--peak-tflops: expected a number above 0, got -1.0"),
        (["debug", "training.stepz=1"], "training.stepz"),
        (["debug", "training.global_batch_size=17"], "training.global_batch_size"),
        (["debug", "--json", "no/such/folder/n.json"], "--json: no/such/folder is not a folder"),
    ],
)
def test_mistakes_end_in_one_line(capsys, words, complaint):
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and error.count("\n") == 1
