"""The sections of a recipe: every key, its type, its default and what it means.

Defaults are the training setup published for GDN-2's 1.3B models. The section `mixer` is config.MixerConfig.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_carve.model.config import Convolution, check_types
from megatron_carve.model.variants import MIXER_LETTERS

# Letters of a hybrid pattern; M D + are Megatron's and need Transformer Engine.
LAYER_LETTERS = "".join(MIXER_LETTERS) + "*-GMD+E"


class _Checked:
    """Checks types, then ranges, when a section is made."""

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:
        """Raise ValueError("key: expected ..., got ...") for a value out of range."""


def _at_least(section: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def _above_zero(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Model(_Checked):
    """The model apart from its mixers."""

    pattern: str
    """Layers by letter: C CARVE, 2 GDN-2, K KDA, * attention, - MLP, E experts (megatron.num_experts and moe_...),
    G Megatron's GDN; | between pipeline stages, / before multi-token-prediction heads."""
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int = 16
    attention_head_dim: int | None = None
    """hidden_size / num_attention_heads if null."""
    num_query_groups: int | None = None
    """Key-value heads of attention; as many as query heads if null."""
    attention_window: int | None = None
    """Keys that a query sees, itself included; all earlier ones if null."""
    attention_convolution: Convolution = "none"
    """Of queries, keys and values of * layers before their positions: a convolution over mixer.conv_width tokens, of
    fixed taps (static) or of mixer.convolution_rank features of the token (dynamic, arXiv 2606.03825)."""
    position_embedding: Literal["rope", "none"] = "rope"
    """Of the attention layers; recurrent layers need none."""
    rotary_base: int = 10000
    vocab_size: int | None = None
    """The tokenizer's if null; given, it must not be smaller."""
    vocab_multiple: int = 128
    """The embedding table is padded to a multiple of this, so that it stays the same at every tensor-parallel size
    that divides it."""
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """auto: Transformer Engine's layers when it is installed and a GPU is used."""
    mixer_backend: Literal["auto", "triton", "torch"] = "auto"
    mixer_recompute: bool = False
    """Compute convolution, norms and recurrence of a mixer again in the backward, from its projections: less memory,
    the same numbers."""

    def check(self) -> None:
        for stage in self.pattern.replace("|", "/").split("/"):
            if not stage:
                raise ValueError(f"pattern: expected layers on both sides of | and /, got {self.pattern!r}")
        unknown = sorted(set(self.pattern) - set(LAYER_LETTERS) - {"|", "/"})
        if unknown:
            raise ValueError(
                f"pattern: expected letters of {LAYER_LETTERS} and | /, got {', '.join(map(repr, unknown))} "
                f"in {self.pattern!r}"
            )
        _, *heads = self.pattern.split("/")
        if any("|" in head for head in heads) or len(set(heads)) > 1:
            raise ValueError(f"pattern: expected the same layers, without |, after every /, got {self.pattern!r}")
        _at_least(self, 1, "hidden_size", "ffn_hidden_size", "num_attention_heads", "attention_head_dim")
        _at_least(self, 1, "num_query_groups", "attention_window", "vocab_size", "vocab_multiple", "rotary_base")
        _above_zero(self, "norm_epsilon", "init_std")
        if self.attention_head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size={self.hidden_size} (or attention_head_dim), "
                f"got {self.num_attention_heads}"
            )
        head_dim = self.attention_head_dim or self.hidden_size // self.num_attention_heads
        if "*" in self.pattern and self.position_embedding == "rope" and head_dim % 2:
            raise ValueError(f"attention_head_dim: expected an even number with rope, got {head_dim}")
        if self.num_query_groups is not None and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups: expected a divisor of num_attention_heads={self.num_attention_heads}, "
                f"got {self.num_query_groups}"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, each letter one."""
        return len(self.pattern.split("/")[0].replace("|", ""))


@dataclass(frozen=True, kw_only=True)
class Recall(_Checked):
    """The generated associative-recall task: key-value pairs, then queries for the values."""

    num_keys: int = 32
    num_values: int = 32
    num_pairs: int = 16
    """Assignments before the queries begin."""
    num_overwrites: int = 0
    """How many of the assignments give an earlier key a new value; the last one counts."""


def data_name(given: str) -> str:
    """A short name for a file, a folder or a glob: without its folders and endings."""
    path = Path(given)
    while any(letter in path.name for letter in "*?["):  # a glob is called by the folder that it begins in
        path = path.parent
    if path.suffix.lower() in (".gz", ".gzip", ".zst", ".zstd"):
        path = path.with_suffix("")
    return path.stem or "texts"


@dataclass(frozen=True, kw_only=True)
class Data(_Checked):
    """Where tokens come from: `text`, or `indexed`, or, when neither is given, the generated recall task."""

    text: str | list[str] | None = None
    """A file, a folder, a glob, or a list of them: plain text (a file is a document), JSON lines (.jsonl, .json,
    .ndjson: an object is a document), both also as .gz or .zst, and .parquet (a row is a document)."""
    text_key: str = "text"
    """The field of a JSON object, or the column, that holds the document."""
    loss_on: Literal["text", "completion"] = "text"
    """completion, to fine-tune: lines of JSON hold a prompt and a completion, or messages for the chat template of a
    Hugging Face tokenizer; the loss is of completions, or of the assistant's messages, alone, and sequences are packed
    with whole examples."""
    validation_fraction: float = 0.05
    """The part of `text` kept for validation: documents evenly among the others, or the end of a plain text that is
    alone or of 1 MiB or more."""
    workers: int | None = None
    """Processes that tokenise `text`; as many as there are cores if null. The result is the same."""
    indexed: list[str] | None = None
    """Prepared folders, or prefixes of Megatron's indexed datasets; or weight folder weight folder ... Without weights
    each set counts by its tokens."""
    split: str = "95,5,0"
    """Training, validation and test parts of prefixes in `indexed`; prepared folders have theirs."""
    validation: str | list[str] | None = None
    """Validation data of their own, given as `text` or `indexed` is; then all of those is trained on."""
    tokenizer: str = "bytes"
    """bytes, sentencepiece:PATH, tiktoken:NAME_OR_PATH or huggingface:NAME_OR_PATH. A run keeps a copy of its files in
    its folder, from which it goes on and is used."""
    documents: Literal["joined", "apart"] = "joined"
    """What tokens see of other documents in their sequence: all that stand before, or none, with no loss for a
    document's first token."""
    cache: str | None = None
    """Folder of tokenised text; `data` in the run's folder if null. Must be shared by all nodes."""
    recall: Recall = field(default_factory=Recall)

    def check(self) -> None:
        if self.text is not None and self.indexed is not None:
            raise ValueError("text: expected either text or indexed, got both")
        if self.loss_on == "completion" and self.source == "recall":
            raise ValueError("loss_on: expected text or indexed beside completion, got neither")
        if self.validation is not None and self.source == "recall":
            raise ValueError("validation: expected text or indexed beside it, got neither")
        for name in ("text", "indexed", "validation"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: expected at least one, got an empty list")
        _at_least(self, 1, "workers")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction: expected above 0 and below 1, got {self.validation_fraction}")
        parts = self.split.split(",")
        try:
            shares = [float(p) for p in parts]
        except ValueError:
            shares = []
        if len(shares) != 3 or any(s < 0 for s in shares) or shares[0] <= 0:
            raise ValueError(f"split: expected three numbers like 95,5,0, got {self.split!r}")

    @property
    def source(self) -> Literal["text", "indexed", "recall"]:
        """Which of the three kinds of data is used."""
        return "text" if self.text is not None else "indexed" if self.indexed is not None else "recall"

    def run_name(self, recipe: str) -> str:
        """Default name of a run: the recipe's, with that of the data if some is given."""
        given = [self.text] if isinstance(self.text, str) else self.text or self.indexed or []
        names = [data_name(name) for name in given if not name.replace(".", "").isdigit()]
        if len(names) > 3:
            names[2:] = [f"{len(names) - 2}-more"]
        return "-".join([recipe, *names])


@dataclass(frozen=True, kw_only=True)
class Training(_Checked):
    """How the model is trained: AdamW, after a linear warm-up a learning rate that decays."""

    steps: int | None = None
    tokens: float | None = None
    """Instead of steps: as many whole steps as fit in so many tokens."""
    seq_length: int = 4096
    micro_batch_size: int = 1
    """Sequences per GPU and forward pass."""
    global_batch_size: int = 128
    """Sequences per step."""
    lr: float = 4e-4
    min_lr: float | None = None
    """A tenth of lr if null."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up; wsd (warm-up, stable, decay) stays at lr and comes down at the end."""
    decay_fraction: float = 0.1
    """Part of all steps, the last ones, in which wsd comes down to min_lr, linearly."""
    warmup_fraction: float = 0.01
    """Part of all steps."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and activations in the forward and backward pass; optimizer, decay and states are float32."""
    seed: int = 1234
    eval_interval: int = 1000
    """Steps between evaluations."""
    eval_iters: int = 10
    """Batches per evaluation, the same ones every time."""

    def check(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            found = "neither" if self.steps is None else "both (set one of them to null)"
            raise ValueError(f"steps: expected exactly one of steps and tokens, got {found}")
        _at_least(self, 1, "steps", "seq_length", "micro_batch_size", "global_batch_size", "eval_interval")
        _at_least(self, 1, "eval_iters")
        _at_least(self, 0, "weight_decay", "clip_grad", "min_lr")
        if not 0 < self.seed < 2**32:
            raise ValueError(f"seed: expected above 0 and below 2**32, got {self.seed}")
        _above_zero(self, "lr", "adam_eps", "tokens")
        for name in ("adam_beta1", "adam_beta2", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: expected above 0 and at most 1, got {self.decay_fraction}")
        if self.lr_schedule == "wsd" and self.decay_fraction + self.warmup_fraction > 1:
            raise ValueError(
                f"decay_fraction: expected at most 1 - warmup_fraction = {1 - self.warmup_fraction:g}, got "
                f"{self.decay_fraction}"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr: expected at most lr={self.lr}, got {self.min_lr}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: expected a multiple of micro_batch_size={self.micro_batch_size}, "
                f"got {self.global_batch_size}"
            )
        if self.total_steps < 1:
            raise ValueError(f"tokens: expected at least one step of {self.tokens_per_step}, got {self.tokens}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.seq_length * self.global_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return int(self.tokens // self.tokens_per_step)

    @property
    def final_lr(self) -> float:
        """Learning rate at the end."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True, kw_only=True)
class Parallel(_Checked):
    """How the model is spread; data parallelism takes the remaining processes."""

    tensor: int = 1
    sequence: bool = True
    """Sequence parallelism among tensor-parallel ranks; no effect at tensor = 1."""
    pipeline: int = 1
    context: int = 1
    """Ranks over which the tokens of a sequence are spread; 2 * context divides training.seq_length. With
    model.layers: local or data.documents: apart, tensor * context divides attention's query groups."""
    context_method: Literal["auto", "heads", "sequence"] = "auto"
    """How these ranks share a mixer's work. heads: each computes a part of the heads for all tokens; context divides
    the key heads of a tensor-parallel rank. sequence: each computes all heads for its part of the tokens, from the
    state of the rank before; CARVE's ranks wait for each other. auto: heads where they divide."""
    distributed_optimizer: bool = True
    """Optimizer state spread over data-parallel ranks."""
    overlap: bool = True
    """Gradient reduction and parameter gathering overlap with computation (with the distributed optimizer)."""

    def check(self) -> None:
        _at_least(self, 1, "tensor", "pipeline", "context")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(_Checked):
    """Saving and resuming. A run whose folder holds a checkpoint resumes from it."""

    interval: int | None = 1000
    """Steps between checkpoints; null saves none, not even at the end."""
    keep: int | None = None
    """How many of the newest checkpoints stay; all if null."""
    keep_every: int | None = None
    """With `keep`: those at multiples of this step stay too."""
    keep_best: bool = False
    """With `keep`: of those at whose step an evaluation was made, the one with the least loss stays too."""
    load: str | None = None
    """Folder of another run to continue, when this run has no checkpoint yet: weights, optimizer, step and data."""
    weights_only: bool = False
    """Take only the weights from `load`; step, optimizer and data begin anew."""

    def check(self) -> None:
        _at_least(self, 1, "interval", "keep", "keep_every")
        if self.keep is None and (self.keep_every is not None or self.keep_best):
            raise ValueError("keep: expected a number beside keep_every or keep_best, got null, which keeps all")
        if self.weights_only and self.load is None:
            raise ValueError("weights_only: expected load to name a run, got null")


@dataclass(frozen=True, kw_only=True)
class Run(_Checked):
    """Where a run lives and what it prints."""

    folder: str = "runs"
    """Runs are kept in folder/name: recipe, checkpoints, TensorBoard, logs, metrics, loss curve."""
    name: str | None = None
    """The recipe's name, with the text file's if one is given."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    log_interval: int = 10
    """Steps between progress lines."""
    sample_prompts: list[str] = field(default_factory=list)
    """Texts to continue at every evaluation; what comes is printed, and kept in the run's samples.jsonl."""
    sample_tokens: int = 64
    """New tokens of each."""
    evaluate: str | None = None
    """What else to measure at every evaluation, as options of the program evaluate: --tasks NAME,NAME --limit N and
    so on. Kept in the run's evaluations.jsonl. Like samples the work of one process, which holds the whole model."""
    wandb: str | None = None
    """A project of Weights & Biases, which gets what TensorBoard gets; as entity/project for another entity."""
    megatron_output: Literal["file", "console"] = "file"
    """Where Megatron's own prints go: one file per rank in the run's logs, or the console."""

    def check(self) -> None:
        _at_least(self, 1, "log_interval", "sample_tokens")
        if self.wandb is not None and not re.fullmatch("[^/]+(/[^/]+)?", self.wandb):
            raise ValueError(f"wandb: expected project or entity/project, got {self.wandb!r}")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name: expected a file name without separators, got {self.name!r}")

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.name is not None, "a loaded recipe has a name"
        return Path(self.folder) / self.name
