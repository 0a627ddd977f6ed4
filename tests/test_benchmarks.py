"""The benchmarks that a CPU can try."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_carve.recipe import check_layout, estimate, load_recipe

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def needles_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_needles

    return bench_needles


@pytest.fixture
def layouts_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_layouts

    return bench_layouts


@pytest.mark.slow
def test_generation_beside_a_transformer(tmp_path):
    words = [
        "--models",
        "CARVE hybrid",
        "Transformer",
        "--recipe",
        "debug",
        "--prompts",
        "40",
        "--contexts",
        "64",
        "128",
    ]
    subprocess.run(
        [sys.executable, BENCHMARKS / "bench_generation.py", tmp_path, *words, "--batches", "1", "2"],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    hybrid, transformer = results["CARVE hybrid"], results["Transformer"]
    # the nearest width of its MLPs, in steps of 64
    assert abs(transformer["parameters"] - hybrid["parameters"]) <= 3 * 3 * 128 * 32
    kept = {
        name: [r["decode"][f"{length} 1"]["bytes_per_sequence"] for length in (64, 128)] for name, r in results.items()
    }
    assert kept["CARVE hybrid"][0] == kept["CARVE hybrid"][1]
    assert kept["Transformer"][1] > 1.5 * kept["Transformer"][0]
    assert all(r["prefill"]["40"]["tokens_per_second"] > 0 for r in results.values())
    assert (tmp_path / "table.md").read_text().count("| Transformer ") == 3
    assert (tmp_path / "generation.png").stat().st_size > 1000


@pytest.mark.long
def test_the_engine_beside_static_generation_and_megatrons_engine(tmp_path):
    words = ["--models", "Transformer", "--recipe", "debug", "--requests", "3", "--prompt", "20", "--new", "6"]
    command = [sys.executable, BENCHMARKS / "bench_engine.py", tmp_path, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "results.json").read_text())["Transformer"]["3"]
    assert set(found) == {"static", "engine", "Megatron's engine"}
    assert all(way["tokens_per_second"] > 0 for way in found.values())
    assert (tmp_path / "table.md").read_text().count("| Transformer, 3 ") == 1


def test_every_answer_of_a_training_document_is_in_it_before(needles_benchmark):
    hay = " ".join(f"Sentence {i} says nothing." for i in range(500))
    texts = [json.loads(line)["text"] for line in needles_benchmark.documents(40, hay, seed=1)]
    assert len(texts) == len(set(texts)) == 40
    for text in texts:
        codes = dict(re.findall(r"The code of the (\w+ \w+) is ([\w-]+)\.", text))
        answers = re.findall(r"the code of the (\w+ \w+) is ([\w-]+)\.", text)
        assert len(answers) in (needles_benchmark.QUESTIONS, needles_benchmark.ANSWERS)
        assert all(codes[key] == answer for key, answer in answers)
        assert text.index(answers[0][1]) < text.index("the code of the")


@pytest.mark.slow
def test_convolutions_of_small_models(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    words = [tmp_path / "out", "--text", tmp_path / "text.txt", "--mixers", "attention", "--seeds", "1"]
    words += ["--steps", "12", "--recall-steps", "3", "training.seq_length=64", "training.micro_batch_size=2"]
    words += ["data.recall.num_pairs=8", "data.recall.num_overwrites=2"]
    for models in (6, 0):  # the second time none is missing
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "bench_convolutions.py", *words],
            check=True, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.stdout.count("accuracy") == models
    rows = json.loads((tmp_path / "out/results.json").read_text())
    text = [r for r in rows if r["task"] == "text"]
    assert max(r["parameters"] for r in text) < 1.01 * min(r["parameters"] for r in text)
    assert all(r["loss"] < r["curve"][0][1] and r["seconds_per_step"] > 0 for r in text)
    assert len({r["loss"] for r in rows}) == len(rows) == 6
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["none", "static", "dynamic"]
    assert all(line.count("%") == 1 for line in lines[2:])


@pytest.mark.slow
def test_preparing_by_number_of_workers(tmp_path):
    (tmp_path / "words.txt").write_text("some words to draw from\nand others\n" * 50)
    words = [tmp_path / "words.txt", "--megabytes", "3", "--workers", "1", "2", "--tokenizer", "bytes"]
    subprocess.run(
        [sys.executable, BENCHMARKS / "bench_prepare.py", tmp_path / "out", *words],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    one, two = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (one["workers"], two["workers"]) == (1, 2)
    assert 1 < one["peak_mib"] < two["peak_mib"] and one["tokens_per_second"] > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_measurements_of_layouts_fit_and_have_what_they_are_compared_with(layouts_benchmark, gpus):
    listed = layouts_benchmark.in_order(gpus)
    assert len(set(listed)) == len(listed)
    sizes = {}
    for layout, model in listed:
        words = layouts_benchmark.recipe_words(layout, model, micro_batches=4)
        recipe, where = load_recipe(words[0], words[1:]), layouts_benchmark.LAYOUTS[layout]
        check_layout(recipe, where.gpus)
        assert where.gpus in (1, gpus)
        expected = 65536 if where.sequences == "short" else 16384
        assert recipe.training.tokens_per_step / where.gpus == expected
        # of an H100's 79 GiB; over several GPUs NCCL has some of it
        assert sum(estimate.memory(recipe, 32000, where.gpus).values()) < (66 if where.gpus > 1 else 69) * 2**30
        assert recipe.model.pattern.count("|") == (recipe.parallel.pipeline - 1)
        assert where.beside is None or (where.beside, model) in listed
        if model != "moe":
            assert (where.attention or layout, "attention") in listed
        sizes[model] = sum(estimate.parameters(recipe, 32000).values())
    assert all(abs(sizes[model] / sizes["attention"] - 1) < 0.02 for model in ("carve", "gdn2"))


def test_layouts_share_processes_where_cuda_starts_alike(layouts_benchmark, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)

    def connections(layout):
        words = layouts_benchmark.recipe_words(layout, "carve", micro_batches=4)
        return layouts_benchmark.Measurement(tmp_path, layout, "carve", words, (1, 1)).connections

    assert [connections(layout) for layout in ("data2", "pipeline2", "one")] == [None] * 3
    assert [connections(layout) for layout in ("tensor2", "context2-heads", "data2-tensor2")] == ["1"] * 3
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_shares_of_layouts(layouts_benchmark):
    def row(layout, model, speed):
        return {
            "layout": layout, "model": model, "tokens_per_second_and_gpu": speed, "seconds_per_step": 1.0,
            "all_seconds": [0.9, 1.1], "peak_allocated_bytes": 3 * 2**30, "planned_bytes": 2**31, "seconds": 40.0,
            "seconds_by_part": {"mixer op": 0.25, "MLP": 0.5}, "longest": [["ncclDevKernel_X", 0.125], ["other", 1.0]],
        }  # fmt: skip

    rows = [
        row("one", "carve", 1000.0), row("data2", "carve", 960.0), row("one", "attention", 2000.0),
        row("data2", "attention", 1600.0), row("tensor2", "gdn2", 700.0),
        row("data2-long", "carve", 800.0), row("context2-sequence", "carve", 600.0),
        row("data2-long", "attention", 1500.0), row("context2-heads", "attention", 1200.0),
        {"layout": "tensor2", "model": "carve", "words": [], "failed": "OutOfMemoryError: no memory\n=====\n"},
    ]  # fmt: skip
    assert layouts_benchmark.shares(rows) == pytest.approx({
        ("data2", "carve"): 0.96, ("data2", "attention"): 0.8, ("context2-sequence", "carve"): 0.75,
        ("context2-heads", "attention"): 0.8,
    })  # fmt: skip
    lines = layouts_benchmark.table(rows)
    (data,) = (line for line in lines if line.startswith("| data2 | carve |"))
    assert data == "| data2 | carve | 960 | one | 0.960 | 0.800 | 1.200 | 1000.0 (900 to 1100) | 3.0 | 2.0 | 40 |"
    (by_sequence,) = (line for line in lines if line.startswith("| context2-sequence | carve |"))
    assert "| data2-long | 0.750 | 0.800 | 0.938 |" in by_sequence
    (alone,) = (line for line in lines if line.startswith("| tensor2 | gdn2 |"))
    assert "| 700 | one |  |  |  |" in alone
    assert "| data2 carve | 250.0 | 500.0 | 125.0 |" in lines
    assert lines[-1] == "tensor2 carve failed: OutOfMemoryError: no memory"


@pytest.mark.long
def test_layouts_of_a_small_model(tmp_path):
    out, words = tmp_path / "out", ["--models", "debug", "--gpus", "2", "--warmup", "1", "--steps", "1"]
    command = [sys.executable, BENCHMARKS / "bench_layouts.py", out, "megatron.nonsense=1", *words, "--layouts"]
    failed = subprocess.run([*command, "one"], capture_output=True, text=True, timeout=100)
    assert failed.returncode == 1
    assert "one debug failed: error: unknown key megatron.nonsense" in (out / "table.md").read_text()
    command.remove("megatron.nonsense=1")
    subprocess.run(
        [*command, "one", "data2", "context2-sequence", "--side-by-side"], check=True, capture_output=True, timeout=300
    )
    rows = json.loads((out / "results.json").read_text())
    assert [(r["layout"], r["gpus"], r["tokens_per_step"]) for r in rows] == [
        ("one", 1, 256), ("data2", 2, 512), ("context2-sequence", 2, 128)
    ]  # fmt: skip
    assert rows[2]["parallel"]["context_method"] == "sequence" and rows[2]["seq_length"] == 128
    assert (out / "table.md").read_text().count("| data2 debug |") == 1
