"""The engine on a GPU: prompts packed through the chunk kernels, tokens of all requests by CUDA graphs."""

import gc
import random

import pytest
import torch
from support.models import assert_few_launches, count_launches, hybrid_model, one_process

pytestmark = pytest.mark.gpu

VOCAB, LENGTH = 64, 400
SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2, "kv_channels": 32}
PATTERNS = {
    "hybrid": ("C-2*K-", {"window_size": (16, 0), "num_query_groups": 2}),
    "dynamic taps": ("C2K*", {"mixer": {"short_convolution": "dynamic"}}),
    "recurrent": ("C2", {}),
    "attention": ("*-*-", {}),
}


@pytest.fixture(scope="module", params=PATTERNS)
def models(request):
    """One model in float32 and in bfloat16, with the same weights."""
    pattern, changes = PATTERNS[request.param]
    with one_process("cuda"):
        made = {}
        for dtype, options in (torch.bfloat16, {"bf16": True, "params_dtype": torch.bfloat16}), (torch.float32, {}):
            made[dtype] = (
                hybrid_model(pattern, vocab_size=VOCAB, length=LENGTH, **changes, **options, **SIZES).cuda().eval()
            )
        with torch.no_grad():
            for rounded, exact in zip(made[torch.bfloat16].parameters(), made[torch.float32].parameters(), strict=True):
                rounded += 0.1 * torch.randn_like(rounded)
                exact.copy_(rounded)
        yield made


def engine_of(model, **limits):
    from megatron_carve.use.engine import Engine
    from megatron_carve.use.trained import Trained

    trained = Trained(model, None, 0, VOCAB, torch.device("cuda"), None)
    return Engine(trained, **({"max_requests": 12, "max_tokens": 256, "max_sequence": LENGTH} | limits))


def texts(engine, requests=40, **options):
    """Random requests that arrive at random: [(prompt, tokens, logprobs of all but the first)]."""
    from megatron_carve.use.engine import Sampling

    chance = random.Random(3)
    coming = [
        ([chance.randrange(VOCAB) for _ in range(chance.choice([1, 5, 64, 300]))], chance.randint(1, 60))
        for _ in range(requests)
    ]
    prompts, found = {}, {}
    while coming or not engine.idle():
        for _ in range(chance.randrange(4)):
            if coming:
                prompt, tokens = coming.pop()
                sampling = Sampling(max_tokens=tokens, temperature=0, **options)
                prompts[engine.add(prompt, sampling)] = prompt
        for step in engine.step():
            tokens, logprobs = found.setdefault(step.request, ([], []))
            tokens += step.tokens
            logprobs += [*step.prompt_logprobs, *step.logprobs]
    return [(prompt, *found[number]) for number, prompt in prompts.items()]


def whole(model, prompt, tokens):
    """Logits that each token of the text but the first comes of, [T - 1, V] float32, and those tokens."""
    text = torch.tensor([[*prompt, *tokens]], device="cuda")
    with torch.no_grad():
        logits = model(text, torch.arange(text.shape[1], device="cuda")[None], None)
    return logits[0, :-1].float(), text[0, 1:]


def test_tokens_are_those_of_each_alone_with_and_without_graphs(models, monkeypatch):
    model, launches = models[torch.float32], count_launches(monkeypatch)
    found = texts(engine_of(model, cuda_graphs=True))
    assert_few_launches(launches, model)  # while graphs were recorded
    assert found == texts(engine_of(model, cuda_graphs=False))
    for prompt, tokens, _ in found:
        logits, text = whole(model, prompt, tokens)
        chosen = logits.gather(1, text[:, None])[:, 0]
        assert (chosen >= logits.amax(1) - 1e-3)[len(prompt) - 1 :].all(), (prompt, tokens)


def test_log_probabilities_are_those_of_training_within_its_rounding(models):
    errors = {"training": [], "engine": []}
    for prompt, tokens, logprobs in texts(engine_of(models[torch.bfloat16]), logprobs=0, prompt_logprobs=True):
        exact, training = (
            logits.log_softmax(-1).gather(1, text[:, None])[:, 0]
            for logits, text in (whole(models[dtype], prompt, tokens) for dtype in (torch.float32, torch.bfloat16))
        )
        errors["training"].append(training - exact)
        errors["engine"].append(torch.tensor(logprobs, device="cuda") - exact)
    training, engine = (torch.cat(e) for e in errors.values())
    print(f"training {training.square().mean().sqrt():.4f}, engine {engine.square().mean().sqrt():.4f}")
    print(f"engine - training {(engine - training).square().mean().sqrt():.4f}")
    assert engine.square().mean().sqrt() <= 1.5 * training.square().mean().sqrt() + 1e-3
    assert engine.abs().max() <= 2 * training.abs().max() + 1e-3


def test_memory_is_flat_over_1000_requests_and_free_after_closing(models):
    model = models[torch.bfloat16]
    texts(engine_of(model), 4)  # workspaces of cuBLAS stay
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = engine_of(model, max_requests=64, max_tokens=1024)
    texts(engine, 100)
    held = torch.cuda.memory_allocated()
    texts(engine, 1000)
    assert abs(torch.cuda.memory_allocated() - held) < 2**20
    assert engine._steps.context.mamba_metadata.mamba_state_free_slot_count == 64
    engine.close()
    del engine
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**22


def test_megatrons_own_engine_gives_the_same_tokens(models):
    from types import SimpleNamespace

    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    from megatron_carve.use.dynamic_context import dynamic_context

    model = models[torch.float32]
    ours = texts(engine_of(model), 20)
    context = dynamic_context(model, max_requests=12, max_tokens=256, max_sequence=LENGTH, blocks=24)
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=-1, bos=None, detokenize=lambda ids, **options: "")
    engine = DynamicInferenceEngine(TextGenerationController(GPTInferenceWrapper(model, context), tokenizer), context)
    for number, (prompt, tokens, _) in enumerate(ours):
        sampling = SamplingParams(num_tokens_to_generate=len(tokens), top_k=1, termination_id=-1)
        engine.add_request(number, prompt, sampling)
    records = []
    while engine.has_unfinished_requests():
        records += engine.step_modern()["finished_request_records"]
    by_number = {record.request_id: record[-1].generated_tokens for record in records}
    assert [by_number[number] for number in range(len(ours))] == [tokens for _, tokens, _ in ours]
