"""The exported model as transformers and what builds on it use one: padding, beams, caches, training."""

import dataclasses

import pytest
import torch

from megatron_carve.model.config import MixerConfig
from megatron_carve.use import modeling_carve

SIZES = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 16, "value_head_dim": 16, "content_rank": 4}
FORMS = {
    "diagonal": {},
    "decayed": {
        "prediction": "decayed", "conv_bias": True, "short_convolution": "dynamic", "convolution_rank": 5,
        "attention": "dynamic",
    },
    "delta": {"erase": "delta", "content_chunk": 128, "attention": "static"},
    "without": {"content_rank": 0, "short_convolution": "none"},
}  # fmt: skip
PAD = 0


def made(pattern="C-*-2-K-", window=None, attention="none", **options):
    torch.manual_seed(0)
    config = modeling_carve.CarveConfig(
        pattern=pattern,
        vocab_size=96,
        attention_window=window,
        attention_convolution=attention,
        mixer=dataclasses.asdict(MixerConfig(**SIZES | options)),
    )
    model = modeling_carve.CarveForCausalLM(config).eval()
    with torch.no_grad():  # so that no part of it begins at zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def padded(lengths, *, left=True):
    """Rows of random tokens of these lengths, their mask, and the rows alone."""
    rows = [torch.randint(1, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    T = max(lengths)
    ids, mask = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(T - len(row), T) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    return ids, mask, rows


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_padding_changes_nothing_without_a_cache(form, left):
    model = made(**FORMS[form])
    ids, mask, rows = padded([150, 70, 3], left=left)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        close(logits[i, mask[i].bool()], model(row[None]).logits[0])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_padding_does_not_enter_the_state(form, window):
    """A padded prompt, then tokens in pieces, beside each row alone."""
    model = made(window=window, **FORMS[form])
    ids, mask, rows = padded([150, 70, 3])
    new = torch.randint(1, 96, (3, 140))
    memory, parts = None, []
    for piece in (ids, *new.split([1, 1, 2, 66, 70], 1)):
        if memory is not None:
            mask = torch.cat([mask, torch.ones_like(piece)], 1)
        step = model(piece, attention_mask=mask, past_key_values=memory, use_cache=True)
        memory = step[modeling_carve.CACHE]
        parts.append(step.logits)
    logits = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        expected = model(torch.cat([row, new[i]])[None]).logits[0]
        close(logits[i, -len(expected) :], expected)


@torch.no_grad()
def test_greedy_texts_and_beams_of_a_padded_batch_are_those_of_each_row():
    model = made()
    ids, mask, rows = padded([40, 9])
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **options}
        found = model.generate(ids, attention_mask=mask, **options)
        each = options.get("num_return_sequences", 1)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
            assert torch.equal(found[each * i : each * (i + 1), -30:], alone[:, -30:])


@torch.no_grad()
def test_beams_find_what_is_at_least_as_likely_as_the_greedy_text():
    model = made()
    prompt = torch.randint(1, 96, (1, 20))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}

    def likelihood(beams):
        text = model.generate(prompt, num_beams=beams, eos_token_id=None, **options)
        scores = model(text[:, :-1]).logits.log_softmax(-1).gather(2, text[:, 1:, None])
        return scores[:, 19:].sum().item()

    assert likelihood(8) > likelihood(1) - 1e-4


@torch.no_grad()
def test_padding_that_a_recurrence_cannot_leave_out_is_refused():
    model = made("C-")
    ids, mask, _ = padded([6, 4], left=False)
    with pytest.raises(ValueError, match="expected padding before the tokens of a row"):
        model(ids, attention_mask=mask, use_cache=True)
    mask = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="expected rows of tokens with padding on one side"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"expected \[B, T\] with T of at least 6, got \[2, 5\]"):
        model(ids, attention_mask=mask[:, 1:])
    memory = model(ids, use_cache=True)[modeling_carve.CACHE]
    with pytest.raises(ValueError, match="expected no padding among tokens that follow a cache"):
        model(ids, attention_mask=torch.cat([torch.zeros(2, 6), torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)], 1),
              past_key_values=memory)  # fmt: skip


@torch.no_grad()
def test_layers_that_are_handed_copies_of_containers_remember_all_the_same():
    """As hooks do that move the arguments of a layer to its device."""

    def copied(x):
        if isinstance(x, dict):
            return {key: copied(value) for key, value in x.items()}
        return type(x)(map(copied, x)) if isinstance(x, list | tuple) else x

    model = made()
    ids = torch.randint(1, 96, (2, 30))
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: copied(args))
    first = model(ids[:, :20], use_cache=True)
    second = model(ids[:, 20:], past_key_values=first[modeling_carve.CACHE], use_cache=True)
    close(torch.cat([first.logits, second.logits], 1), expected)


@torch.no_grad()
def test_hidden_states_and_chosen_logits():
    model = made("C-*-")
    ids = torch.randint(1, 96, (2, 10))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    close(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([1, 7])).logits, out.logits[:, [1, 7]])


def test_gradient_checkpointing_gives_the_same_gradients():
    model = made().train()
    ids = torch.randint(1, 96, (2, 70))
    entered = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: entered.append(0))
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert len(entered) == 1
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert len(entered) == 3  # once, and once again in the backward
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])


def test_padded_labels_do_not_count():
    model = made("C-*-")
    ids, mask, rows = padded([30, 12], left=False)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    alone = [(model(row[None], labels=row[None]).loss, len(row) - 1) for row in rows]
    close(loss, sum(value * n for value, n in alone) / sum(n for _, n in alone))


def test_a_config_of_nothing_makes_a_model():
    config = modeling_carve.CarveConfig()
    ids = torch.randint(256, (1, 8))
    assert modeling_carve.CarveForCausalLM(config)(ids).logits.shape == (1, 8, 256)
    defaults = dataclasses.asdict(MixerConfig(num_key_heads=2, num_value_heads=2, key_head_dim=32, value_head_dim=32))
    assert defaults == modeling_carve.DEFAULT_MIXER


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_model_compiles_into_one_graph_with_a_mask():
    model = made("C-*-2-K-")
    ids, mask, _ = padded([70, 64])
    expected = model(ids, attention_mask=mask).logits
    found = torch.compile(model, fullgraph=True, backend="eager")(ids, attention_mask=mask).logits
    close(found, expected)


@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_and_chosen():
    model = made()
    ids, new = torch.randint(1, 96, (2, 80)), torch.randint(1, 96, (4, 3))
    memory = model(ids, use_cache=True)[modeling_carve.CACHE]
    memory.batch_repeat_interleave(2)
    found = model(new, past_key_values=memory, use_cache=True).logits
    close(found, model(torch.cat([ids.repeat_interleave(2, 0), new], 1)).logits[:, -3:])
    memory.batch_select_indices(torch.tensor([3, 0]))
    rows = torch.cat([ids.repeat_interleave(2, 0), new], 1)[[3, 0]]
    close(model(new[:2], past_key_values=memory).logits, model(torch.cat([rows, new[:2]], 1)).logits[:, -3:])
