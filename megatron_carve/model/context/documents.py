"""Documents one after another in the rows of a batch, kept apart, as the layers of a stack see them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """The documents of a batch [rows, T], which the model takes as one row of rows * T tokens, row after row.

    Of each row a context-parallel rank has its two pieces, as of rows that are not packed. Megatron's layers do not
    know this form of its packed sequences: a stack may hold ours and attention, MLP and MoE layers.

    Attributes:
        cu_seqlens_q: [N + 1] int32, boundaries in the tokens of all ranks, among them those of rows. Documents without
            tokens do no harm.
        rows, tokens: of the batch, on all ranks.
    """

    rows: int = 1
    tokens: int = 0
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_rows(cls, starts: Tensor, tokens: int) -> Documents:
        """From the first tokens of each row's documents, [rows, n] int32; rows with fewer are filled up with T."""
        rows = starts.shape[0]
        before = torch.arange(rows, dtype=torch.int32, device=starts.device)[:, None] * tokens
        end = torch.full((1,), rows * tokens, dtype=torch.int32, device=starts.device)
        boundaries = torch.cat([(starts + before).flatten(), end])
        return cls(
            qkv_format="rows of documents", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries,
            max_seqlen_q=tokens, max_seqlen_kv=tokens, rows=rows, tokens=tokens,
        )  # fmt: skip

    def packed(self) -> PackedSeqParams:
        """Megatron's packed sequences, for a layer that sees the tokens of all ranks."""
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=self.cu_seqlens_q, cu_seqlens_kv=self.cu_seqlens_q,
            max_seqlen_q=self.tokens, max_seqlen_kv=self.tokens,
        )  # fmt: skip

    def mask(self, window: int | None) -> Tensor:
        """Where a token sees another: of its document, not after it, among the newest `window`; [rows, 1, T, T]."""
        if window not in self._masks:  # the layers of a step share it
            position = torch.arange(self.rows * self.tokens, dtype=torch.int32, device=self.cu_seqlens_q.device)
            document = torch.searchsorted(self.cu_seqlens_q, position, right=True).view(self.rows, 1, self.tokens)
            row = position[: self.tokens]
            distance = row[:, None] - row[None, :]
            near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            self._masks[window] = near & (document[..., :, None] == document[..., None, :])
        return self._masks[window]
