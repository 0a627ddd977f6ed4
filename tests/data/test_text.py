"""Texts prepared in this process: tokens, splits, caching and refusals."""

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.texts import LINES

from megatron_carve.data import blocks, conversion, indexed, inputs
from megatron_carve.data.text import Texts, prepare_text, read_text, require_tokens
from megatron_carve.data.tokenizer import Tokenizer, load_tokenizer

BYTES = load_tokenizer("bytes")


class Spy(Tokenizer):
    """The bytes tokenizer, with a hook before each call of encode."""

    def __init__(self, before=lambda call: None, **changed):
        base = {"fingerprint": BYTES.fingerprint, "vocab_size": BYTES.vocab_size, "eod": BYTES.eod}
        super().__init__(changed.pop("spec", BYTES.spec), **(base | changed))
        self.calls = 0
        self._before = before

    def encode(self, text):
        self.calls += 1
        self._before(self.calls)
        return BYTES.encode(text)

    def _decode(self, ids):
        return BYTES._decode(ids)


class Words(Spy):
    """Counts words: white space gives no tokens."""

    def encode(self, text):
        return np.arange(len(text.split()), dtype=np.int32)


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(path, records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def sequences(prefix):
    return [sequence.tolist() for sequence in IndexedDataset(prefix)]


def texts(prefix):
    return [BYTES.decode(sequence) for sequence in sequences(prefix)]


@pytest.mark.parametrize("block", [5, 16, 64, 1 << 20])
def test_plain_text_round_trip(corpus, prepare, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    spy = Spy()
    prepared = prepare(corpus, spy)
    train, validation = sequences(prepared.train_prefix), sequences(prepared.validation_prefix)
    # One sequence a document, however many blocks it came in, closed by one end-of-document id.
    assert [len(train), len(validation)] == [1, 1]
    assert [train[0].count(256), train[0][-1]] == [1, 256]
    assert [validation[0].count(256), validation[0][-1]] == [1, 256]
    assert bytes(train[0][:-1]) + bytes(validation[0][:-1]) == corpus.read_bytes()
    assert spy.calls == 2 if block == 1 << 20 else spy.calls >= len(LINES.encode()) // block


def test_prepared_counts(corpus, prepare):
    prepared = prepare(corpus, validation_fraction=0.25)
    size = len(LINES.encode())
    train, validation = texts(prepared.train_prefix)[0], texts(prepared.validation_prefix)[0]
    assert prepared.source == str(corpus)
    assert prepared.tokenizer == "bytes"
    assert (prepared.train_bytes, prepared.validation_bytes) == (len(train.encode()), len(validation.encode()))
    assert (prepared.train_tokens, prepared.validation_tokens) == (
        prepared.train_bytes + 1,
        prepared.validation_bytes + 1,
    )
    assert (prepared.train_documents, prepared.validation_documents, prepared.empty_documents) == (1, 1, 0)
    assert prepared.tokens_per_byte == (size + 2) / size
    assert train.endswith("\n")
    # The nearest line is at most half a line away.
    assert abs(prepared.validation_bytes - size / 4) <= max(len(line.encode()) for line in LINES.splitlines(True)) / 2


@pytest.mark.parametrize("text", ["日🙂é" * 37, "🙂" * 25])
@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_text_without_lines_is_cut_between_characters(tmp_path, prepare, monkeypatch, text, fraction):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 11)
    prepared = prepare(write(tmp_path / "one_line.txt", text), validation_fraction=fraction)
    train, validation = texts(prepared.train_prefix)[0], texts(prepared.validation_prefix)[0]
    assert train + validation == text
    wanted = fraction * len(text.encode())
    assert wanted - 1 <= len(validation.encode()) <= wanted + 4


def test_line_ends_and_special_strings_survive(tmp_path, prepare):
    text = "\ufeffone\r\ntwo\rthree\u2028four\n\n\n<|endoftext|>\x00\n" * 20
    path = write(tmp_path / "ends.md", text)
    prepared = prepare(path)
    # but for the byte-order mark that begins the file
    assert texts(prepared.train_prefix)[0] + texts(prepared.validation_prefix)[0] == text[1:]
    assert read_text(path) == text[1:]  # what prompts and texts to evaluate are read with


def test_a_text_to_read_is_utf8(tmp_path):
    path = write(tmp_path / "latin.txt", b"\xef\xbb\xbfna\xefve")
    with pytest.raises(ValueError, match=re.escape(f"{path} is not UTF-8: byte 0xef at byte offset 5")):
        read_text(path)


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path, prepare):
    prepared = prepare(write(tmp_path / "docs.jsonl", '\ufeff{"text": "one"}\r\n{"text": "\ufefftwo"}\n'))
    assert texts(prepared.train_prefix) == ["one"]
    assert texts(prepared.validation_prefix) == ["\ufefftwo"]


def test_wide_vocabulary_is_not_wrapped(tmp_path, prepare):
    class Wide(Spy):
        def encode(self, text):
            return BYTES.encode(text) + 100_000

    prepared = prepare(write(tmp_path / "wide.txt", "hello\n" * 20), Wide(vocab_size=100_300, eod=100_299))
    tokens = sequences(prepared.train_prefix)[0]
    assert tokens[:5] == [100_000 + byte for byte in b"hello"]
    assert tokens[-1] == 100_299


def test_very_long_document_is_cut_into_sequences_the_index_can_hold(corpus, prepare, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(indexed, "MAX_SEQUENCE_TOKENS", 1000)
    prepared = prepare(corpus)
    train = IndexedDataset(prepared.train_prefix)
    assert max(train.sequence_lengths) <= 1000
    assert len(train) < 2 * len(LINES.encode()) / 1000
    assert train.document_indices.tolist() == [0, len(train)]
    assert "".join(texts(prepared.train_prefix) + texts(prepared.validation_prefix)) == LINES


def test_progress_counts_bytes(corpus, prepare, capsys):
    prepare(corpus, progress=True)
    shown = capsys.readouterr().err
    assert "tokenising corpus.txt: 100%" in shown
    assert f"{len(LINES.encode()) / 1000:.2f}k/" in shown
    prepare(corpus, validation_fraction=0.2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(2, 0.05, [1]), (19, 0.05, [18]), (41, 0.05, [19, 39]), (30, 0.5, range(1, 30, 2)), (3, 0.99, [1, 2]), (3, 0, [])],
)
def test_json_lines_keep_their_documents(tmp_path, prepare, count, fraction, held_out):
    documents = [f"document {i} é🙂\nsecond line {i}" for i in range(count)]
    path = json_lines(tmp_path / "docs.jsonl", [{"id": i, "text": text} for i, text in enumerate(documents)])
    prepared = prepare(path, validation_fraction=fraction)
    expected = {"train": [i for i in range(count) if i not in held_out], "validation": list(held_out)}
    for split, numbers in expected.items():
        prefix = getattr(prepared, f"{split}_prefix")
        assert getattr(prepared, f"{split}_documents") == len(numbers)
        assert getattr(prepared, f"{split}_bytes") == sum(len(documents[i].encode()) for i in numbers)
        if prefix is None:
            assert numbers == []
            continue
        assert texts(prefix) == [documents[i] for i in numbers]
        assert all(sequence[-1] == 256 and 256 not in sequence[:-1] for sequence in sequences(prefix))
        assert IndexedDataset(prefix).document_indices.tolist() == list(range(len(numbers) + 1))


def test_json_key_blank_lines_and_escapes(tmp_path, prepare):
    content = '{"body": "\\u65e5\\ud83d\\ude42"}\n\n  \r\n{"body": "two", "text": "not this"}\r\n{"body": "three"}'
    prepared = prepare(write(tmp_path / "docs.JSON", content), text_key="body")
    assert texts(prepared.train_prefix) == ["日🙂", "two"]
    assert texts(prepared.validation_prefix) == ["three"]


def test_empty_documents_are_left_out_and_said(tmp_path, prepare, caplog):
    path = json_lines(tmp_path / "docs.jsonl", [{"text": text} for text in ("one", "", "", "two", "three")])
    with caplog.at_level(logging.WARNING):
        prepared = prepare(path)
    assert texts(prepared.train_prefix) == ["one", "two"]
    assert (prepared.train_documents, prepared.empty_documents) == (2, 2)
    assert "left out 2 documents that have no tokens" in caplog.text


def test_second_call_reads_the_cache(corpus, prepare):
    spy = Spy()
    first = prepare(corpus, spy)
    calls = spy.calls
    assert calls > 0
    assert prepare(corpus, spy) == first
    assert prepare(os.path.relpath(corpus), spy) == first
    assert spy.calls == calls


def test_cache_is_found_without_torch_and_megatron(corpus, prepare, tmp_path):
    first = prepare(corpus)
    code = (
        "import sys; from megatron_carve.data.text import *; from megatron_carve.data.tokenizer import load_tokenizer\n"
        "found = prepare_text(Texts(sys.argv[1], load_tokenizer('bytes')), sys.argv[2], progress=False)\n"
        "require_tokens(found, 16)\n"
        "assert not {'torch', 'megatron.core'} & set(sys.modules), 'heavy import'\n"
        "print(found.train_prefix)"
    )
    command = [sys.executable, "-P", "-c", code, str(corpus), str(tmp_path / "cache")]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == first.train_prefix


def touch(path):
    os.utime(path, ns=(1, 2))


def replace_keeping_size_and_time(path, content):
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit_start(path):
    replace_keeping_size_and_time(path, b"L" + path.read_bytes()[1:])


def edit_end(path):
    replace_keeping_size_and_time(path, path.read_bytes()[:-2] + b"!\n")


@pytest.mark.parametrize(
    ("change", "tokenizer", "options"),
    [
        (touch, {}, {}),
        (edit_start, {}, {}),
        (edit_end, {}, {}),
        (None, {"spec": "other"}, {}),
        (None, {"fingerprint": "other"}, {}),
        (None, {}, {"validation_fraction": 0.1}),
        (None, {}, {"text_key": "body"}),
    ],
    ids=["time", "start", "end", "spec", "vocabulary", "fraction", "key"],
)
def test_any_change_converts_again(corpus, prepare, monkeypatch, change, tokenizer, options):
    monkeypatch.setattr(inputs, "_EDGE_BYTES", 64)
    first = prepare(corpus)
    if change:
        change(corpus)
    spy = Spy(**tokenizer)
    second = prepare(corpus, spy, **options)
    assert spy.calls > 0
    assert second.train_prefix != first.train_prefix
    assert texts(second.train_prefix)[0] + texts(second.validation_prefix)[0] == corpus.read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_conversion_goes_on(corpus, prepare, tmp_path, monkeypatch, error):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    monkeypatch.setattr(conversion, "_JOURNAL_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def interrupt(call):
        if call == 20:
            raise error

    with pytest.raises(error):
        prepare(corpus, Spy(interrupt))
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".partial-corpus-")
    spy = Spy()
    prepared = prepare(corpus, spy)
    alone = prepare_text(Texts(corpus, whole := Spy()), tmp_path / "alone", progress=False)
    assert 19 + spy.calls == whole.calls
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "manifest.json"):
        assert (Path(prepared.folder) / name).read_bytes() == (Path(alone.folder) / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(prepared.folder).name]


def test_killed_conversion_is_not_taken_for_a_finished_one(corpus, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)

    def die(call):
        if call == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=prepare, args=(corpus, Spy(die)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".partial-")
    touch(corpus)  # now it is another text: what is left of the old one is removed
    spy = Spy()
    prepared = prepare(corpus, spy)
    assert spy.calls > 5
    assert texts(prepared.train_prefix)[0] + texts(prepared.validation_prefix)[0] == LINES
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(prepared.train_prefix).parent.name]


@pytest.mark.parametrize("name", ["another-{key}-{host}", "corpus-{key}-elsewhere"])
def test_conversions_that_may_go_on_stay(corpus, prepare, tmp_path, name):
    """Of another text, or on another machine."""
    name = ".partial-" + name.format(key="0" * 16, host=socket.gethostname())
    (left := tmp_path / "cache" / name).mkdir(parents=True)
    (left / "lock").write_text("")
    prepare(corpus)
    assert left.exists()


def test_two_conversions_at_once_share_the_first_to_finish(corpus, prepare, tmp_path):
    gone_on = tmp_path / "gone_on"

    def wait(call):
        while not gone_on.exists():
            time.sleep(0.01)

    first = multiprocessing.get_context("fork").Process(target=prepare, args=(corpus, Spy(wait)))
    first.start()
    while not list((tmp_path / "cache").glob(".partial-*/done/train.bin")):
        time.sleep(0.01)
    second = Spy()
    threading.Timer(0.3, gone_on.touch).start()
    prepared = prepare(corpus, second)
    first.join()
    assert (first.exitcode, second.calls) == (0, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(prepared.folder).name]
    assert texts(prepared.train_prefix)[0] + texts(prepared.validation_prefix)[0] == LINES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "train.bin", 10), "train.bin has 10 bytes, not"),
        (lambda folder: (folder / "validation.idx").unlink(), "validation.idx"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "Expecting"),
    ],
)
def test_damaged_cache_is_refused(corpus, prepare, tmp_path, damage, message):
    first = prepare(corpus)
    folder = tmp_path / "cache" / os.path.basename(os.path.dirname(first.train_prefix))
    damage(folder)
    with pytest.raises(
        ValueError, match=rf"data\.text: .*{re.escape(str(folder))} is damaged \(.*{message}.*delete it"
    ):
        prepare(corpus)


def test_file_that_changes_while_read_is_refused(corpus, prepare, tmp_path):
    with pytest.raises(ValueError, match=r"data\.text: .* changed while it was being read"):
        prepare(corpus, Spy(lambda call: touch(corpus)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_file_that_shrinks_while_read_is_refused(corpus, prepare, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16)
    # Larger than the reader's buffer, so that the loss is noticed by the read itself.
    write(corpus, LINES * 200)
    with pytest.raises(ValueError, match=r"data\.text: .* changed while it was being read"):
        prepare(corpus, Spy(lambda call: os.truncate(corpus, 100) if call == 1 else None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"is empty"),
        ("short.txt", "é", r"is too short \(2 bytes\)"),
        ("latin.txt", b"good line\n" * 30 + b"caf\xe9 noir\n", r"not UTF-8: byte 0xe9 at byte offset 303$"),
        ("cut.txt", b"a\n" * 50 + b"\xe6\x97", r"not UTF-8: byte 0xe6 at byte offset 100$"),
        ("utf16.txt", "text\n".encode("utf-16") * 9, r"not UTF-8: byte 0xff at byte offset 0$"),
        ("binary.txt", b"\x80" * 100, r"not UTF-8: byte 0x80 at byte offset 0$"),
        (
            "one.jsonl",
            '{"text": "a"}\n\n',
            r"gives no validation tokens .*; it needs at least 2 documents, one for validation$",
        ),
        ("blank.jsonl", "\n \n", r"gives no train tokens"),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": \n', r"line 3 is not JSON \(.*\); one JSON object per line"),
        ("deep.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", r"line 2 is not JSON"),
        (
            "digits.jsonl",
            '{"text": "a"}\n{"text": "b", "n": ' + 5000 * "1" + "}\n",
            r"line 2 is not JSON \(.*4300 digits",
        ),
        ("list.json", '["a"]\n["b"]\n', r"line 1 is a JSON list; one JSON object per line"),
        ("pretty.json", '{\n "text": "a"\n}\n', r"line 1 is not JSON"),
        ("key.jsonl", '{"text": "a"}\n{"id": 1, "b": 2}\n', r"line 2 has no key 'text' .*; found: 'id', 'b'$"),
        ("nokey.jsonl", '{"text": "a"}\n{}\n', r"line 2 has no key 'text' \(text_key\); found: none$"),
        ("number.jsonl", '{"text": "a"}\n{"text": 3}\n', r"line 2: 'text' must be a string, got int$"),
        ("half.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', r"line 2 escapes half of a surrogate pair"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"byte 0xe9 at byte offset 24 \(line 2\)$"),
        ("hollow.jsonl", '{"text": ""}\n{"text": ""}\n', r"gives no train tokens with the tokenizer 'bytes'"),
        ("tail.jsonl", '{"text": "a"}\n{"text": ""}\n', r"gives no validation tokens"),
    ],
)
def test_refused_files(tmp_path, prepare, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"data\.text: {re.escape(str(path))}.* ?{message}") as caught:
        prepare(path)
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


def test_missing_file_and_directory_are_refused(tmp_path, prepare):
    with pytest.raises(FileNotFoundError, match=rf"data\.text: {re.escape(str(tmp_path))}/absent does not exist"):
        prepare(tmp_path / "absent")
    with pytest.raises(ValueError, match=rf"data\.text: {re.escape(str(tmp_path))} is a folder without files"):
        prepare(tmp_path)


def test_invalid_byte_beyond_the_first_block(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16)
    path = write(tmp_path / "latin.txt", "日本語 text without line ends ".encode() * 20 + b"\xff" + b"more " * 20)
    at = path.read_bytes().index(b"\xff")
    with pytest.raises(ValueError, match=rf"byte 0xff at byte offset {at}$"):
        prepare(path)


def test_text_without_tokens_is_refused(tmp_path, prepare):
    path = write(tmp_path / "blank.txt", " \n" * 100)
    with pytest.raises(ValueError, match=r"data\.text: .* gives no train tokens with the tokenizer 'words'"):
        prepare(path, Words(spec="words"))


def test_tokenizer_that_leaves_its_vocabulary_is_refused(corpus, prepare):
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'bytes' gave an id outside its vocabulary of 200"):
        prepare(corpus, Spy(vocab_size=200, eod=199))


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, float("nan")])
def test_validation_fraction_is_checked(corpus, prepare, fraction):
    with pytest.raises(ValueError, match=rf"data\.validation_fraction must be at least 0 and below 1, got {fraction}"):
        prepare(corpus, validation_fraction=fraction)


def test_require_tokens(tmp_path, prepare):
    prepared = prepare(write(tmp_path / "short.txt", "123456789\n" * 10), validation_fraction=0.2)
    assert (prepared.train_tokens, prepared.validation_tokens) == (81, 21)
    require_tokens(prepared, 20)
    with pytest.raises(
        ValueError, match=r"data\.text: .*gives 21 validation tokens, but seq_length 21 needs at least 22"
    ):
        require_tokens(prepared, 21)
    with pytest.raises(ValueError, match=r"data\.text: .*gives 81 train tokens, but seq_length 81 needs at least 82"):
        require_tokens(prepared, 81)
