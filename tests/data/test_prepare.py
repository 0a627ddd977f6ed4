"""Texts prepared by several processes, from every kind of file; what is refused; the program."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet

from megatron_carve import prepare as program
from megatron_carve.data import blocks, conversion, encoding, text
from megatron_carve.data.inputs import find_inputs
from megatron_carve.data.text import Texts, load_prepared, prepare_folder
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "manifest.json")


def documents(seed, count):
    """Texts from nothing to three blocks long, with and without lines and spaces."""
    rng = random.Random(seed)
    words = ["naïve", "日本語", "🙂", "a", "token", "\n", "\n\n", "  "]
    joints = [" ", "\n", ""]
    return [rng.choice(joints).join(rng.choices(words, k=rng.choice([0, 1, 5, 40, 300, 3000]))) for _ in range(count)]


def compressed(name, content):
    """`content` in two parts, each compressed by itself, as tools leave them that write in parallel."""
    half = len(content) // 2
    if name.endswith((".gz", ".gzip")):
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if name.endswith((".zst", ".zstd")):
        codec = pa.Codec("zstd")
        return codec.compress(content[:half], asbytes=True) + codec.compress(content[half:], asbytes=True)
    return content


def write(folder, name, texts, **options):
    path = folder / name
    kind = name.partition(".")[2]
    if kind == "parquet":
        column = pa.array(texts, type=options.pop("type", pa.string()))
        parquet.write_table(pa.table({"id": range(len(texts)), "text": column}), path, **options)
        return path
    if kind.startswith("txt"):
        content = texts[0].encode()
    else:
        content = "".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(compressed(name, content))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a file of every kind, and the documents in the order in which they come."""
    folder = tmp_path_factory.mktemp("corpus")
    told = {}
    for seed, name in enumerate(
        ("a.txt", "b.txt.gz", "c.txt.zst", "d.jsonl", "e.json.gz", "f.ndjson.zstd", "g.parquet", "sub/h.parquet"), 1
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        options = {"row_group_size": 17} if name[0] == "g" else {}
        if name[0] == "h":
            options = {"type": pa.dictionary(pa.int32(), pa.string()), "compression": "zstd"}
        told[name] = documents(seed, 1 if "txt" in name else 60)
        write(folder, name, told[name], **options)
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden").write_bytes(b"\xff")
    return folder, [text for name in sorted(told) for text in told[name]]


@pytest.fixture
def journals(monkeypatch):
    """After every block, and without the disk's part in it."""
    monkeypatch.setattr(conversion, "_JOURNAL_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(text, "_BYTES_PER_WORKER", 1)


def contents(prepared):
    return {name: (Path(prepared.folder) / name).read_bytes() for name in FILES}


def texts_of(prefix):
    return [BYTES.decode(sequence) for sequence in IndexedDataset(str(prefix))]


def test_every_kind_of_file_gives_its_documents(corpus, tmp_path, small_blocks):
    folder, told = corpus
    prepared = prepare_folder(tmp_path / "out", Texts(folder, BYTES, validation_fraction=0.1), progress=False)
    expected = [text for i, text in enumerate(told) if i % 10 != 9 and text]
    held_out = [text for i, text in enumerate(told) if i % 10 == 9 and text]
    assert texts_of(prepared.train_prefix) == expected
    assert texts_of(prepared.validation_prefix) == held_out
    assert (prepared.train_documents, prepared.validation_documents) == (len(expected), len(held_out))
    assert prepared.empty_documents == len(told) - len(expected) - len(held_out) > 0
    assert prepared.train_bytes == sum(len(text.encode()) for text in expected)
    assert max(len(text.encode()) for text in told) > 3 * 4096
    assert load_prepared(tmp_path / "out") == prepared


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_no_byte_depends_on_the_number_of_workers(corpus, tmp_path, small_blocks, workers):
    alone = prepare_folder(tmp_path / "alone", Texts(corpus[0], BYTES), progress=False)
    shared = prepare_folder(tmp_path / "shared", Texts(corpus[0], BYTES), workers=workers, progress=False)
    assert contents(shared) == contents(alone)


def test_blocks_come_in_order_however_they_are_finished():
    waiting, finished = [], []

    class Pool:
        def submit(self, function, block):
            waiting.append((block, Future()))
            return waiting[-1][1]

    def finish():
        rng = random.Random(0)
        while len(finished) < 100:
            if waiting:
                block, future = waiting.pop(rng.randrange(len(waiting)))
                finished.append(block.begins.offset)
                future.set_result(block.data)
            time.sleep(0.0005)

    given = (blocks.Block("lines", str(i).encode(), blocks.Place(0, i)) for i in range(100))
    threading.Thread(target=finish, daemon=True).start()
    assert [int(data) for _, data in encoding._in_order(Pool(), 8, given)] == list(range(100))
    assert finished != sorted(finished)


def test_the_first_mistake_is_told_whoever_finds_it_first(tmp_path, small_blocks):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "x" * 500}) + "\n"
    path.write_text(good * 2000 + "{}\n" + good * 10 + "[]\n")
    with pytest.raises(ValueError, match=rf"^data\.text: {path} line 2001 has no key 'text'"):
        prepare_folder(tmp_path / "out", Texts(path, BYTES), workers=3, progress=False)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_worker_that_is_killed_is_told_of(corpus, tmp_path, small_blocks, journals, monkeypatch):
    def killing(found):
        for number, block in enumerate(found):
            if number == 30:
                for child in encoding.multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield block

    real = conversion.read_blocks
    monkeypatch.setattr(conversion, "read_blocks", lambda *a, **k: killing(real(*a, **k)))
    with pytest.raises(ChildProcessError, match=r"one of 2 processes that tokenise ended by itself"):
        prepare_folder(tmp_path / "out", Texts(corpus[0], BYTES), workers=2, progress=False)
    monkeypatch.setattr(conversion, "read_blocks", real)
    alone = prepare_folder(tmp_path / "alone", Texts(corpus[0], BYTES), progress=False)
    assert contents(prepare_folder(tmp_path / "out", Texts(corpus[0], BYTES), progress=False)) == contents(alone)


def test_conversion_goes_on_from_every_place(corpus, tmp_path, small_blocks, journals, monkeypatch):
    alone = prepare_folder(tmp_path / "alone", Texts(corpus[0], BYTES), progress=False)
    total = sum(1 for _ in blocks.read_blocks(find_inputs(corpus[0]), blocks.Place(), text_key="text",
                                              validation_fraction=0.05))  # fmt: skip
    real, rng, kills = conversion.read_blocks, random.Random(1), 0

    def some(found):
        for number, block in enumerate(found):
            if number == stop:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(conversion, "read_blocks", lambda *a, **k: some(real(*a, **k)))
    while True:
        stop = rng.randrange(total // 8)
        try:
            found = prepare_folder(tmp_path / "out", Texts(corpus[0], BYTES), progress=False)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 8
    assert contents(found) == contents(alone)


def test_of_few_documents_the_last_is_held_out_whenever_it_is_interrupted(tmp_path, monkeypatch):
    path = write(tmp_path, "few.jsonl", ["one", "two", "three"])
    real, at = conversion._write_journal, []

    def dies_after(*arguments):
        real(*arguments)
        if not at:
            at.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_write_journal", dies_after)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(tmp_path / "out", Texts(path, BYTES), progress=False)
    found = prepare_folder(tmp_path / "out", Texts(path, BYTES), progress=False)
    assert at and texts_of(found.train_prefix) == ["one", "two"]
    assert texts_of(found.validation_prefix) == ["three"]
    assert (found.train_bytes, found.validation_bytes) == (6, 5)


def parquet_file(**columns):
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


LINE = b'{"text": "some words"}\n'
GZIP, ZSTD = compressed("x.gz", LINE * 1000), compressed("x.zst", LINE * 1000)
ROWS = parquet_file(text=["first", "second", "third"])


# By name, since bytes of gzip hold the time and would name the tests otherwise in every process.
REFUSED = {
    "cut.jsonl.gz": (GZIP[:-30], r"cannot be decompressed after \d+ bytes of text: Compressed file ended"),
    "not.jsonl.gz": (LINE, r"cannot be decompressed after 0 bytes of text: Not a gzipped file"),
    "wrong.jsonl.gz": (GZIP[:10] + b"\xff" * 9 + GZIP[19:], r"cannot be decompressed after \d+ bytes of text"),
    "cut.jsonl.zst": (ZSTD[:-10], r"cannot be decompressed after \d+ bytes of text: Truncated compressed stream"),
    "not.jsonl.zst": (LINE, r"cannot be decompressed after 0 bytes of text: ZSTD"),
    "line.jsonl.gz": (gzip.compress(LINE * 3 + b"{]\n"), r"line 4 is not JSON"),
    "latin.txt.gz": (gzip.compress(b"good line\n" * 30 + b"caf\xe9 noir\n"), r"byte 0xe9 at byte offset 303$"),
    "long.jsonl": (b'{"text": "' + b"x" * 9000, r"line 1 is longer than 8192 bytes"),
    "cut.parquet": (ROWS[:-10], r"is not a whole Parquet file"),
    "not.parquet": (LINE, r"is not a whole Parquet file"),
    "key.parquet": (parquet_file(body=["a"], id=[1]), r"has no column 'text' \(text_key\); found: 'body', 'id'$"),
    "type.parquet": (parquet_file(text=[1, 2]), r"the column 'text' must hold strings, got int64$"),
    "null.parquet": (parquet_file(text=["a", "b", None]), r"row 3: 'text' must be a string, got null$"),
    "utf8.parquet": (ROWS.replace(b"second", b"s\xe9cond"), r"byte 0xe9 at byte offset 1 of row 2$"),
    "wide.parquet": (parquet_file(text=["a", "x" * 9000]), r"row 2 is longer than 8192 bytes$"),
    "page.parquet": (ROWS[:4] + b"\xff" * 30 + ROWS[34:], r"row group 1 cannot be read: "),
    "rows.parquet.gz": (gzip.compress(ROWS), r"is a Parquet file in gzip, which is not read; decompress it$"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, monkeypatch, name):
    content, message = REFUSED[name]
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 8192)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.text: {re.escape(str(tmp_path / name))}.* ?{message}") as caught:
        prepare_folder(tmp_path / "out", Texts([tmp_path / name], BYTES), progress=False)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_inputs_are_found_in_order(corpus, tmp_path):
    folder = corpus[0]
    names = ["a.txt", "b.txt.gz", "c.txt.zst", "d.jsonl", "e.json.gz", "f.ndjson.zstd", "g.parquet", "sub/h.parquet"]

    def found(given):
        return [str(source.path.relative_to(folder)) for source in find_inputs(given)]

    assert found(folder) == found(f"{folder}/") == names
    assert found(f"{folder}/*.parquet") == ["g.parquet"]
    assert found(f"{folder}/**/*.parquet") == ["g.parquet", "sub/h.parquet"]
    assert found([f"{folder}/sub", f"{folder}/[ab]*"]) == ["sub/h.parquet", "a.txt", "b.txt.gz"]
    literal = tmp_path / "what[1].txt"
    literal.write_text("x")
    assert [source.path for source in find_inputs(literal)] == [literal]
    (link := tmp_path / "link.parquet").symlink_to(folder / "g.parquet")
    assert [(source.path, source.form) for source in find_inputs(link)] == [(link, "rows")]
    (link := tmp_path / "named.parquet").symlink_to(literal)  # as a cache of downloads has them
    assert [(source.path, source.form) for source in find_inputs(link)] == [(link, "rows")]
    for given, message in [
        ([], "expected at least one file, got an empty list"),
        ([folder, folder / "a.txt"], r"a\.txt is given twice"),
        (f"{folder}/*.csv", r"/\*\.csv matches no file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            find_inputs(given)


def test_pyarrow_is_asked_for_where_it_is_needed(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("c.txt.zst", "g.parquet"):
        with pytest.raises(
            ImportError, match=rf'{name} needs pyarrow .*; run: pip install "megatron-carve\[prepare\]"'
        ):
            prepare_folder(tmp_path / "out", Texts(corpus[0] / name, BYTES), progress=False)
    prepare_folder(tmp_path / "out", Texts(corpus[0] / "e.json.gz", BYTES), progress=False)


def test_long_texts_are_cut_where_their_words_end():
    assert blocks.window(b"one two\nthree four", 12) == 8
    assert blocks.window(b"one two three four", 12) == 7  # the space begins the next piece, as tokenizers have it
    assert blocks.window("日本語日本語".encode(), 10) == 9


def test_the_program(corpus, tmp_path, capsys):
    words = [str(tmp_path / "out"), str(corpus[0] / "d.jsonl"), "--workers", "1"]
    assert program.main(words) == 0
    shown = capsys.readouterr()
    found = load_prepared(tmp_path / "out")
    assert f"train  {found.train_documents:,} documents" in re.sub(" +", " ", shown.out).replace("train ", "train  ")
    assert "tokenising d.jsonl: 100%" in shown.err and "tokens/s" in shown.err
    before = contents(found)
    assert program.main(words) == 0  # nothing to do
    assert contents(found) == before and "tokenising" not in capsys.readouterr().err
    for changed, message in [
        ([*words, "--validation-fraction", "0.5"], "holds other texts, or the same prepared in another way"),
        ([str(corpus[0]), *words[1:]], "expected a new or empty folder"),
        ([str(tmp_path / "new"), str(tmp_path)], f"{tmp_path}/new: lies in {tmp_path}, whose files are read"),
        ([words[0] + "2", str(tmp_path / "gone")], f"INPUT: {tmp_path}/gone does not exist"),
        ([*words, "--workers", "0"], "--workers: expected at least 1, got 0"),
        ([*words, "--validation-fraction", "1"], "--validation-fraction: expected at least 0 and below 1, got 1.0"),
        ([*words, "--tokenizer", "letters"], "data.tokenizer must be"),
    ]:
        assert program.main(changed) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
    assert contents(found) == before


KILLED = """
import sys
from megatron_carve.data import blocks, conversion, text
from megatron_carve.prepare import main
conversion._JOURNAL_SECONDS, blocks.BLOCK_BYTES, text._BYTES_PER_WORKER = 0.02, 1 << 14, 1
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.long
def test_killed_at_twenty_random_moments(corpus, tmp_path):
    for name in ("d.jsonl", "g.parquet"):  # a minute's work in blocks of 16 KiB
        write(tmp_path, name, documents(3, 30_000))
    (tmp_path / "killed.py").write_text(KILLED)
    rng = random.Random(5)
    inputs = [tmp_path / "d.jsonl", tmp_path / "g.parquet"]

    def start(out):
        command = [sys.executable, "-P", tmp_path / "killed.py", out, *inputs, "--workers", "2"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    begun = time.monotonic()
    assert start(tmp_path / "alone").wait() == 0
    whole = time.monotonic() - begun
    places = []
    for _ in range(20):
        process = start(tmp_path / "out")
        time.sleep(rng.uniform(0, whole / 4))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
        journal = list(tmp_path.glob(".partial-out-*/journal.json"))
        places.append(json.loads(journal[0].read_text())["place"] if journal else [0])
        deadline = time.monotonic() + 10
        while subprocess.run(["pgrep", "-g", str(process.pid)], stdout=subprocess.DEVNULL).returncode == 0:
            assert time.monotonic() < deadline, "workers outlive the process that started them"
            time.sleep(0.05)
    assert places == sorted(places) and len({tuple(place) for place in places}) > 5
    assert start(tmp_path / "out").wait() == 0
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert not list(tmp_path.glob(".partial*"))


def test_megatron_writes_the_same_files(corpus, tmp_path):
    """The index is Megatron's to the byte."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    found = prepare_folder(tmp_path / "out", Texts(corpus[0] / "d.jsonl", BYTES), progress=False)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for sequence in IndexedDataset(found.train_prefix):
        builder.add_document(np.array(sequence), [len(sequence)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"theirs.{kind}").read_bytes() == (tmp_path / "out" / f"train.{kind}").read_bytes()
