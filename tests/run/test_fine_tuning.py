"""A model that was trained on texts learns a made-up answer format from 500 examples, and generate shows it."""

import json
import random

import pytest
from support.programs import program
from support.train import train

ANIMALS = [
    "cat",
    "dog",
    "cow",
    "owl",
    "bee",
    "fox",
    "hen",
    "pig",
    "rat",
    "ant",
    "eel",
    "elk",
    "yak",
    "emu",
    "gnu",
    "ape",
]
COLOURS = ["red", "blue", "green", "white", "black", "brown", "grey", "pink"]


@pytest.mark.long
def test_a_format_is_learned_from_500_examples(tmp_path):
    rng = random.Random(0)
    sentences = (
        f"The {rng.choice(COLOURS)} {rng.choice(ANIMALS)} sat by the {rng.choice(ANIMALS)}. " for _ in range(30_000)
    )
    (tmp_path / "animals.txt").write_text("".join(f"{s}\n" if i % 5 == 4 else s for i, s in enumerate(sentences)))
    pairs = [(colour, animal) for colour in COLOURS for animal in ANIMALS]
    rng.shuffle(pairs)
    unseen, seen = pairs[:16], pairs[16:]
    examples = [rng.choice(seen) for _ in range(500)]
    (tmp_path / "examples.jsonl").write_text(
        "".join(
            json.dumps(
                {"prompt": f"The {c} {a} sat by the {rng.choice(ANIMALS)}. What sat?\n", "completion": f"<<{a}|{c}>>"}
            )
            + "\n"
            for c, a in examples
        )
    )
    words = ["debug", "training.eval_interval=100", "checkpoint.interval=300", "training.steps=300"]
    train(tmp_path, *words, "run.name=base", "data.text=animals.txt")
    words += [
        "run.name=tuned",
        "data.text=examples.jsonl",
        "data.loss_on=completion",
        "data.documents=apart",
        "checkpoint.load=runs/base",
    ]
    train(tmp_path, *words, "checkpoint.weights_only=true")

    prompts = [word for c, a in unseen for word in ("--prompt", f"The {c} {a} sat by the ox. What sat?\n")]
    before, after = (
        program(tmp_path, "generate", f"runs/{name}", *prompts, "--max-new-tokens", "14", "--temperature", "0").stdout
        for name in ("base", "tuned")
    )
    assert "<<" not in before
    assert sum(f"<<{a}|{c}>>" in after for c, a in unseen) >= 12, after
