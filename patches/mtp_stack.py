"""Let multi-token-prediction heads contain our layers."""

from megatron_carve.patches.patch import Patch, Replacement


def mtp_stack(stack: type) -> Patch:
    """A patch that makes multi-token prediction build `stack`, a HybridStack subclass, from the pattern after '/'."""
    return Patch(
        name="mtp_stack",
        reason="the multi-token-prediction layer imports HybridStack by name instead of taking it from the spec",
        upstream="megatron/core/transformer/multi_token_prediction.py, MultiTokenPredictionLayer.__init__",
        remove_when="the prediction layer builds the stack class of the model's spec",
        replacements=[Replacement("megatron.core.models.hybrid.hybrid_block:HybridStack", lambda _: stack)],
    )
