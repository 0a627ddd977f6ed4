"""The next tokens of requests that want them drawn in different ways."""

import pytest
import torch

from megatron_carve.use.drawing import Draw, draw_tokens

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
PLAIN = Draw(1.0, 0, 0.0, 0.0)


def drawn(draw, numbers=1000):
    """How often each token comes of numbers evenly from 0 to 1."""
    draws = [draw._replace(number=(i + 0.5) / numbers) for i in range(numbers)]
    tokens = draw_tokens(LOGITS.expand(numbers, -1), draws)
    return (torch.bincount(tokens, minlength=4) / numbers).tolist()


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (PLAIN, [0.1, 0.5, 0.15, 0.25]),
        (PLAIN._replace(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        (PLAIN._replace(temperature=1e-30), [0, 1, 0, 0]),
        (PLAIN._replace(temperature=0), [0, 1, 0, 0]),
        (PLAIN._replace(top_k=1), [0, 1, 0, 0]),
        (PLAIN._replace(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (PLAIN._replace(top_k=9), [0.1, 0.5, 0.15, 0.25]),
        (PLAIN._replace(top_p=0.4), [0, 1, 0, 0]),
        (PLAIN._replace(top_p=0.6), [0, 2 / 3, 0, 1 / 3]),
        (PLAIN._replace(top_p=1.0), [0.1, 0.5, 0.15, 0.25]),
        (PLAIN._replace(top_k=3, top_p=0.6), [0, 2 / 3, 0, 1 / 3]),
        (PLAIN._replace(temperature=0.5, top_p=0.8), [0, 0.8, 0, 0.2]),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(draw, expected):
    assert drawn(draw) == pytest.approx(expected, abs=0.002)


def test_a_row_depends_on_no_other():
    draws = [PLAIN._replace(number=n / 16, top_k=k, temperature=t) for n in range(16) for k in (0, 3) for t in (0, 1)]
    logits = torch.randn(len(draws), 50)
    together = draw_tokens(logits, draws)
    alone = torch.cat([draw_tokens(row[None], [draw]) for row, draw in zip(logits, draws, strict=True)])
    assert torch.equal(together, alone)


def test_what_cannot_come_never_does():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 0.5, 1 - 2**-32):
        for top_p in (0.0, 0.5):
            assert draw_tokens(logits, [PLAIN._replace(number=number, top_p=top_p)]).item() in (1, 3)


def test_a_row_that_is_no_numbers_disturbs_no_other():
    logits = torch.stack([LOGITS, torch.full((4,), torch.nan), LOGITS])
    for draw in (PLAIN, PLAIN._replace(top_p=0.9), PLAIN._replace(top_k=3), PLAIN._replace(temperature=0)):
        draws = [draw._replace(number=n) for n in (0.3, 0.4, 0.9)]
        tokens = draw_tokens(logits, draws)
        assert torch.equal(tokens[::2], draw_tokens(logits[::2], draws[::2]))
        assert 0 <= tokens[1] < 4
