"""Megatron's GPT datasets of a blend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_carve.data.blend import Blend, Part, index_fingerprint


@dataclass(frozen=True)
class GPTDatasetTokenizer:
    """The part of a tokenizer that Megatron's GPTDataset reads; its data are token ids already.

    Attributes:
        eod: end-of-document id.
        vocab_size: number of ids.
        data: a fingerprint of the data where files of the same name may come to hold others.
        pad: -1, an id no data holds. Megatron fills an incomplete last sample with it and masks those labels; any real
            id would mask that id wherever it occurs.
    """

    eod: int
    vocab_size: int
    data: str = ""
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, int | str]:
        """What Megatron hashes into the names of its cached sample indices."""
        return {"class": type(self).__name__, "eod": self.eod, "vocab_size": self.vocab_size, "data": self.data}


class SameSamples:
    """A validation dataset, map-style, whose samples are the first ones of another, again and again.

    Args:
        source: the other one.
        count: of its samples, at least one.
        length: samples of this one.
    """

    def __init__(self, source: Any, count: int, length: int) -> None:
        from megatron.core.datasets.utils import Split

        self.split = Split.valid  # by which Megatron knows its batch sizes
        self.source, self.count, self.length = source, count, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.source[index % self.count]


def build_gpt_datasets(
    blend: Blend,
    *,
    num_samples: tuple[int, int],
    seq_length: int,
    seed: int,
    eod: int,
    vocab_size: int,
    cache_path: str | None,
    is_built_on_rank: Callable[[], bool],
    documents_apart: bool = False,
) -> tuple[Any, Any]:
    """Megatron's (train, validation) GPT datasets; every rank calls this together.

    Args:
        blend: what they are drawn from.
        num_samples: samples wanted of each; the data are repeated as often as that takes.
        seq_length: tokens per sample.
        seed: order of documents and samples.
        eod, vocab_size: of the tokenizer that made the data.
        cache_path: directory for Megatron's sample indices, or None for one beside the data.
        is_built_on_rank: whether this rank reads data.
        documents_apart: give each sample, beside its tokens, cu_seqlens: [seq_length + 1] int32, the first tokens of
            its documents, filled up with seq_length; no loss for the token after a document, where the data end
            documents with eod.

    Returns:
        The datasets, or None where there is no validation set, or on ranks that read no data.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    given: dict[str, Any]
    if blend.split is not None:
        given = {"blend": _as_megatron(blend.train), "split": blend.split}
    else:
        given = {"blend_per_split": [_as_megatron(blend.train), _as_megatron(blend.validation), None]}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        path_to_cache=cache_path,
        tokenizer=GPTDatasetTokenizer(eod, vocab_size, data=index_fingerprint(blend.prefixes)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=documents_apart,
        inter_document_masking=documents_apart,
        create_attention_mask=False,
        **given,
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [*num_samples, 0], is_built_on_rank, config
    ).build()
    return train, validation


def _as_megatron(parts: tuple[Part, ...]) -> tuple[list[str], list[float] | None] | None:
    if not parts:
        return None
    weights = [part.weight for part in parts] if len(parts) > 1 else None
    return [part.prefix for part in parts], weights
