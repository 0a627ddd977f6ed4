"""Programs killed at random moments: repeated, they end as if nothing had happened, and leave nothing behind."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.agents import AGENTS, train_with_a_kill
from support.train import losses as run_losses

from megatron_carve.run.progress import read_metrics

KILLS = 20
TINY = """
inherit: debug
model: {pattern: C-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 1}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 40, seq_length: 64, micro_batch_size: 2, global_batch_size: 4, eval_interval: 10, eval_iters: 1}
checkpoint: {interval: 5, keep: 3}
data: {text: cats.txt}
run: {log_interval: 1}
"""
TOKENISE = """
import sys
from megatron_carve.data.text import Texts, prepare_text
from megatron_carve.data.tokenizer import load_tokenizer
prepare_text(Texts("long.txt", load_tokenizer("bytes")), sys.argv[1])
"""
TRAIN = ["-m", "megatron_carve.train", "tiny.yaml"]
# Program -> its command, for a place that it is to fill.
COMMANDS = {
    "train": lambda place: [*TRAIN, f"run.folder={place}", "run.name=it"],
    "tokenise": lambda place: ["-c", TOKENISE, place],
    "export": lambda place: ["-m", "megatron_carve.export", "straight/train/it", place],
    "import": lambda place: ["-m", "megatron_carve.import", "straight/export", place],
}
# Others at every start: what is timed, named by the time or the process, or holds such.
OTHERS = (
    "events.out", ".lock", "loss.png", "metrics.jsonl", "summary.json", "recipe.yaml", "rank0.log", "checksums.txt",
    ".metadata", ".distcp", "latest", ".npy", "manifest",
)  # fmt: skip


def run(folder, command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]


def losses(place):
    return {r["step"]: r["loss"] for r in read_metrics(place / "it" / "metrics.jsonl") if "loss" in r}


def names(place):
    """What there is, apart from TensorBoard's files, one a start, and Megatron's indices, named by the run's path."""
    found = (str(p.relative_to(place)) for p in place.rglob("*"))
    return sorted(name for name in found if "events.out" not in name and "data/index/" not in name)


def contents(place):
    files = (place / name for name in names(place) if not any(part in Path(name).name for part in OTHERS))
    return {str(p.relative_to(place)): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what every program makes undisturbed, in straight/PROGRAM, and how long that took."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "cats.txt").write_text("the cat sat on the mat, and then it sat again.\n" * 200)
    (folder / "long.txt").write_text("the cat sat on the mat, and then it sat again.\n" * 400_000)
    seconds = {}
    for name, command in COMMANDS.items():
        start = time.monotonic()
        finish(run(folder, command(f"straight/{name}")))
        seconds[name] = time.monotonic() - start
    return folder, seconds


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_program_that_is_killed_and_repeated(folder, name):
    folder, seconds = folder
    straight = folder / "straight" / name
    moments = random.Random(name)
    for kill in range(KILLS):
        place = folder / f"{name}{kill}"
        for _ in range(2):  # the second one finds what the first one left
            process = run(folder, COMMANDS[name](place.name))
            time.sleep(moments.uniform(0, seconds[name]))
            process.kill()
            process.communicate()
            if process.returncode == 0 or (name in ("export", "import") and names(place) == names(straight)):
                break  # it was done before
        else:
            finish(run(folder, COMMANDS[name](place.name)))
        assert names(place) == names(straight), f"kill {kill}"
        assert contents(place) == contents(straight), f"kill {kill}"
        if name == "train":
            found, expected = (losses(p) for p in (place, straight))
            assert found == pytest.approx(expected, rel=1e-6), f"kill {kill}"
        shutil.rmtree(place)


@pytest.mark.long
def test_two_agents_end_when_a_worker_is_killed_and_go_on(folder):
    folder, _ = folder
    train_with_a_kill(folder, TRAIN[2:], [{"CUDA_VISIBLE_DEVICES": ""}] * AGENTS)
    found, expected = run_losses(folder, "run"), losses(folder / "straight/train")
    assert found == pytest.approx(expected, rel=1e-5)
