"""What Megatron's pretrain() asks of a program: the model's configuration, batches, the loss, datasets."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    param_is_not_tensor_parallel_duplicate,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args, hybrid_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_carve.data.blend import Blend
from megatron_carve.data.datasets import SameSamples, build_gpt_datasets
from megatron_carve.data.packing import PackedExamples
from megatron_carve.data.recall import RecallDataset
from megatron_carve.model.config import LayerImplementation, MixerConfig, MixerFields
from megatron_carve.model.context.documents import Documents
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.recipe import Recipe
from megatron_carve.run.progress import LOSS, accuracy_name
from megatron_carve.specs import stack_spec

# Letters of layers that have attention heads.
ATTENTION_LETTERS = frozenset("*D+")
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass
class MixerTransformerConfig(TransformerConfig, MixerFields):
    """Megatron's configuration with the mixers' options, which every layer of the model can then see."""


@dataclass(frozen=True)
class Task:
    """The data of a run, and what a step does with it."""

    recipe: Recipe
    vocab_size: int
    eod: int
    blend: Blend | None = None
    """None for the generated task."""

    @property
    def apart(self) -> bool:
        """Whether documents of a sequence do not see each other."""
        return self.recipe.data.documents == "apart"

    def datasets(self, num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """(train, validation, test) for this rank, as pretrain() asks for them."""
        args = get_args()
        # Every evaluation sees the same samples. Megatron goes through one long dataset instead, and after loading a
        # checkpoint goes on where it was.
        args.consumed_valid_samples = 0
        for_training, for_validation = num_samples[:2]
        once = min(args.eval_iters * getattr(args, "eval_global_batch_size", args.global_batch_size), for_validation)
        train, validation = self.splits(for_training, once, args.data_cache_path, vp_stage)
        return train, None if validation is None else SameSamples(validation, once, for_validation), None

    def splits(
        self, for_training: int, for_validation: int, cache: str | None, vp_stage: int | None = None, *,
        everywhere: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """(train, validation) of so many samples.

        Args:
            cache: where Megatron keeps its index of them.
            everywhere: also on ranks that `next_batch` reads nothing on, which get None otherwise.
        """

        def reads() -> bool:
            return everywhere or _reads_data(vp_stage, documents=self.apart)

        recipe, seed = self.recipe, self.recipe.training.seed
        if recipe.data.source == "recall":
            sizes = dataclasses.asdict(recipe.data.recall)
            train, validation = (
                RecallDataset(seq_length=recipe.training.seq_length, num_samples=count, seed=seed, split=split, **sizes)
                for split, count in (("train", for_training), ("validation", for_validation))
            )
            return train, validation
        assert self.blend is not None
        if self.blend.examples:
            return self._packed(for_training, for_validation, reads())
        return build_gpt_datasets(
            self.blend,
            num_samples=(for_training, for_validation),
            seq_length=recipe.training.seq_length,
            seed=seed,
            eod=self.eod,
            vocab_size=self.vocab_size,
            cache_path=cache,
            is_built_on_rank=reads,
            documents_apart=self.apart,
        )

    def _packed(self, for_training: int, for_validation: int, reads: bool) -> tuple[Any, Any]:
        blend, training = self.blend, self.recipe.training
        if blend is None or not reads:
            return None, None
        train, validation = (
            PackedExamples(
                [part.prefix for part in parts],
                seq_length=training.seq_length,
                num_samples=count,
                seed=training.seed,
                eod=self.eod,
                split=split,
                documents_apart=self.apart,
            )
            for parts, count, split in (
                (blend.train, for_training, "train"),
                (blend.validation, for_validation, "validation"),
            )
        )
        return train, validation

    def forward_step(self, data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Callable]:
        """One micro-batch: the model's output and the function that makes a loss of it.

        While evaluating, the model returns logits instead of losses, so that accuracy is measured too.
        """
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = next_batch(data_iterator, vp_stage, documents=self.apart)
        evaluating = not model.training
        output = model(
            batch["tokens"], batch["position_ids"], None,
            labels=None if evaluating else batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=batch.get("documents"),
        )  # fmt: skip
        if evaluating:
            return output, partial(self._evaluate, batch["labels"], batch["loss_mask"])
        return output, partial(_training_loss, batch["loss_mask"])

    def _evaluate(self, labels: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss and accuracy from vocabulary-parallel logits [B, T, V/tp]."""
        right = right_predictions(logits, labels)
        losses = vocab_parallel_cross_entropy(logits.float().transpose(0, 1).contiguous(), labels.t().contiguous())
        loss, count, report = _training_loss(mask, losses.t())
        right_sum = (right.view(-1) * mask.view(-1)).sum()
        return loss, count, {**report, accuracy_name(self.recipe): torch.stack([right_sum, count.float()])}


def model_config(args: Any, recipe: Recipe, layers: LayerImplementation) -> Any:
    """Megatron's HybridModelConfig for its validated arguments and our recipe."""
    transformer = transformer_config(args, recipe, MixerTransformerConfig)
    config = hybrid_config_from_args(args, config=transformer)
    config.hybrid_stack_spec = stack_spec(layers, attention_convolution=recipe.model.attention_convolution)
    return config


def transformer_config[T](args: Any, recipe: Recipe, kind: type[T]) -> T:
    """A configuration of class `kind`, which has MixerFields, for Megatron's validated arguments and our recipe."""
    # Attributes of the arguments are stored in Megatron's checkpoints.
    args.mixer = recipe.mixer.options
    args.mixer_backend = recipe.model.mixer_backend
    args.mixer_recompute = recipe.model.mixer_recompute
    args.mixer_context = recipe.parallel.context_method
    args.attention_convolution = recipe.model.attention_convolution
    # Beside weights it would keep only the bits that they lack of a float32 copy, which Megatron's checkpoints that can
    # be resharded, and any other optimizer, take for the copy.
    args.store_param_remainders = False
    if not set(recipe.model.pattern) & ATTENTION_LETTERS:
        # Megatron asks for heads that the tensor-parallel size divides, also where no layer has any. The arguments stay
        # as they are: a checkpoint's are compared with them.
        args = argparse.Namespace(**vars(args))
        args.num_attention_heads *= args.tensor_model_parallel_size
        args.num_query_groups, args.group_query_attention = None, False
    return core_transformer_config_from_args(args, kind)


def count_parameters(models: list[torch.nn.Module]) -> int:
    """Parameters of the whole model, from this rank's parts of it; every rank calls this together."""
    of_experts = parallel_state.get_expert_tensor_parallel_group()
    mine = [0, 0]  # experts that are spread over ranks count over those
    for p in (p for model in models for p in model.parameters()):
        if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, expert_tp_group=of_experts):
            mine[not getattr(p, "allreduce", True)] += p.numel()
    groups = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    total = 0
    for number, group in zip(mine, groups, strict=True):
        of_all = torch.tensor(number, dtype=torch.int64, device="cuda")
        torch.distributed.all_reduce(of_all, group=group)
        total += int(of_all)
    return total


def next_batch(data_iterator: Iterator, vp_stage: int | None, *, documents: bool = False) -> dict[str, Any]:
    """This rank's part of the next micro-batch; None where a pipeline stage needs nothing.

    With documents it is one row, [1, B * T], and "documents" says where they lie.
    """
    args = get_args()
    if not documents and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        if int(sample["tokens"].max()) >= args.vocab_size:  # on the CPU still, so this waits for nothing
            raise ValueError(
                f"data: token id {int(sample['tokens'].max())} is outside the vocabulary of {args.vocab_size}"
            )
        if documents:
            starts = sample["cu_seqlens"]
            most = int((starts < args.seq_length).sum(1).max())
            sample = {**sample, "cu_seqlens": starts[:, :most].contiguous()}
        keys = (*BATCH_KEYS, *(("cu_seqlens", "max_seqlen") if documents else ()))
        batch = {key: sample[key].cuda(non_blocking=True) for key in keys} | {"cu_seqlens_padded": None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(mtp_num_layers=args.mtp_num_layers, vp_stage=vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group(), use_per_sequence_balancing=True
    )
    mine = {key: batch.get(key) for key in BATCH_KEYS}
    if not documents:
        return mine
    rows = {key: None if x is None else x.reshape(1, -1) for key, x in mine.items()}
    return {**rows, "documents": Documents.of_rows(batch["cu_seqlens"], args.seq_length)}


def right_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the label has the largest logit, [B, T]; logits [B, T, V/tp] are spread over the vocabulary."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = logits.shape[-1]
    largest, place = logits.max(-1)
    first = place + parallel_state.get_tensor_model_parallel_rank() * size
    overall = largest.clone()
    torch.distributed.all_reduce(overall, torch.distributed.ReduceOp.MAX, group=group)
    # Of equal logits the first counts, so that a model that says the same of every token is not right about all.
    first = torch.where(largest == overall, first, torch.full_like(first, torch.iinfo(first.dtype).max))
    torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN, group=group)
    return (first == labels).float()


def layer_flops(args: Any, letter: str) -> float:
    """Forward floating-point operations per token of one layer that Megatron does not count, from its arguments: all of
    a mixer's, and of attention those of its convolution."""
    sizes = MixerConfig(
        num_key_heads=args.linear_num_key_heads,
        num_value_heads=args.linear_num_value_heads,
        key_head_dim=args.linear_key_head_dim,
        value_head_dim=args.linear_value_head_dim,
        conv_width=args.linear_conv_kernel_dim,
        **args.mixer,
    )
    if letter in MIXER_LETTERS:
        return sizes.flops_per_token(MIXER_LETTERS[letter], args.hidden_size)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    channels = (args.num_attention_heads + 2 * groups) * args.kv_channels
    return 2 * sizes.attention_convolution_parameters(args.attention_convolution, channels, args.hidden_size)


def _training_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of losses, number of tokens, report), Megatron's convention; Megatron divides."""
    mask = mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    count = mask.sum()
    return loss, count.to(torch.int), {LOSS: torch.stack([loss.detach(), count])}


def _reads_data(vp_stage: int | None, *, documents: bool) -> bool:
    """Whether this rank does; of documents every pipeline stage must know where they lie."""
    needs = documents or is_first_or_last_pipeline_stage(vp_stage)
    return parallel_state.get_tensor_model_parallel_rank() == 0 and needs
