"""Logarithmic probabilities of a text by the forward that trains, by the static context and by the engine."""

from types import SimpleNamespace

import pytest
import torch
from support.models import hybrid_model, one_process

VOCAB, LENGTH = 60, 260
PROMPT, NEW = 130, 60


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


@pytest.fixture(
    scope="module",
    params=["C-C*-", pytest.param("2-2*-", marks=pytest.mark.long), pytest.param("K-K*-", marks=pytest.mark.long)],
    ids=["carve", "gdn2", "kda"],
)
def models(request):
    """One model in bfloat16 and in float32, with the same weights."""
    made = {}
    for dtype, options in (torch.bfloat16, {"bf16": True, "params_dtype": torch.bfloat16}), (torch.float32, {}):
        made[dtype] = hybrid_model(request.param, vocab_size=64, length=LENGTH, window_size=(32, 0), **options).eval()
    with torch.no_grad():
        for rounded, exact in zip(made[torch.bfloat16].parameters(), made[torch.float32].parameters(), strict=True):
            rounded += 0.1 * torch.randn_like(rounded)
            exact.copy_(rounded)
    return made


def by_engine(model, prompt, new, **limits):
    """(tokens, logprobs of all tokens but the first) of a greedy continuation beside two other requests."""
    from megatron_carve.use.engine import Engine, Sampling

    trained = SimpleNamespace(model=model, vocab_size=VOCAB, device=torch.device("cpu"), recipe=None)
    engine = Engine(trained, max_requests=4, max_tokens=100, max_sequence=LENGTH, block_tokens=32, **limits)
    number = engine.add(prompt, Sampling(max_tokens=new, temperature=0, logprobs=2, prompt_logprobs=True))
    for length in (1, 50):
        engine.add([7] * length, Sampling(max_tokens=30, seed=1))
    tokens, logprobs = [], []
    while not engine.idle():
        for step in (step for step in engine.step() if step.request == number):
            tokens += step.tokens
            logprobs += [*step.prompt_logprobs, *step.logprobs]
            assert len(step.top_logprobs[0]) == 2
            assert step.top_logprobs[0][step.tokens[0]] == step.logprobs[0] == max(step.top_logprobs[0].values())
    return tokens, torch.tensor(logprobs)


def of_text(logits, text):
    return logits[:, :VOCAB].float().log_softmax(-1)[:-1].gather(1, text[1:, None])[:, 0]


def by_training(model, text):
    with torch.no_grad():
        return of_text(model(text[None], torch.arange(len(text))[None], None)[0], text)


def by_static(model, text):
    """The prompt at once, then a token at a time."""
    from megatron_carve.use.generation import Memory

    memory = Memory(model, 1, LENGTH, vocab_size=VOCAB)
    logits = [memory.read(0, text[:PROMPT])] + [memory.step(token[None])[0] for token in text[PROMPT:-1]]
    return torch.stack(logits).log_softmax(-1).gather(1, text[PROMPT:, None])[:, 0]


def test_float32_agrees_but_for_its_rounding(models):
    model, prompt = models[torch.float32], torch.randint(VOCAB, (PROMPT,))
    tokens, engine = by_engine(model, prompt.tolist(), NEW)
    text = torch.cat([prompt, torch.tensor(tokens)])
    training = by_training(model, text)
    torch.testing.assert_close(engine, training, rtol=0, atol=2e-5)
    torch.testing.assert_close(by_static(model, text), training[PROMPT - 1 :], rtol=0, atol=2e-5)


def test_bfloat16_agrees_but_for_its_rounding(models):
    """Each is as near to the float32 model as the forward that trains, and takes the same token where one is the
    likeliest by more than that."""
    model, prompt = models[torch.bfloat16], torch.randint(VOCAB, (PROMPT,))
    tokens, engine = by_engine(model, prompt.tolist(), NEW)
    text = torch.cat([prompt, torch.tensor(tokens)])
    exact, training = by_training(models[torch.float32], text), by_training(model, text)
    errors = {
        "training": training - exact,
        "engine": engine - exact,
        "static": by_static(model, text) - exact[PROMPT - 1 :],
    }
    for name, error in errors.items():
        print(f"{name}: {error.square().mean().sqrt():.4f} {error.abs().max():.4f}")
    print(f"engine - training: {(engine - training).square().mean().sqrt():.4f} {(engine - training).abs().max():.4f}")
    for error in errors.values():
        assert error.square().mean().sqrt() <= 1.5 * errors["training"].square().mean().sqrt() + 1e-3
        assert error.abs().max() <= 2 * errors["training"].abs().max() + 1e-3
    with torch.no_grad():
        logits = model(text[None], torch.arange(len(text))[None], None)[0, PROMPT - 1 : -1, :VOCAB].float()
    chosen = logits.gather(1, text[PROMPT:, None])[:, 0]
    assert (chosen >= logits.amax(1) - 2 * errors["training"].abs().max()).all()


def test_the_engine_scores_alike_however_it_reads(models):
    """A prompt in pieces, and one at once."""
    model, prompt = models[torch.float32], torch.randint(VOCAB, (PROMPT,)).tolist()
    tokens, pieces = by_engine(model, prompt, 5)
    again, whole = by_engine(model, prompt + tokens[:-1], 1)
    assert again == tokens[-1:]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)
