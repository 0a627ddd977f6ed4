"""A text file, and its preparation in a folder of the test's own."""

import pytest
from support.texts import LINES

from megatron_carve.data.text import Texts, prepare_text
from megatron_carve.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(LINES.encode())
    return path


@pytest.fixture
def prepare(tmp_path):
    def call(path, tokenizer=BYTES, *, workers=1, progress=False, **options):
        return prepare_text(Texts(path, tokenizer, **options), tmp_path / "cache", workers=workers, progress=progress)

    return call
