"""Parameters, operations and memory of a recipe's model, by arithmetic: no GPU, no torch."""

from __future__ import annotations

from collections import Counter

from megatron_carve.model.config import CHUNK_TOKENS
from megatron_carve.model.variants import MIXER_LETTERS, VARIANTS
from megatron_carve.recipe import Recipe
from megatron_carve.recipe.experts import LETTER as EXPERTS

KINDS = {**{v.letter: v.name for v in VARIANTS.values()}, "*": "attention", "-": "MLP", EXPERTS: "MoE"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def unknown_layers(recipe: Recipe) -> list[str]:
    """Letters of the pattern that are none of KINDS: their sizes are Megatron's own affair."""
    return sorted(set(recipe.model.pattern) - set(KINDS) - {"|", "/"})


def layers(recipe: Recipe) -> tuple[Counter[str], int, Counter[str]]:
    """Layers of the decoder by letter, the number of heads for further tokens, and the layers of one such head.

    Raises:
        ValueError: there are unknown_layers.
    """
    decoder, *heads = recipe.model.pattern.replace("|", "").split("/")
    if unknown := unknown_layers(recipe):
        raise ValueError(f"model.pattern: expected layers of {', '.join(KINDS)} to plan for, got {', '.join(unknown)}")
    return Counter(decoder), len(heads), Counter(heads[0] if heads else "")


def padded_vocab(recipe: Recipe, vocab_size: int) -> int:
    """Rows of the embedding table."""
    multiple = recipe.model.vocab_multiple
    return -(-vocab_size // multiple) * multiple


def attention_widths(recipe: Recipe) -> tuple[int, int]:
    """Channels of all queries, and of all keys (as many of values)."""
    m = recipe.model
    head_dim = m.attention_head_dim or m.hidden_size // m.num_attention_heads
    return m.num_attention_heads * head_dim, (m.num_query_groups or m.num_attention_heads) * head_dim


def layer_parameters(recipe: Recipe, letter: str) -> int:
    """Parameters of one layer, its norm included."""
    h = recipe.model.hidden_size
    if letter in MIXER_LETTERS:
        return recipe.mixer.parameter_count(MIXER_LETTERS[letter], h)
    if letter == "-":
        return h + recipe.mlp.parameters(h, recipe.model.ffn_hidden_size)
    if letter == EXPERTS:
        return recipe.experts.parameters
    queries, keys = attention_widths(recipe)
    of_convolution = recipe.mixer.attention_convolution_parameters(
        recipe.model.attention_convolution, queries + 2 * keys, h
    )
    biased = recipe.mlp.biased
    biases = (queries + 2 * keys) * (biased or bool(recipe.megatron.get("add_qkv_bias"))) + h * biased
    return h + h * (queries + 2 * keys) + queries * h + biases + of_convolution


def parameters(recipe: Recipe, vocab_size: int) -> dict[str, int]:
    """Parameters by part: of each kind of layer all together, embedding, output and what else there is."""
    h = recipe.model.hidden_size
    decoder, heads, in_head = layers(recipe)
    found = {KINDS[letter]: n * layer_parameters(recipe, letter) for letter, n in decoder.items()}
    if heads:
        inner = sum(n * layer_parameters(recipe, letter) for letter, n in in_head.items())
        # Two norms and a projection take in the embedded token; a norm ends it. All heads of our patterns are alike.
        found["heads for further tokens"] = heads * (inner + 2 * h * h + 3 * h)
    found["final norm"] = h
    found["embedding"] = padded_vocab(recipe, vocab_size) * h
    if not recipe.model.tie_embeddings:
        found["output"] = found["embedding"]
    return found


def active_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Parameters that one token uses: all but the experts that it is not sent to."""
    total = sum(parameters(recipe, vocab_size).values())
    decoder, heads, in_head = layers(recipe)
    if number := decoder[EXPERTS] + heads * in_head[EXPERTS]:
        total -= number * (recipe.experts.parameters - recipe.experts.active_parameters)
    return total


def training_flops_per_token(recipe: Recipe, vocab_size: int) -> float | None:
    """Operations a token of a training sequence needs; the backward takes twice the forward.

    Returns:
        None if there are unknown_layers, which need not be counted to be trained.
    """
    return None if unknown_layers(recipe) else 3 * forward_flops_per_token(recipe, vocab_size)


def layer_flops_per_token(recipe: Recipe, letter: str) -> float:
    """Operations a token needs in the forward of one layer: matrix products, recurrences and attention.

    Causal attention reads half of the sequence on average, or its window.
    """
    m, T = recipe.model, recipe.training.seq_length
    if letter in MIXER_LETTERS:
        return recipe.mixer.flops_per_token(MIXER_LETTERS[letter], m.hidden_size)
    if letter == EXPERTS:
        return 2 * recipe.experts.active_parameters
    products = 2 * layer_parameters(recipe, letter)
    if letter != "*":
        return products
    window = min(m.attention_window or T, T)
    mean_keys = window - window * (window - 1) / (2 * T)  # the first tokens see fewer
    return products + 4 * attention_widths(recipe)[0] * mean_keys


def end_flops_per_token(recipe: Recipe, vocab_size: int) -> float:
    """Operations a token needs in the forward after the decoder's last layer: heads for further tokens, logits."""
    _, heads, in_head = layers(recipe)
    of_head = sum(n * layer_flops_per_token(recipe, letter) for letter, n in in_head.items())
    return heads * of_head + (1 + heads) * 2 * recipe.model.hidden_size * padded_vocab(recipe, vocab_size)


def forward_flops_per_token(recipe: Recipe, vocab_size: int) -> float:
    """Operations a token of a training sequence needs in the forward; what the embedding takes is not counted."""
    decoder, _, _ = layers(recipe)
    of_layers = sum(n * layer_flops_per_token(recipe, letter) for letter, n in decoder.items())
    return of_layers + end_flops_per_token(recipe, vocab_size)


def saved_numbers(recipe: Recipe, letter: str) -> dict[str, float]:
    """What a layer keeps for the backward, in numbers of the activations' size per token of a rank, by tensor.

    The fused kernels' way of a GPU. Tensor parallelism divides all but "input" and "normalised", which sequence
    parallelism divides. What an op keeps more of a sequence that its ranks share by tokens is not counted.
    """
    h, x, t = recipe.model.hidden_size, recipe.mixer, recipe.parallel.tensor
    kept: dict[str, float] = {"input": h, "normalised": h}
    if recipe.parallel.sequence:
        kept = {name: size / t for name, size in kept.items()}
    if letter == "-":
        ffn = recipe.model.ffn_hidden_size / t
        return kept | {"projected": recipe.mlp.maps_in * ffn, "activated": ffn}
    if letter == EXPERTS:
        return kept | _saved_by_experts(recipe)
    if letter == "*":
        return kept | _saved_by_attention(recipe)
    kind = MIXER_LETTERS[letter]
    sections = {s.name: s.size for s in x.projection_sections(kind)}
    inputs = {"projected": sum(sections.values())}
    if x.decay_projection == "low_rank":
        inputs |= {"decay": x.key_dim, "narrow decay": x.value_head_dim}  # the section that it is made of, copied
    inside: dict[str, float] = {
        "queries, keys, values": 2 * x.key_dim + x.value_dim,
        "erase gate": sections.get("erase", 0),
        "write gate": sections["write"],
    }
    if x.decay_projection != "low_rank":
        inside["decay"] = x.key_dim  # a copy of a part of the projection
    shared = x.num_value_heads // x.num_key_heads
    if VARIANTS[kind].write == "key_heads" and shared > 1:
        inside["write gate"] += x.num_value_heads  # once more, spread over the value heads
    carve = VARIANTS[kind].op == "carve"
    if carve and x.erase == "diagonal" and shared > 1:  # then every value head has its own copies
        inside |= {"queries, keys, values": 2 * shared * x.key_dim + x.value_dim, "erase gate": shared * x.key_dim}
        inside["decay"] = shared * x.key_dim
    by_value_head = carve and (x.erase == "diagonal" or x.content_rank > 0)
    erase_heads = x.num_value_heads if by_value_head else x.num_key_heads
    inside["inverses"] = CHUNK_TOKENS * erase_heads
    inside["states"] = x.num_value_heads * x.key_head_dim * x.value_head_dim / CHUNK_TOKENS
    if recipe.parallel.context > 1:
        # What the ranks have exchanged is another tensor than what was projected, of which the output gate is kept.
        moved = [s for s in sections if s not in ("decay", "gate", "taps")]
        taps = sections.get("taps", 0) * (recipe.parallel.context if _by_heads(recipe) else 1)
        inputs["exchanged"] = sum(sections[name] for name in moved) + x.key_dim + taps
        if recipe.model.mixer_recompute:  # begins from there
            inputs.pop("decay", None)
    if recipe.model.mixer_recompute:
        inside = {}
    low_rank_gate = {"gate": x.value_dim} if x.has_low_rank_gate else {}
    after = {**low_rank_gate, "output": x.value_dim, "normalised output": x.value_dim}
    return kept | {name: size / t for name, size in {**inputs, **inside, **after}.items()}


def _saved_by_attention(recipe: Recipe) -> dict[str, float]:
    """As saved_numbers, without the layer's input."""
    m, t = recipe.model, recipe.parallel.tensor
    queries, keys = (channels / t for channels in attention_widths(recipe))
    projected = {"projected": queries + 2 * keys}
    convolved = {} if m.attention_convolution == "none" else {"convolved": queries + 2 * keys}
    features = {"features": 3.0 * recipe.mixer.convolution_rank} if m.attention_convolution == "dynamic" else {}
    # What is sent nobody keeps but the convolution, if there is one, which keeps what it gets.
    sent = projected | features if convolved else {}
    if _attention_by_heads(recipe):
        return sent | {"exchanged": queries + 2 * keys, "attended": queries, "received": queries}
    if (reached := _attention_by_window(recipe)) is not None:
        longer = 1 + reached
        return sent | {"pieces": longer * (queries + 2 * keys), "attended": longer * queries, "received": queries}
    # Rotary positions make new queries and keys, and those that they are made of nobody keeps.
    return projected | convolved | features | {"attended": queries}


def _attention_by_heads(recipe: Recipe) -> bool:
    """Whether context-parallel ranks exchange tokens for heads of attention, instead of Transformer Engine's ways."""
    return recipe.parallel.context > 1 and (recipe.data.documents == "apart" or recipe.model.layers == "local")


def _attention_by_window(recipe: Recipe) -> float | None:
    """What the window reaches of the piece before, over a piece, where ranks send each other that; else None."""
    p, window = recipe.parallel, recipe.model.attention_window
    gathers = recipe.megatron.get("cp_comm_type", "all_gather") in ("all_gather", ["all_gather"])
    if p.context == 1 or window is None or not gathers or _attention_by_heads(recipe):
        return None
    reached = window * 2 * p.context / recipe.training.seq_length
    return reached if reached <= 1 else None


def _by_heads(recipe: Recipe) -> bool:
    """Whether context-parallel ranks share a mixer's work by heads."""
    p = recipe.parallel
    divides = recipe.mixer.num_key_heads // p.tensor % p.context == 0
    return p.context_method == "heads" or (p.context_method == "auto" and divides)


def _saved_by_experts(recipe: Recipe) -> dict[str, float]:
    """As saved_numbers, where the router sends as many tokens to each expert.

    A rank holds its part of the sequence's tokens; the ranks that an expert is divided over gather theirs.
    """
    x, t = recipe.experts, recipe.parallel.tensor
    tokens = x.top_k / t * x.tensor  # that the experts of a rank see, for each of the sequence's
    width = x.width / x.tensor
    kept = {
        "dispatched": tokens * x.seen_size,
        "projected": tokens * x.mlp.maps_in * width,
        "activated": tokens * width,
    }
    if x.latent_size is not None:
        kept["combined"] = x.latent_size / t
    if x.shared_width:
        kept |= {"shared projected": x.mlp.maps_in * x.shared_width / t, "shared activated": x.shared_width / t}
    if x.shared_gate:
        kept["shared output"] = x.hidden_size / t
    return kept


def _held(recipe: Recipe, vocab_size: int) -> list[tuple[float, float, int]]:
    """Parameters on the fullest GPU: (how many, how many of them in layers, ranks that together hold all)."""
    p = recipe.parallel
    parts = parameters(recipe, vocab_size)
    outside = sum(parts.pop(name) for name in ("embedding", "output", "final norm") if name in parts)
    decoder, heads, in_head = layers(recipe)
    number = decoder[EXPERTS] + heads * in_head[EXPERTS]
    routed = number * recipe.experts.number * recipe.experts.of_one_expert if number else 0
    in_layers = (sum(parts.values()) - routed) / p.pipeline / p.tensor
    held = [(in_layers + outside / min(p.pipeline, 2) / p.tensor, in_layers, p.tensor * p.pipeline)]
    if number:
        ranks = recipe.experts.parallel * recipe.experts.tensor * p.pipeline
        held.append((routed / ranks, routed / ranks, ranks))
    return held


def memory(recipe: Recipe, vocab_size: int, gpus: int) -> dict[str, float]:
    """Bytes on the fullest GPU, by part.

    That is one of the first pipeline stage, which keeps most micro-batches, or of the last, which has the logits.

    Args:
        gpus: all of them; data parallelism takes those that the other kinds leave.
    """
    p, t = recipe.parallel, recipe.training
    size = BYTES[t.precision]
    weights = optimizer = 0.0
    for numbers, in_layers, ranks in _held(recipe, vocab_size):
        adam = 12 if size == 2 else 8  # two moments, and of 16-bit weights a float32 copy
        state = numbers * adam
        if recipe.megatron.get("optimizer") == "muon":  # one moment, of nearly all that is in layers
            state -= in_layers * 4
        weights += numbers
        # spread over the ranks that hold the same
        optimizer += state / (gpus // ranks if p.distributed_optimizer else 1)
    found = {
        "weights": weights * size,
        "gradients": weights * 4,  # summed up in float32
        "optimizer": optimizer,
    }
    tokens = t.micro_batch_size * t.seq_length / p.context
    decoder, heads, in_head = layers(recipe)
    by_letter = {letter: sum(saved_numbers(recipe, letter).values()) for letter in (decoder + in_head)}
    replicas = gpus // (p.tensor * p.pipeline * p.context)
    waiting = min(p.pipeline, t.global_batch_size // (t.micro_batch_size * replicas))
    inputs_alone = recipe.megatron.get("recompute_granularity") == "full"
    if inputs_alone:
        kept = sum(n * saved_numbers(recipe, letter)["input"] for letter, n in decoder.items())
    else:
        kept = sum(n * by_letter[letter] for letter, n in decoder.items())
    of_one = tokens * size * kept / p.pipeline
    beside = tokens * size * heads * sum(n * by_letter[letter] for letter, n in in_head.items())
    # logits in the activations' size, and in float32, which turn into their gradient in place
    logits = tokens * padded_vocab(recipe, vocab_size) / p.tensor * (size + 4) * (1 + heads)
    first_is_fullest = p.pipeline > 1 and (waiting - 1) * of_one > beside + logits
    found["activations"] = waiting * of_one if first_is_fullest else of_one + beside
    if not first_is_fullest:
        found["logits and loss"] = logits
    if inputs_alone:  # a layer is computed again when the logits are gone
        again = tokens * size * max(by_letter.values())
        found["activations"] += max(0.0, again - found.get("logits and loss", 0.0))
    return found


def user_buffer_bytes(recipe: Recipe) -> float:
    """Of what Transformer Engine takes for tp_comm_overlap besides tensors: twelve buffers, for forward and backward of
    two pairs of projections, each of all tokens' hidden states; eight are gathered into, where fp8 takes one byte."""
    t = recipe.training
    if not recipe.megatron.get("tp_comm_overlap"):
        return 0
    tokens = t.micro_batch_size * t.seq_length / recipe.parallel.context
    gathered = 1 if recipe.megatron.get("fp8") else 2
    return tokens * recipe.model.hidden_size * (8 * gathered + 4 * 2)


def state_bytes(recipe: Recipe) -> int:
    """Of all recurrent states of one sequence, float32: what generation keeps instead of a growing cache."""
    x = recipe.mixer
    decoder, _, _ = layers(recipe)
    number = sum(n for letter, n in decoder.items() if letter in MIXER_LETTERS)
    return 4 * number * x.num_value_heads * x.key_head_dim * x.value_head_dim
