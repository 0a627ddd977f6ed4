"""A text file, and its preparation in a folder of the test's own."""

import pytest
from support.texts import LINES

from megatron_carve.data.text import prepare_text
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(LINES.encode())
    return path


@pytest.fixture
def prepare(tmp_path):
    def call(path, tokenizer=BYTES, **options):
        return prepare_text(path, tokenizer, tmp_path / "cache", **({"progress": False} | options))

    return call
