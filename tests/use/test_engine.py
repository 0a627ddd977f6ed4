"""Many requests at a time: each gets what it would get alone, and leaves nothing behind."""

import gc
import random
from types import SimpleNamespace

import pytest
import torch
from support.models import DELTA, hybrid_model, one_process, steps_of_fixed_size

VOCAB = 60  # of models padded to 64
LENGTH = 200


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def perturbed(pattern, **changes):
    model = hybrid_model(pattern, vocab_size=64, length=LENGTH, **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def hybrid():
    return perturbed("C-2*K-", window_size=(16, 0))


@pytest.fixture(scope="module")
def small():
    return perturbed("C*")


def engine_of(model, vocab_size=VOCAB, **limits):
    from megatron_carve.use.engine import Engine

    trained = SimpleNamespace(model=model, vocab_size=vocab_size, device=torch.device("cpu"), recipe=None)
    sizes = {"max_requests": 16, "max_tokens": 64, "max_sequence": LENGTH, "block_tokens": 16}
    return Engine(trained, **(sizes | limits))


def greedy(max_tokens, **options):
    from megatron_carve.use.engine import Sampling

    return Sampling(max_tokens=max_tokens, temperature=0, **options)


def finished(engine):
    """Step until all have ended; {request: (tokens, how it ended)}."""
    found = {}
    while not engine.idle():
        for step in engine.step():
            tokens, _ = found.get(step.request, ([], None))
            found[step.request] = (tokens + list(step.tokens), step.finish)
    return found


def assert_greedy(model, *texts):
    """The tokens of each (prompt, tokens) are those of the prompt alone: by what went before, each is the likeliest, or
    one as likely, for the forward that trains."""
    length = max(len(prompt) + len(tokens) for prompt, tokens in texts)
    rows = torch.tensor([[*prompt, *tokens, *[0] * (length - len(prompt) - len(tokens))] for prompt, tokens in texts])
    with torch.no_grad():
        logits = model(rows, torch.arange(length).expand(len(texts), -1), None)[:, :-1, :VOCAB]
    chosen = logits.gather(2, rows[:, 1:, None])[:, :, 0]
    likeliest = chosen >= logits.amax(2) - 1e-4
    for row, (prompt, tokens) in zip(likeliest, texts, strict=True):
        assert tokens and row[len(prompt) - 1 : len(prompt) + len(tokens) - 1].all(), (prompt, tokens)


def nothing_left(engine):
    """No request holds anything, neither here nor in Megatron's context."""
    context = engine._steps.context
    blocks = context.kv_block_allocator
    return (
        engine.idle()
        and engine._free_blocks == blocks.total_count - 1 - 1  # one that is nobody's, one that rounding may cost
        and blocks.total_avail == blocks.total_count - 1
        and context.mamba_metadata.mamba_state_free_slot_count == engine.max_requests
        and context.total_request_count == context.active_token_count == 0
        and not engine._running
    )


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("C-C*-", {}), ("2-2*-", {"window_size": (16, 0)}), ("K-K*-", {"num_query_groups": 2})],
    ids=["carve", "gdn2", "kda"],
)
def test_64_requests_of_random_lengths_and_arrival_get_their_tokens_of_each_alone(pattern, changes):
    model = perturbed(pattern, **changes)
    engine, chance = engine_of(model), random.Random(1)
    coming = [[chance.randrange(VOCAB) for _ in range(chance.choice([1, 2, 17, 64, 150]))] for _ in range(64)]
    prompts, found, together = {}, {}, 0
    while coming or not engine.idle():
        for _ in range(chance.randrange(4)):
            if coming:
                prompt = coming.pop()
                prompts[engine.add(prompt, greedy(chance.randint(1, 20)))] = prompt
        for step in engine.step():
            found.setdefault(step.request, []).extend(step.tokens)
        together = max(together, len(engine._running))
    assert together > 12
    assert nothing_left(engine)
    assert len(found) == 64
    assert_greedy(model, *((prompt, found[number]) for number, prompt in prompts.items()))


def test_tokens_are_those_of_the_static_context_and_of_megatrons_own_engine(hybrid):
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    from megatron_carve.use import generation
    from megatron_carve.use.dynamic_context import dynamic_context

    vocab_size = 64  # Megatron generates padding too
    prompts = [torch.randint(vocab_size, (n,)) for n in (1, 90, 33)]
    engine = engine_of(hybrid, vocab_size)
    for prompt in prompts:
        engine.add(prompt.tolist(), greedy(12))
    found = [tokens for _, (tokens, _) in sorted(finished(engine).items())]
    sampling = generation.Sampling(temperature=0)
    steps = list(generation.generate(hybrid, prompts, max_new_tokens=12, sampling=sampling, vocab_size=vocab_size))
    assert found == torch.stack(steps, 1).tolist()

    context = dynamic_context(hybrid, max_requests=8, max_tokens=64, max_sequence=LENGTH, blocks=50, block_tokens=16)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eod=-1, bos=None, detokenize=lambda ids, **options: "")
    theirs = DynamicInferenceEngine(TextGenerationController(GPTInferenceWrapper(hybrid, context), tokenizer), context)
    for number, prompt in enumerate(prompts):
        theirs.add_request(
            number, prompt.tolist(), SamplingParams(num_tokens_to_generate=12, top_k=1, termination_id=-1)
        )
    records = []
    while theirs.has_unfinished_requests():
        records += theirs.step_modern()["finished_request_records"]
    by_number = {record.request_id: record[-1].generated_tokens for record in records}
    assert [by_number[number] for number in range(3)] == found


OPTIONS = {
    "recurrent": ("CC", {}),
    "attention": ("*-*-", {"num_query_groups": 2}),
    "dynamic taps": (
        "KK*",
        {"mixer": {"negative_eigenvalues": True, "short_convolution": "dynamic", "convolution_rank": 4}},
    ),
    "delta": ("C2*", DELTA),
    "no content": ("C2", {"mixer": {"prediction": "decayed", "content_rank": 0}}),
    "least": ("C2", {"mixer": {"short_convolution": "none", "output_gate_activation": "none"}}),
    "window of one": ("K*-", {"window_size": (0, 0)}),
    "convolution of one": ("2C", {"linear_conv_kernel_dim": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_layers(name):
    pattern, changes = OPTIONS[name]
    model = perturbed(pattern, **changes)
    engine = engine_of(model, max_requests=4, max_tokens=30)
    prompts = {}
    for n in (1, 100, 2, 70, 5):
        prompt = torch.randint(VOCAB, (n,)).tolist()
        prompts[engine.add(prompt, greedy(6))] = prompt
    assert_greedy(model, *((prompts[number], tokens) for number, (tokens, _) in finished(engine).items()))


@pytest.mark.slow
def test_triton_serves_requests_as_torch_does():
    """Packed prompts by the chunk kernels, tokens by the recurrent ones; on the CPU in the interpreter."""
    from support import interpreter

    assert interpreter.DEVICE == "cpu"
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 2}
    model = perturbed("C2*", window_size=(16, 0), num_query_groups=2, **sizes)
    for layer in model.decoder.layers:
        layer.self_attention.backend = "triton"
    model.config.mixer_backend = "triton"
    engine = engine_of(model, max_requests=3, max_tokens=50)
    prompts = {engine.add(prompt, greedy(3)): prompt for prompt in ([3] * 66, [4, 5])}
    found = finished(engine)
    for layer in model.decoder.layers:
        layer.self_attention.backend = "torch"
    assert_greedy(model, *((prompts[number], tokens) for number, (tokens, _) in found.items()))


def test_steps_of_a_fixed_size_as_cuda_graphs_have_them(hybrid, monkeypatch):
    """The sizes that are recorded on a GPU, with padding; here a replay computes what is recorded there."""
    sizes = steps_of_fixed_size(monkeypatch)
    engine = engine_of(hybrid, cuda_graphs=True)
    assert sorted(engine._steps._graphs) == [1, 2, 4, 8, 16]
    assert nothing_left(engine)
    prompts = {}
    for n in range(1, 12):
        prompt = torch.randint(VOCAB, (n,)).tolist()
        prompts[engine.add(prompt, greedy(3 + n))] = prompt
    assert_greedy(hybrid, *((prompts[number], tokens) for number, (tokens, _) in finished(engine).items()))
    assert any(padded > requests for requests, padded in sizes)
    assert nothing_left(engine)


def test_a_long_prompt_is_read_beside_the_tokens_of_others(small):
    engine = engine_of(small, max_requests=4, max_tokens=20)
    prompt, other = list(range(40)) * 4, [5, 6]
    first = engine.add(other, greedy(60))
    engine.step()
    long = engine.add(prompt, greedy(3))
    before, steps = [], engine.step()
    while all(step.request != long for step in steps):
        before += steps
        steps = engine.step()
    assert len(before) == 160 // 19 and {step.request for step in before} == {first}
    assert_greedy(small, (prompt, [*steps[-1].tokens] + finished(engine)[long][0]))


def test_cancelled_requests_give_their_memory_back(small):
    engine = engine_of(small, max_requests=3, max_tokens=40)
    prompts = [[1, 2, 3], [4] * 10, [5] * 150, [6, 7]]
    runs, kept, partly, waits = (engine.add(prompt, greedy(30)) for prompt in prompts)
    engine.step()
    assert engine._partly_read.number == partly
    for number in (runs, partly, waits, waits, 12345):
        engine.cancel(number)
    ended = {step.request for step in engine.step() if step.finish == "cancelled"}
    assert ended == {runs, partly, waits}
    assert set(engine._running) == {kept}
    another = engine.add([9] * 150, greedy(30))
    found = finished(engine)
    assert nothing_left(engine)
    engine.cancel(kept)  # it ended long ago
    assert engine.step() == []
    alone = engine.add(prompts[1], greedy(30))
    assert finished(engine)[alone][0][2:] == found[kept][0]
    assert_greedy(small, ([9] * 150, found[another][0]))


def test_1000_requests_leave_nothing_behind(small):
    from megatron_carve.use.engine import _Request

    engine, chance = engine_of(small, max_requests=32, max_tokens=160), random.Random(2)

    def run(requests):
        ends = {"stop": 0, "length": 0, "cancelled": 0}
        while requests or not engine.idle():
            for _ in range(min(requests, 16)):
                prompt = [chance.randrange(VOCAB) for _ in range(chance.choice([1, 3, 20]))]
                number = engine.add(prompt, greedy(chance.randint(1, 4), stop_tokens=(7, 8, 9)))
                requests -= 1
                if chance.random() < 0.1:
                    engine.cancel(number)
            for step in engine.step():
                if step.finish:
                    ends[step.finish] += 1
        return ends

    run(100)
    gc.collect()
    objects = len(gc.get_objects())
    ends = run(1000)
    gc.collect()
    assert sum(ends.values()) == 1000 and min(ends.values()) > 10, ends
    assert nothing_left(engine)
    assert not any(isinstance(x, _Request) for x in gc.get_objects())
    assert len(gc.get_objects()) - objects < 100


def test_a_seed_gives_one_text_whatever_else_runs(small):
    from megatron_carve.use.engine import Sampling

    def text(seed, others, **options):
        engine = engine_of(small, max_requests=8, max_tokens=30)
        for number in range(others):
            engine.add([number] * (3 + 10 * number), Sampling(max_tokens=12, seed=number, top_k=number))
        number = engine.add([1, 2, 3] * 20, Sampling(max_tokens=15, seed=seed, **options))
        return finished(engine)[number][0]

    for options in ({}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.5}):
        alone = text(5, 0, **options)
        assert text(5, 7, **options) == alone
        assert text(6, 3, **options) != alone


def test_a_request_ends_at_a_stop_token(small):
    engine = engine_of(small)
    number = engine.add([1, 2, 3], greedy(10))
    tokens, finish = finished(engine)[number]
    assert finish == "length" and len(tokens) == 10
    number = engine.add([1, 2, 3], greedy(10, stop_tokens=(tokens[4],)))
    first = tokens.index(tokens[4])
    assert finished(engine)[number] == (tokens[: first + 1], "stop")


def test_more_requests_wait_for_memory():
    model = perturbed("K*")
    context_of_one = 200 * 2 * 4 * 8 * 4  # of a sequence: keys and values of four heads of 8 in float32
    engine = engine_of(model, memory=2 * context_of_one + 10000)
    for _ in range(3):
        engine.add([3] * 150, greedy(50))
    engine.step()
    while engine._partly_read:
        engine.step()
    assert len(engine._running) == 2
    assert all(len(tokens) > 40 for tokens, _ in finished(engine).values())
    assert nothing_left(engine)


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"max_requests": 0}, "max_requests: expected at least 1, got 0"),
        ({"max_tokens": 16}, "max_tokens: expected more than max_requests=16, got 16"),
        ({"max_sequence": 1}, "max_sequence: expected at least 2, got 1"),
        (
            {"memory": 1000},
            "max_sequence: expected memory for the keys and values of 200 tokens, 53248 bytes, got 1000",
        ),
    ],
)
def test_limits_that_do_not_fit(small, limits, complaint):
    with pytest.raises(ValueError, match=complaint):
        engine_of(small, **limits)


@pytest.mark.parametrize(
    ("prompt", "tokens", "complaint"),
    [
        ([], 1, "prompt: expected at least one token id, each from 0 to 59, got none"),
        ([60], 1, r"prompt: expected at least one token id, each from 0 to 59, got \[60\]"),
        ([1] * 150, 51, "prompt: expected at most 200 tokens together with those to generate, got 150 \\+ 51"),
    ],
)
def test_requests_that_can_never_run(small, prompt, tokens, complaint):
    engine = engine_of(small)
    with pytest.raises(ValueError, match=complaint):
        engine.add(prompt, greedy(tokens))
    assert engine.idle()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1, got 1.5"),
        ({"logprobs": -1}, "logprobs: expected at least 0, got -1"),
    ],
)
def test_sampling_out_of_range(options, complaint):
    from megatron_carve.use.engine import Sampling

    with pytest.raises(ValueError, match=complaint):
        Sampling(**{"max_tokens": 1, **options})


def test_what_dynamic_batching_does_not_do_is_refused(small):
    from megatron_carve.use.dynamic_context import dynamic_context
    from megatron_carve.use.steps import Steps

    convolved = perturbed("C*", attention_convolution="static")
    with pytest.raises(NotImplementedError, match=r"expected model\.attention_convolution none"):
        dynamic_context(convolved, max_requests=2, max_tokens=8, max_sequence=64, blocks=4)
    with pytest.raises(NotImplementedError, match="attention's convolution takes static batching, got dynamic"):
        convolved.decoder.layers[1].self_attention(
            None, None, inference_context=SimpleNamespace(is_static_batching=lambda: False)
        )
    other = perturbed("C*")
    other.decoder.layer_type_list = ["C", "E"]
    other.decoder.layers[1].self_attention = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=r"dynamic batching: expected layers of C, 2, K, \* and -, got 'E'"):
        engine_of(other)
    limits = {"max_requests": 2, "max_tokens": 8, "max_sequence": 16, "blocks": 9, "block_tokens": 8}
    steps = Steps(small, dynamic_context(small, **limits), VOCAB)
    context = steps.context
    context.initialize_attention_state()
    context.mamba_slot_allocator = object()
    with pytest.raises(NotImplementedError, match="enable_prefix_caching=False, got prefix caching of states"):
        steps._forward()
    context.mamba_slot_allocator, context.num_speculative_tokens = None, 1
    with pytest.raises(NotImplementedError, match="the mixers support no speculative decoding"):
        steps._forward()
    context.num_speculative_tokens = 0
    context._using_cuda_graph_this_step = True
    context.padded_batch_dimensions = SimpleNamespace(prefill_req_count=1, decode_req_count=0, token_count=1)
    with pytest.raises(NotImplementedError, match="use_cuda_graphs_for_non_decode_steps=False, got True"):
        steps._forward()


def test_requests_are_as_long_as_what_the_model_was_trained_on(small):
    from megatron_carve.use.engine import Engine

    recipe = SimpleNamespace(training=SimpleNamespace(seq_length=50))
    engine = Engine(SimpleNamespace(model=small, vocab_size=VOCAB, device=torch.device("cpu"), recipe=recipe))
    assert engine.max_sequence == 50
    with pytest.raises(ValueError, match="prompt: expected at most 50 tokens"):
        engine.add([1] * 50, greedy(1))


def test_a_closed_engine_says_so(small):
    engine = engine_of(small)
    engine.add([1], greedy(1))
    engine.close()
    engine.close()
    assert engine.idle()
    for use in (engine.step, lambda: engine.add([1], greedy(1))):
        with pytest.raises(RuntimeError, match="engine: expected one that is open, got a closed one"):
            use()
