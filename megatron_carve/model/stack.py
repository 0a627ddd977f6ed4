"""Megatron's hybrid stack with the mixers' layer letters, and a final norm that need not be Transformer Engine's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import InferenceCudaGraphScope
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_carve.model.context.documents import Documents
from megatron_carve.model.requests import set_requests
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.notices import say_once


@dataclass
class MixerStackSubmodules(HybridStackSubmodules):
    """Layer specs by letter; `final_norm` None means Transformer Engine's, which Megatron builds itself."""

    mixer_layers: Mapping[str, ModuleSpec] = dataclasses.field(default_factory=dict)
    final_norm: Callable[..., Any] | None = None
    description: str | None = None
    """Said once in the log when a stack is built."""


class _LayerAtPosition:
    """Builds the layer whose letter really stands at a position, where upstream sees only 'G'."""

    def __new__(cls, config: TransformerConfig, layer_number: int, specs: dict[int, ModuleSpec], **kwargs: Any) -> Any:
        return build_module(specs[layer_number], config=config, layer_number=layer_number, **kwargs)


class MixerStack(HybridStack):
    """HybridStack that also builds the mixers' layers.

    Upstream builds layers in one chain of letters. It is handed a pattern in which our letters read 'G', and in
    the place of the 'G' layer a spec that looks up what to build by layer number.

    Raises:
        ValueError: a letter whose layer the stack's spec lacks.
    """

    input_tensor: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerStackSubmodules,
        *args: Any,
        layer_type_list: list[str] | None = None,
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        if submodules.description:
            say_once(submodules.description)
        letters = list(layer_type_list or [])
        specs = {i + 1 + pp_layer_offset: _layer_spec(letter, submodules) for i, letter in enumerate(letters)}
        at_position = ModuleSpec(module=_LayerAtPosition, params={"specs": specs})
        own_norm = submodules.final_norm is not None and post_layer_norm
        super().__init__(
            config,
            dataclasses.replace(submodules, gdn_layer=at_position),  # type: ignore[call-arg]  # a field of the base
            *args,
            layer_type_list=[Symbols.GDN if letter in MIXER_LETTERS else letter for letter in letters],
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=post_layer_norm and not own_norm,
            **kwargs,
        )
        self.layer_type_list = letters
        self.post_layer_norm = post_layer_norm
        if own_norm and self.post_process:
            assert submodules.final_norm is not None
            self.final_norm = submodules.final_norm(
                config=self.config, hidden_size=self.config.hidden_size, eps=self.config.layernorm_epsilon
            )

    def forward(
        self, hidden_states: Any, attention_mask: Any, inference_context: Any = None, rotary_pos_emb: Any = None,
        *, packed_seq_params: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As upstream; with Documents hidden_states are [rows * T, 1, hidden], between pipeline stages as Megatron
        sends them, [T, rows, hidden]."""
        if isinstance(packed_seq_params, Documents):
            if rotary_pos_emb is not None:  # of a row's positions, by whose distances alone it acts
                rotary_pos_emb = rotary_pos_emb.repeat(packed_seq_params.rows, 1, 1, 1)
            if not self.pre_process:
                self.input_tensor = self.input_tensor.view(-1, 1, self.input_tensor.shape[-1])
        if (
            inference_context is not None
            and not inference_context.is_static_batching()
            and self.config.inference_cuda_graph_scope != InferenceCudaGraphScope.layer
        ):
            set_requests(inference_context)
        out = super().forward(
            hidden_states, attention_mask, inference_context, rotary_pos_emb,
            packed_seq_params=packed_seq_params, **options,
        )  # fmt: skip
        if isinstance(packed_seq_params, Documents) and not self.post_process:
            out = out.view(-1, packed_seq_params.rows, out.shape[-1])
            out = make_viewless_tensor(out, requires_grad=out.requires_grad, keep_graph=True)  # as upstream's last line
        return out


def _layer_spec(letter: str, submodules: MixerStackSubmodules) -> ModuleSpec | type:
    spec = submodules.mixer_layers.get(letter, IdentityOp) if letter in MIXER_LETTERS else submodules.gdn_layer
    if spec is IdentityOp and (letter in MIXER_LETTERS or letter == Symbols.GDN):
        raise ValueError(f"layer letter {letter!r} is in the pattern, but this stack spec has no layer of it")
    return spec
