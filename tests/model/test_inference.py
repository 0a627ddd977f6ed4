"""Models that generate through Megatron's static inference contexts: a token, or a piece of a prompt, at a time."""

import pytest
import torch
from support.models import DELTA, hybrid_model, one_process

VOCAB, LENGTH = 64, 150


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def context(batch=2, length=LENGTH):
    from megatron.core.inference.contexts import StaticInferenceContext

    return StaticInferenceContext(batch, length)


def perturbed(pattern, **changes):
    model = hybrid_model(pattern, vocab_size=VOCAB, length=LENGTH, **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def advance(model, inference_context, tokens):
    """Logits [B, T, V] of the next tokens [B, T]."""
    first = inference_context.sequence_len_offset
    positions = torch.arange(first, first + tokens.shape[1]).expand(tokens.shape[0], -1)
    with torch.no_grad():
        out = model(tokens, positions, None, inference_context=inference_context, runtime_gather_output=True)
    inference_context.sequence_len_offset += tokens.shape[1]
    return out


def whole(model, tokens):
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1), None)


SPLITS = [[LENGTH], [1] * 20, [70, 1, 1, 1], [3, 64, 5, 1, 20, 1, 56], [140, *[1] * 10]]
PATTERNS = {
    "carve": ("C-C-", {}),
    "gdn2": ("2-2-", {}),
    "kda, dynamic taps": (
        "KK",
        {"mixer": {"negative_eigenvalues": True, "short_convolution": "dynamic", "convolution_rank": 4}},
    ),
    "attention": ("*-*-", {"num_query_groups": 2}),
    "window": ("*-*-", {"window_size": (16, 0)}),
    "attention, static taps": ("*-*-", {"attention_convolution": "static"}),
    "attention, dynamic taps": (
        "*-2*",
        {
            "attention_convolution": "dynamic",
            "num_query_groups": 2,
            "window_size": (16, 0),
            "mixer": {"convolution_rank": 4},
        },
    ),
    "hybrid": ("C-2*-", {"window_size": (16, 0), "num_query_groups": 2}),
    "delta": ("C2", DELTA),
    "decayed": ("C2", {"mixer": {"prediction": "decayed", "content_rank": 0}}),
    "least": ("C2", {"mixer": {"short_convolution": "none", "output_gate_activation": "none"}}),
    "window of one": ("*-", {"window_size": (0, 0)}),
    "short convolution": ("2C*", {"linear_conv_kernel_dim": 1, "attention_convolution": "static"}),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("pieces", SPLITS, ids=str)
def test_any_split_of_a_sequence_into_calls_computes_what_one_call_computes(name, pieces):
    pattern, changes = PATTERNS[name]
    model = perturbed(pattern, **changes)
    tokens = torch.randint(VOCAB, (2, sum(pieces)))
    expected = whole(model, tokens)
    memory = context()
    found = torch.cat([advance(model, memory, piece) for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    # and once more with the same memory, from the beginning
    memory.reset()
    again = torch.cat([advance(model, memory, piece) for piece in tokens.split(pieces, 1)], 1)
    assert torch.equal(again, found)


def test_a_prompt_of_any_length_goes_on_as_one_sequence():
    """Every place to divide a sequence, among them the ends of CARVE's chunks and of attention's window."""
    model = perturbed("C-2*-", window_size=(16, 0))
    tokens = torch.randint(VOCAB, (1, LENGTH))
    expected = whole(model, tokens)
    memory = context(batch=1)
    for split in range(1, LENGTH - 2):
        memory.reset()
        found = torch.cat([advance(model, memory, x) for x in tokens[:, : split + 2].split([split, 1, 1], 1)], 1)
        torch.testing.assert_close(found, expected[:, : split + 2], rtol=1e-4, atol=2e-5, msg=f"after {split} tokens")


@pytest.mark.slow
def test_triton_continues_sequences_as_torch_does():
    """A prompt by the chunk kernels, tokens by the recurrent ones; on the CPU in the interpreter."""
    from support import interpreter

    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2}
    model = perturbed("C2", **sizes)
    tokens = torch.randint(VOCAB, (2, 73), device=interpreter.DEVICE)
    expected = whole(model, tokens)
    for layer in model.decoder.layers:
        layer.self_attention.backend = "triton"
    memory = context()
    found = torch.cat([advance(model, memory, piece) for piece in tokens.split([63, 8, 1, 1], 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("window", [3, 16, 40])
def test_attention_in_many_blocks_after_earlier_tokens(monkeypatch, window):
    """Blocks of fewer queries than there are, windows of less and of more than a block."""
    monkeypatch.setattr("megatron_carve.model.attention.MIN_BLOCK", 8)
    model = perturbed("*-*-", window_size=(window - 1, 0), num_query_groups=2)
    for pieces in ([LENGTH], [70, 60, 20], [5, 90, 1, 54], [1, 149]):
        tokens = torch.randint(VOCAB, (2, LENGTH))
        memory = context()
        found = torch.cat([advance(model, memory, piece) for piece in tokens.split(pieces, 1)], 1)
        torch.testing.assert_close(found, whole(model, tokens), rtol=1e-4, atol=2e-5, msg=str(pieces))


def test_sequences_of_different_lengths_go_on_together():
    """Prompts are read one by one, each at its own place in the batch; then all get a token at a time."""
    model = perturbed("C-2*-", window_size=(16, 0), num_query_groups=2, attention_convolution="dynamic")
    prompts = [torch.randint(VOCAB, (1, n)) for n in (1, 70, 23)]
    rest = torch.randint(VOCAB, (3, 30))
    memory = context(batch=3)
    for place, prompt in enumerate(prompts):
        memory.reset()
        memory.batch_size_offset = place
        advance(model, memory, prompt)
    memory.batch_size_offset = 0
    found = torch.cat([advance(model, memory, token) for token in rest.split(1, 1)], 1)
    for place, prompt in enumerate(prompts):
        expected = whole(model, torch.cat([prompt, rest[place : place + 1]], 1))[:, prompt.shape[1] :]
        torch.testing.assert_close(found[place : place + 1], expected, rtol=1e-4, atol=2e-5)


def test_memory_does_not_grow_with_the_sequence():
    model = perturbed("C-2*-", window_size=(16, 0))
    sizes = {}
    for length in (100, 1000):
        memory = context(length=length)
        advance(model, memory, torch.randint(VOCAB, (2, 40)))
        sizes[length] = {layer: sum(x.nbytes for x in kept) for layer, kept in memory.key_value_memory_dict.items()}
    assert sizes[100] == sizes[1000]
    assert len(sizes[100]) == 3
    # of attention: keys and values of 17 tokens, 4 heads of 8 channels, 2 sequences, and 2 positions
    assert sizes[100][4] == 2 * (2 * 17 * 32 * 4 + 8)


def test_what_cannot_be_is_refused_by_name():
    model = perturbed("C-*-")
    with pytest.raises(ValueError, match="expected at most max_batch_size=2 sequences, got 3"):
        advance(model, context(), torch.randint(VOCAB, (3, 4)))
    with pytest.raises(ValueError, match="expected at most max_sequence_length=10 tokens, got 11"):
        advance(model, context(length=10), torch.randint(VOCAB, (2, 11)))
    attention = perturbed("*-")
    with pytest.raises(ValueError, match="expected at most max_batch_size=2 sequences, got 3"):
        advance(attention, context(), torch.randint(VOCAB, (3, 4)))


def test_megatrons_static_engine_generates_what_the_whole_model_says():
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.inference.utils import InferenceMode

    class Numbers:
        """Token ids as text."""

        vocab_size, eod, bos = VOCAB, -1, None  # no token ends a text

        def tokenize(self, text):
            return [int(word) for word in text.split()]

        def detokenize(self, ids, *args, **options):
            return " ".join(map(str, ids))

        def offsets(self, ids, text):
            return list(range(len(ids)))

    model = perturbed("C-2*-", window_size=(16, 0))
    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(2, 80))
    engine = StaticInferenceEngine(TextGenerationController(wrapper, Numbers()), max_batch_size=2, legacy=True)
    prompts = ["5 17 3 42 9", "1 2 3 4 5 6 7 8 9 10 11 12"]
    results = engine.generate(prompts, sampling_params=SamplingParams(num_tokens_to_generate=30, top_k=1))
    InferenceMode.unset_active()  # which the engine leaves on, in the whole process
    for prompt, result in zip(prompts, results, strict=True):
        tokens = Numbers().tokenize(prompt)
        for _ in range(30):
            tokens.append(int(whole(model, torch.tensor([tokens]))[0, -1].argmax()))
        assert result.generated_tokens.tolist() == tokens[-30:]
