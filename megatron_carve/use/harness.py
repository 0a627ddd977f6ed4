"""A trained model as a language model of lm-evaluation-harness (the package lm-eval, 0.4)."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_carve.data.tokenizer import Tokenizer
    from megatron_carve.use.trained import Trained

# New tokens of a task that does not say how many it wants.
MOST_NEW_TOKENS = 256


@functools.cache
def _tasks(include_path: str | None) -> Any:
    """The harness's TaskManager, which reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def require_tasks(names: Sequence[str], include_path: str | None = None) -> Any:
    """The harness's TaskManager, which knows these tasks.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task that it does not know.
    """
    try:
        manager = _tasks(include_path)
    except ImportError as error:
        remedy = 'run: pip install "megatron-carve[evaluate]"'
        raise ImportError(f"--tasks: {', '.join(names)} need lm-evaluation-harness ({error}); {remedy}") from error
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--tasks: there is no task {name!r} here or in lm-evaluation-harness{hint}")
    return manager


def evaluate(
    trained: Trained, names: Sequence[str], batch: int = 1, limit: int | None = None, include_path: str | None = None
) -> dict[str, dict[str, Any]]:
    """Metrics of tasks by name, as the harness reports them.

    Args:
        trained: a model of text.
        names: tasks of the harness; its own settings (few-shot examples, metrics) count.
        batch: texts at a time.
        limit: examples of each task; None for all.
        include_path: folder of further tasks.

    Raises:
        ImportError, ValueError: see require_tasks; whatever a task raises whose data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate

    manager = require_tasks(names, include_path)
    found = simple_evaluate(
        language_model(trained, batch), tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0,
        log_samples=False,
    )  # fmt: skip
    return {task: dict(metrics) for task, metrics in found["results"].items()}


def language_model(trained: Trained, batch: int = 1) -> Any:
    """An lm_eval.api.model.LM of a trained model of text, which takes `batch` texts at a time."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    assert trained.tokenizer is not None
    tokenizer: Tokenizer = trained.tokenizer

    class TrainedLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """The harness's, but for contexts without a token and continuations that a tokenizer joins to the last
            token of the context: then what is scored begins where the two ways of writing them part."""
            context_ids, continuation_ids = super()._encode_pair(context, continuation)
            if not continuation_ids:
                whole = self.tok_encode(context + continuation)
                pairs = enumerate(zip(whole, context_ids, strict=False))
                same = next((i for i, (ours, theirs) in pairs if ours != theirs), len(whole))
                context_ids, continuation_ids = whole[:same], whole[same:]
            return context_ids or [self.prefix_token_id], continuation_ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return score(trained, pairs, batch)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            length = trained.recipe.training.seq_length
            totals = []
            for (text,) in (request.args for request in requests):
                ids = self.tok_encode(text)
                pairs = [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(ids, self.prefix_token_id, length, 1)
                ]
                totals.append(sum(value for value, _ in score(trained, pairs, batch)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for options, group in itertools.groupby((r.args for r in requests), key=lambda args: args[1]):
                contexts = [context for context, _ in group]
                for some in (contexts[i : i + batch] for i in range(0, len(contexts), batch)):
                    texts += continue_until(trained, some, dict(options))
            return texts

    return TrainedLM()


@torch.no_grad()
def score(trained: Trained, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 1) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether it is what greedy decoding gives) of (context, continuation) pairs.

    Texts of a batch are filled up at their ends, which no earlier token sees. The logits of all their tokens are in
    memory at once.
    """
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                f"pairs: expected a token at least of context and continuation, got {context, continuation}"
            )
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]]) for i in chosen]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, :-1].to(trained.device)
        positions = torch.arange(tokens.shape[1], device=trained.device).expand(tokens.shape[0], -1)
        logits: Tensor = trained.model(tokens.contiguous(), positions, None)
        for row, i in enumerate(chosen):
            context, continuation = pairs[i]
            first = len(context) - 1
            mine = logits[row, first : first + len(continuation), : trained.vocab_size].float()
            wanted = torch.tensor(continuation, device=mine.device)
            values = mine.log_softmax(-1).gather(-1, wanted[:, None])
            found[i] = values.double().sum().item(), bool((mine.argmax(-1) == wanted).all())
    return found


def continue_until(trained: Trained, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Continuations of texts up to the first of options["until"], by the harness's names for the rest."""
    from lm_eval.models.utils import normalize_gen_kwargs

    from megatron_carve.use.continuation import Continuation
    from megatron_carve.use.generation import Sampling, generate

    tokenizer = trained.tokenizer
    assert tokenizer is not None
    chosen: dict[str, Any] = dict(normalize_gen_kwargs(options, default_max_gen_toks=MOST_NEW_TOKENS))
    found = [Continuation(tokenizer, chosen["until"]) for _ in contexts]
    if chosen["max_gen_toks"] < 1:
        return ["" for _ in contexts]
    sampling = Sampling(temperature=0.0)
    if chosen["do_sample"]:
        temperature = float(chosen.get("temperature", 1.0))
        sampling = Sampling(temperature=temperature, top_k=chosen.get("top_k") or None, top_p=chosen.get("top_p"))
    for tokens in generate(
        trained.model, [torch.tensor(tokenizer.encode(text).tolist() or [tokenizer.eod]) for text in contexts],
        max_new_tokens=chosen["max_gen_toks"], sampling=sampling, vocab_size=trained.vocab_size,
    ):  # fmt: skip
        for continuation, token in zip(found, tokens.tolist(), strict=True):
            continuation.add(token)
        if all(continuation.ended for continuation in found):
            break
    return [continuation.finish() for continuation in found]
