"""The benchmarks that a CPU can try."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def needles_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_needles

    return bench_needles


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
