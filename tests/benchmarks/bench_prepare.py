"""Tokens per second and peak memory of prepare, by number of processes, beside tokenizers' own encode_batch.

    python tests/benchmarks/bench_prepare.py OUT TEXT ... [--megabytes N] [--workers N ...] [--form FORM]
        [--tokenizer SPEC] [--repeats N]

Documents of some kilobytes are drawn from the texts into one file, of so many megabytes for each worker, so that all
work equally long and what it takes to start them weighs alike; without --tokenizer, a BPE tokenizer of 32,768 ids is
trained on the texts. encode_batch is given the same documents, 4 MiB at a time, on as many cores, and its time is that
of the calls alone: it reads, checks, orders and writes nothing. A process is held to as many cores as there are
workers, the reading one included. Tokens per second of CPU time tell the two apart where others use the cores too. OUT
gets results.json; what was prepared is removed.
"""

import argparse
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

VOCABULARY = 1 << 15
ENCODE_BATCH = """
import json, sys, time
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer
tokens = seconds = cpu = 0
with open(sys.argv[2], encoding="utf-8") as file:
    limit = int(sys.argv[3])
    while limit > 0 and (lines := file.readlines(4 << 20)):
        limit -= sum(map(len, lines))
        texts = [json.loads(line)["text"] for line in lines]
        begin, begin_cpu = time.perf_counter(), time.process_time()
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - begin_cpu
        tokens += sum(map(len, encoded))
print(tokens / seconds, tokens / cpu)
"""


def train_tokenizer(texts: list[Path], folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(path) for path in texts], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return f"huggingface:{folder}"


def documents(texts: list[Path]):
    """Paragraphs drawn anew, some kilobytes of them a document."""
    rng = random.Random(0)
    paragraphs = [p for path in texts for p in path.read_text(encoding="utf-8").split("\n") if p.strip()]
    while True:
        size, parts = rng.randrange(200, 8000), []
        while size > 0:
            parts.append(rng.choice(paragraphs))
            size -= len(parts[-1])
        yield "\n".join(parts)


def write_input(folder: Path, texts: list[Path], form: str, size: int) -> Path:
    path = folder / f"input.{form}"
    drawn = documents(texts)
    if form == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        written = 0
        with parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            while written < size:
                rows = list(itertools.islice(drawn, 4000))
                written += sum(len(row.encode()) for row in rows)
                writer.write_table(pa.table({"text": rows}))
        return path
    with gzip.open(path, "wb", compresslevel=1) if form.endswith("gz") else open(path, "wb") as file:
        written = 0
        while written < size:
            text = next(drawn)
            line = (text if form == "txt" else json.dumps({"text": text})).encode() + b"\n"
            file.write(line)
            written += len(line)
    return path


def peak_bytes(process: psutil.Process, found: dict[str, int], stop: threading.Event) -> None:
    """The most that a process and its children took together, and the most of one, by resident memory."""
    while not stop.wait(0.1):
        sizes = []
        for one in [process, *_children(process)]:
            try:
                sizes.append(one.memory_info().rss)
            except psutil.Error:
                continue
        if sizes:
            found["all"] = max(found.get("all", 0), sum(sizes))
            found["one"] = max(found.get("one", 0), max(sizes))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def prepare(source: Path, out: Path, tokenizer: str, workers: int) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-P", "-m", "megatron_carve.prepare", out, source, "--tokenizer", tokenizer]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers]),
    )  # fmt: skip
    peak: dict[str, int] = {}
    stop = threading.Event()
    watch = threading.Thread(target=peak_bytes, args=(psutil.Process(process.pid), peak, stop))
    watch.start()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    stop.set()
    watch.join()
    if status:
        raise SystemExit(f"prepare ended with status {status}")
    counts = json.loads((out / "manifest.json").read_text())["splits"].values()
    tokens = sum(split["tokens"] for split in counts)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / (used.ru_utime + used.ru_stime),
        "megabytes_per_second": sum(split["bytes"] for split in counts) / seconds / 1e6,
        "seconds": seconds,
        "peak_mib": peak["all"] / 2**20,
        "peak_mib_of_one_process": peak["one"] / 2**20,
    }


def encode_batch(source: Path, tokenizer: str, workers: int, limit: int) -> tuple[float, float]:
    words = [tokenizer.removeprefix("huggingface:"), str(source), str(limit)]
    shown = subprocess.run(
        [sys.executable, "-P", "-c", ENCODE_BATCH, *words], capture_output=True, text=True, check=True,
        env=os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"},
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers]),
    )  # fmt: skip
    wall, cpu = map(float, shown.stdout.split())
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=float, default=100, help="for each worker (100)")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--form", default="jsonl", choices=["jsonl", "jsonl.gz", "txt", "parquet"])
    parser.add_argument("--tokenizer")
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    scratch = chosen.out / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        tokenizer = chosen.tokenizer or train_tokenizer(chosen.texts, scratch / "tokenizer")
        results = []
        for workers in chosen.workers * chosen.repeats:
            source = write_input(scratch, chosen.texts, chosen.form, int(chosen.megabytes * workers * 1e6))
            row: dict[str, float] = {"workers": workers, "load_before": os.getloadavg()[0]}
            row |= prepare(source, scratch / "out", tokenizer, workers)
            if chosen.form == "jsonl" and tokenizer.startswith("huggingface:"):
                wall, cpu = encode_batch(source, tokenizer, workers, int(50e6) * workers)
                row |= {"encode_batch_tokens_per_second": wall, "encode_batch_tokens_per_cpu_second": cpu}
                row["of_encode_batch"] = row["tokens_per_second"] / wall
            results.append(row)
            print("  ".join(f"{name} {value:,.2f}" for name, value in row.items()), flush=True)
        one = [row["tokens_per_second"] for row in results if row["workers"] == 1]
        for workers in sorted({*chosen.workers} - {1}):
            many = [row["tokens_per_second"] for row in results if row["workers"] == workers]
            if one:
                print(f"{workers} workers: {max(many) / max(one):.2f} times one (best of {len(many)})")
        (chosen.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
