"""Needles in a haystack: a sentence with a value is hidden in a long text, and the model is asked for the value.

In the style of RULER (arXiv 2404.06654), with its single-needle tasks 1 to 3 and its first multi-key task, in our own
words. Everything is drawn from a seed; nothing is downloaded.

| task | haystack | needles | value |
| --- | --- | --- | --- |
| single_1 | a few sentences again and again | 1 | seven digits |
| single_2 | a text | 1 | seven digits |
| single_3 | a text | 1 | a UUID |
| multikey_1 | a text | 4, of which one is asked for | seven digits |
"""

from __future__ import annotations

import functools
import math
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NOISE = "Rain fell on the roof. The kettle began to sing. A cat slept by the door. Later the clouds moved on. "
# A key is one word of each.
ADJECTIVES = ["amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lofty"]
NOUNS = ["anchor", "barrel", "candle", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket", "river"]
INTRODUCTION = "Some codes are written in the text that follows. Remember them, for one will be asked.\n\n"
QUESTION = "\n\nWhich code belongs to the {key}? As the text says, the code of the {key} is"
NEEDLE = "The code of the {key} is {value}."


@dataclass(frozen=True)
class Task:
    """What distinguishes the tasks.

    Attributes:
        from_text: the haystack is a given text, else NOISE.
        needles: hidden.
        uuids: values are UUIDs, else seven digits.
    """

    from_text: bool
    needles: int = 1
    uuids: bool = False


TASKS = {
    "single_1": Task(from_text=False),
    "single_2": Task(from_text=True),
    "single_3": Task(from_text=True, uuids=True),
    "multikey_1": Task(from_text=True, needles=4),
}


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: haystack and question; the answer follows.
        answer: the value that is asked for.
        depth: where its needle is, 0 at the beginning and 1 at the end.
        tokens: of the prompt.
    """

    prompt: str
    answer: str
    depth: float
    tokens: int

    def right(self, generated: str) -> bool:
        """Whether a continuation gives the answer."""
        return self.answer in generated


def make_sample(
    task: str, length: int, depth: float, seed: int, count_tokens: Callable[[str], int], haystack: str | None = None
) -> Sample:
    """Draw a question whose prompt has at most `length` tokens, and nearly as many.

    Args:
        task: of TASKS.
        length: tokens.
        depth: of the needle that is asked for, 0 to 1, to the nearest sentence.
        seed: of everything that is drawn.
        count_tokens: of a text.
        haystack: the text of the tasks that hide needles in one; it begins at a drawn place, and again when it ends.

    Raises:
        ValueError: no such task, a depth out of range, no haystack where one is needed, or too few tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    kind = TASKS[task]
    draw = random.Random(f"{task} {length} {depth} {seed}")
    sentences = _sentences(NOISE)
    if kind.from_text:
        sentences = _sentences(haystack or "")
        if not sentences:
            raise ValueError(f"haystack: expected a text with sentences for {task}, got none")
        first = draw.randrange(len(sentences))
        sentences = sentences[first:] + sentences[:first]
    chosen = (draw.sample(words, kind.needles) for words in (ADJECTIVES, NOUNS))
    keys = [" ".join(pair) for pair in zip(*chosen, strict=True)]
    values = [_value(draw, kind.uuids) for _ in keys]
    depths = [depth, *(draw.random() for _ in keys[1:])]

    def prompt(count: int) -> str:
        """With `count` sentences of hay."""
        hay = [sentences[i % len(sentences)] for i in range(count)]
        hidden = [
            (round(d * count), NEEDLE.format(key=key, value=value))
            for d, key, value in zip(depths, keys, values, strict=True)
        ]
        for place, needle in sorted(hidden, key=lambda x: -x[0]):
            hay.insert(place, needle)
        return INTRODUCTION + " ".join(hay) + QUESTION.format(key=keys[0])

    least = count_tokens(prompt(0))
    if least > length:
        raise ValueError(f"length: expected at least {least} tokens, which the question of {task} takes, got {length}")
    count, tokens = _most(lambda n: count_tokens(prompt(n)), least, length)
    return Sample(prompt(count), values[0], depth, tokens)


def _most(size: Callable[[int], int], smallest: int, limit: int) -> tuple[int, int]:
    """(n, size(n)) within the limit and not 1 % below it, or the largest n within it.

    size grows, from size(0) = smallest. Sizes of long texts take time to find: guesses in proportion, and halves
    where a guess was a bad one.
    """
    low, size_low, high, size_high = 0, smallest, 1, size(1)
    while size_high <= limit:
        rate = (size_high - smallest) / high
        low, size_low = high, size_high
        high = max(high + 1, min(8 * high, high + math.ceil(1.1 * (limit - size_high) / max(rate, 1 / limit))))
        size_high = size(high)
    halve = False
    while high - low > 1 and limit - size_low > limit // 100:
        width = high - low
        guess = low + (width // 2 if halve else round(width * (limit - size_low) / (size_high - size_low)))
        guess = min(max(guess, low + 1), high - 1)
        if (found := size(guess)) <= limit:
            low, size_low = guess, found
        else:
            high, size_high = guess, found
        halve = not halve and high - low > width // 2
    return low, size_low


@functools.lru_cache(maxsize=2)
def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def _value(draw: random.Random, uuids: bool) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4)) if uuids else str(draw.randrange(10**6, 10**7))


def accuracy(samples: Sequence[Sample], generated: Sequence[str]) -> float:
    """Share of right answers."""
    return sum(s.right(text) for s, text in zip(samples, generated, strict=True)) / len(samples)
