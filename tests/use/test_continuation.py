"""Texts that grow by a token, compared with all tokens decoded at once."""

import random

import pytest

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.use.continuation import Continuation


def grown(ids, **options):
    """The whole text, and how long it was, and how much of it sure, after each token."""
    continuation = Continuation(load_tokenizer("bytes"), **options)
    shown = []
    for token in ids:
        continuation.add(token)
        shown.append((continuation.text, continuation.sure))
    return continuation.finish(), shown


def test_whatever_bytes_come_the_text_is_theirs():
    """Cut characters, stray bytes and long rows of them included, and no part of a character ever shows."""
    draw = random.Random(1)
    parts = ["🙂".encode(), "€".encode(), b"A", b"\xff", b"\xc3", b"\xf0\x9f\x99", b"\x82", b"\xe2\x82"]
    for _ in range(1000):
        ids = [byte for _ in range(draw.randrange(1, 25)) for byte in draw.choice(parts)]
        text, shown = grown(ids)
        assert text == load_tokenizer("bytes").decode(ids), ids
        assert all(text.startswith(part) for part, _ in shown), ids


@pytest.mark.parametrize("stop", ["XY€Z", "€Z", "Z"])
def test_nothing_after_a_stop_is_sure_nor_what_may_become_one(stop):
    whole = "some € text, X XY X€ XY€Z and more"
    text, shown = grown(whole.encode(), stop=[stop, "never"])
    assert text == whole[: whole.index(stop)]
    assert all(text.startswith(part[:sure]) for part, sure in shown)
