"""Needles beyond the training length: a small recurrent CARVE model learns to find them, then looks in longer texts.

    python tests/benchmarks/bench_needles.py OUT --train-text FILE --test-text FILE [--documents N]
        [--lengths N,N] [--processes N] [section.key=value ...]

Makes documents in the form of megatron_carve/use/needles.py, at most LONGEST bytes of haystack and needles and a few
questions with their answers, and a byte-pair tokenizer of them whose numbers have one or two digits; trains on
sequences of 1024 tokens; evaluates on texts of more tokens, with other codes and another haystack. OUT gets the run,
results.json and the heat map needles.png. Recipe keys change the model or the training.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from megatron_carve.use.needles import ADJECTIVES, NEEDLE, NOUNS, QUESTION, TASKS, make_sample

# Bytes of a document up to its first answer; a token has about four.
SHORTEST, LONGEST = 360, 3000
# Answers are few among a document's tokens, and they alone teach to look back: documents ask more than once, and every
# other one is nothing but needles and answers.
QUESTIONS, ANSWERS = 4, 12
VOCABULARY = 4096
RECIPE = [
    "debug", "model.pattern=C-C-C-C-", "model.hidden_size=512", "model.ffn_hidden_size=1408",
    "model.position_embedding=none", "model.attention_window=null", "model.layers=auto", "mixer.num_key_heads=8",
    "mixer.num_value_heads=8", "mixer.key_head_dim=64", "mixer.value_head_dim=64", "mixer.content_rank=16",
    "training.seq_length=1024", "training.micro_batch_size=32", "training.global_batch_size=32",
    "training.steps=2000", "training.lr=1e-3", "training.precision=bf16", "training.eval_interval=1000",
    "checkpoint.interval=2000", "run.log_interval=100", "run.name=needles",
]  # fmt: skip


def documents(count: int, haystack: str, seed: int) -> list[str]:
    """JSON lines, each a document."""
    draw = random.Random(seed)
    return [
        json.dumps({"text": _listed(draw) if number % 2 else _hidden(draw, haystack, seed * 10**6 + number)})
        for number in range(count)
    ]


def _hidden(draw: random.Random, haystack: str, seed: int) -> str:
    """Needles in hay, and questions about them."""
    length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
    sample = make_sample(draw.choice(list(TASKS)), length, draw.random(), seed, _bytes, haystack)
    needles = re.findall(NEEDLE.format(key=r"(\w+ \w+)", value=r"([\w-]+)"), sample.prompt)
    more = (f"{QUESTION.format(key=key)} {value}." for key, value in draw.choices(needles, k=QUESTIONS - 1))
    return f"{sample.prompt} {sample.answer}." + "".join(more)


def _listed(draw: random.Random) -> str:
    """Needles alone, and their answers in any order."""
    count = draw.choice([1, 2, 4, 8])
    names = zip(draw.sample(ADJECTIVES, count), draw.sample(NOUNS, count), strict=True)
    codes = {" ".join(name): draw.randrange(10**6, 10**7) for name in names}
    _, says = QUESTION.split("? ")
    listed = [NEEDLE.format(key=key, value=value) for key, value in codes.items()]
    asked = [f"{says.format(key=key)} {codes[key]}." for key in draw.choices(list(codes), k=ANSWERS)]
    return " ".join(listed + asked)


def _bytes(text: str) -> int:
    return len(text.encode())


def save_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """A byte-pair tokenizer of these texts, as transformers loads it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    parts = [
        pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ]  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[end],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-text", type=Path, required=True, help="the haystack in training")
    parser.add_argument("--test-text", type=Path, required=True, help="the haystack in evaluation")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", metavar="N,N")
    parser.add_argument("--processes", type=int, default=8, help="that make documents")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_intermixed_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    text, tokenizer, run = (chosen.out / name for name in ("needles.jsonl", "tokenizer", "runs"))
    hay = chosen.train_text.read_text(encoding="utf-8")
    with ProcessPoolExecutor(chosen.processes) as pool:
        make = partial(documents, -(-chosen.documents // chosen.processes), hay)
        lines = [line for part in pool.map(make, range(1, 1 + chosen.processes)) for line in part]
    text.write_text("\n".join(lines) + "\n")
    save_tokenizer((json.loads(line)["text"] for line in lines[:20_000]), tokenizer)
    _program(
        "train", *RECIPE, f"data.text={text}", f"data.tokenizer=huggingface:{tokenizer}", f"run.folder={run}",
        *chosen.overrides,
    )  # fmt: skip
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
