"""Needles beyond the training length: a small recurrent CARVE model learns to find them, then looks in longer texts.

    python tests/benchmarks/bench_needles.py OUT --train-text FILE --test-text FILE [--documents N]
        [--lengths N,N] [section.key=value ...]

Makes a text of questions and answers in the form of megatron_carve/needles.py, all of at most LONGEST bytes, trains on
it, and evaluates on longer ones with other keys' values and another text as haystack. OUT gets the run, results.json
and the heat map needles.png. Recipe keys change the model or the training.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from megatron_carve.needles import NEEDLE, QUESTION, TASKS, make_sample

# Bytes, which are the tokens here, of a training document up to its first answer.
SHORTEST, LONGEST = 360, 1000
# Questions about needles of a document; answers are few among its bytes, and they alone teach to look back.
QUESTIONS = 4
RECIPE = [
    "debug", "model.pattern=C-C-C-C-", "model.hidden_size=512", "model.ffn_hidden_size=1408",
    "model.position_embedding=none", "model.attention_window=null", "model.layers=auto", "mixer.num_key_heads=8",
    "mixer.num_value_heads=8", "mixer.key_head_dim=64", "mixer.value_head_dim=64", "mixer.content_rank=16",
    "training.seq_length=1024", "training.micro_batch_size=32", "training.global_batch_size=32",
    "training.steps=3000", "training.lr=1e-3", "training.precision=bf16", "training.eval_interval=1000",
    "checkpoint.interval=3000", "run.log_interval=100", "run.name=needles",
]  # fmt: skip


def documents(count: int, haystack: str, seed: int) -> list[str]:
    """JSON lines, each a document of needles.py with its answer, and further questions about it with theirs."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        task = draw.choice(list(TASKS))
        length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
        sample = make_sample(task, length, draw.random(), seed * 10**6 + number, _bytes, haystack)
        text = f"{sample.prompt} {sample.answer}."
        needles = re.findall(NEEDLE.format(key=r"(\w+ \w+)", value=r"([\w-]+)"), sample.prompt)
        for key, value in draw.choices(needles, k=QUESTIONS - 1):
            text += f"{QUESTION.format(key=key)} {value}."
        lines.append(json.dumps({"text": text}))
    return lines


def _bytes(text: str) -> int:
    return len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-text", type=Path, required=True, help="the haystack in training")
    parser.add_argument("--test-text", type=Path, required=True, help="the haystack in evaluation")
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", metavar="N,N")
    parser.add_argument("--processes", type=int, default=8, help="that make documents")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_intermixed_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    text = chosen.out / "needles.jsonl"
    hay = chosen.train_text.read_text(encoding="utf-8")
    with ProcessPoolExecutor(chosen.processes) as pool:
        make = partial(documents, chosen.documents // chosen.processes, hay)
        parts = pool.map(make, range(1, 1 + chosen.processes))
        text.write_text("\n".join(line for part in parts for line in part) + "\n")
    run = chosen.out / "runs"
    _program("train", *RECIPE, f"data.text={text}", f"run.folder={run}", *chosen.overrides)
    _program(
        "evaluate", str(run / "needles"), "--tasks", "needles", "--haystack", str(chosen.test_text),
        "--needle-lengths", chosen.lengths, "--batch", "10", "--out", str(chosen.out),
    )  # fmt: skip


def _program(name: str, *words: str) -> None:
    """Run one of the package's programs; its failure ends this one."""
    if status := subprocess.run([sys.executable, "-m", f"megatron_carve.{name}", *words]).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
