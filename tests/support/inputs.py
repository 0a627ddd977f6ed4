"""Random inputs for the ops, and one call that returns every output and every gradient by name."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# What the tests of all ops go through: GDN-2, the two predictions of CARVE's diagonal form, its delta form.
FORMS: dict[str, dict[str, Any]] = {
    "gdn2": {},
    "previous": {"erase": "diagonal", "prediction": "previous"},
    "decayed": {"erase": "diagonal", "prediction": "decayed"},
    "delta": {"erase": "delta"},
}
FLOATS = ("o", "S", "mean", "partial")
RECURRENCE_TENSORS = ("q", "k", "v", "g", "b", "erase_logits", "w")


@dataclass(frozen=True)
class OpInputs:
    """One call of an op.

    Attributes:
        op: "gdn2" or "carve".
        tensors: the op's positional tensors by argument name, in order; None for content that is not there.
        named: tensors that it takes by name, such as erase_bias.
        state: parts of the initial state by name ("count" is int64), empty for none.
        options: the keyword arguments besides those and the state.
    """

    op: str
    tensors: dict[str, Any]
    state: dict[str, Tensor]
    options: dict[str, Any]
    named: dict[str, Tensor] = field(default_factory=dict)

    def map_floats(self, change: Callable[[Tensor], Tensor]) -> "OpInputs":
        """Apply `change` to every floating tensor."""
        tensors = {name: x if x is None else change(x) for name, x in self.tensors.items()}
        named = {name: change(x) for name, x in self.named.items()}
        state = {name: change(x) if x.is_floating_point() else x for name, x in self.state.items()}
        return replace(self, tensors=tensors, named=named, state=state)

    def to(self, device: str) -> "OpInputs":
        """Move every tensor of the call."""
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        moved = replace(self, state={name: x.to(device) for name, x in self.state.items()}, options=options)
        return moved.map_floats(lambda x: x.to(device))

    def with_tensors(self, **tensors: Any) -> "OpInputs":
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> "OpInputs":
        return replace(self, options={**self.options, **options})

    def with_state(self, state: Any) -> "OpInputs":
        """Continue from what an op returned as final state."""
        parts = {"S": state} if self.op == "gdn2" else state._asdict()
        return replace(self, state=parts)

    def without_content(self) -> "OpInputs":
        return self.with_tensors(content_down=None, content_up=None)

    def tokens(self, start: int, end: int, row: int | None = None) -> "OpInputs":
        """Tokens start to end of every sequence, or of batch entry `row` alone; the state stays whole."""
        rows = slice(None) if row is None else slice(row, row + 1)
        cut = {name: x[rows, start:end] for name, x in self.tensors.items() if name in RECURRENCE_TENSORS}
        return self.with_tensors(**cut)

    def call(self, op: Callable[..., Any], state_type: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Call `op`; a CARVE state is passed as `state_type(S, mean, partial, count)`."""
        state: Any = None
        if self.state and self.op == "gdn2":
            state = self.state["S"]
        elif self.state:
            state = (state_type or _as_tuple)(*(self.state[name] for name in ("S", "mean", "partial", "count")))
        return op(*self.tensors.values(), initial_state=state, **{**self.named, **self.options, **options})


def make_inputs(
    form: str,
    *,
    B: int = 2,
    T: int = 65,
    H: int = 2,
    HV: int | None = None,
    K: int = 8,
    V: int = 8,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    gate_dtype: torch.dtype | None = None,
    decay: str = "ordinary",
    erase: str = "ordinary",
    zero_keys: bool = False,
    short_b: bool = False,
    short_w: bool = True,
    rank: int = 3,
    content_heads: bool = False,
    content_chunk: int = 64,
    content_grad: str = "full",
    initial_state: bool = False,
    counts: list[int] | None = None,
    seed: int = 0,
) -> OpInputs:
    """Draw one call's inputs.

    Args:
        form: of FORMS.
        lengths: packed sequences (then B is 1 and T their sum); None for B sequences of T tokens.
        dtype: of q, k, v; gate_dtype of the other tensors, dtype if None.
        decay: "ordinary" (log-decay in (-0.5, 0)), "none" (0), "steep" (0, -0.01 and -1000 mixed), "brisk" (in (-3.4,
            -2.4), below 2^-180 over 64 steps and not over 32), "uneven" (brisk, steep from token 10 to 20) or "by
            chunk" (of four: ordinary, brisk, ordinary and steep at its end, and below 2^-180 within its second half).
        erase: "ordinary", or "extreme": b of exactly 0, 1 (and 2 for GDN-2); for the diagonal form, which forgets as
            much, b of about a tenth, "strong" of about a half.
        zero_keys: set about a third of the keys to zero.
        short_b, short_w: GDN-2's b as [B, T, H], w as [B, T, HV].
        content_heads: D and U of CARVE for every value head instead of one for all.
        initial_state: draw one; counts: tokens in each row's running content chunk, zeros if None.
    """
    generator = torch.Generator().manual_seed(seed)
    HV = H if HV is None else HV
    B, T = (B, T) if lengths is None else (1, sum(lengths))
    rows = B if lengths is None else len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    if zero_keys:
        k = k * (uniform(B, T, H, 1) > 0.33)
    tensors = {"q": q, "k": k, "v": normal(B, T, HV, V), "g": _log_decay(decay, uniform(B, T, H, K))}
    options: dict[str, Any] = dict(FORMS[form])
    named: dict[str, Tensor] = {}
    op = "gdn2" if form == "gdn2" else "carve"
    if op == "gdn2":
        b = uniform(B, T, H) if short_b else uniform(B, T, H, K)
        tensors["b"] = (3 * b).floor() if erase == "extreme" else b
        tensors["w"] = uniform(B, T, HV) if short_w else uniform(B, T, HV, V)
    else:
        logits = normal(B, T, H, K) - (3 if options["erase"] == "diagonal" and erase == "ordinary" else 0)
        tensors["erase_logits"] = 1000 * logits.sign() if erase == "extreme" else logits
        tensors["w"] = uniform(B, T, HV)
        # large enough that the content term moves the gate: m is of order 0.3
        heads = (HV,) if content_heads else ()
        tensors["content_down"] = normal(*heads, rank, V)
        tensors["content_up"] = normal(*heads, K, rank)
        named["erase_bias"] = 0.5 * normal(H, K)
        options |= {"content_chunk": content_chunk, "content_grad": content_grad}
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    gate_dtype = dtype if gate_dtype is None else gate_dtype
    tensors = {name: x.to(dtype if name in ("q", "k", "v") else gate_dtype) for name, x in tensors.items()}
    state = {}
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    named = {name: x.to(state_dtype) for name, x in named.items()}
    if initial_state or counts is not None:
        state = {"S": normal(rows, HV, K, V).to(state_dtype)}
        if op == "carve":
            counts = [0] * rows if counts is None else counts
            running = torch.tensor(counts)[:, None, None]
            state["mean"] = (0.2 * normal(rows, HV, V)).to(state_dtype)
            state["partial"] = (0.2 * running * normal(rows, HV, V)).to(state_dtype)
            state["count"] = torch.tensor(counts)
    return OpInputs(op, tensors, state, options, named)


def run_with_grads(
    op: Callable[..., Any], inputs: OpInputs, state_type: Callable[..., Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Run an op and its backward under a fixed random loss over all float outputs.

    Returns:
        "o", "S" (and "mean", "partial", "count") and "grad_<name>" for every float input; None where there is none.
    """
    leaves = inputs.map_floats(lambda x: x.detach().clone().requires_grad_())
    outputs = named_outputs(leaves.call(op, state_type, **options))
    random_loss(outputs).backward()
    results: dict[str, Any] = {name: x.detach() for name, x in outputs.items()}
    for name, leaf in {**leaves.tensors, **leaves.named, **leaves.state}.items():
        if leaf is not None and leaf.is_floating_point():
            results[f"grad_{name}"] = leaf.grad
    return results


def named_outputs(returned: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """What an op returned, by name: "o", "S", for CARVE also "mean", "partial", "count"; no state, no parts."""
    o, state = returned
    if state is None:
        return {"o": o}
    parts = {"S": state} if isinstance(state, Tensor) else state._asdict()
    return {"o": o} | {name: x if isinstance(x, Tensor) else torch.tensor(x) for name, x in parts.items()}


def random_loss(outputs: dict[str, Tensor]) -> Tensor:
    """A fixed random weighting of all float outputs; the weights are exact in bfloat16, alike for every dtype."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=outputs["o"].device)
    for name, x in outputs.items():
        if name in FLOATS:
            weight = torch.randn(x.shape, generator=generator).bfloat16().double().to(loss.device)
            loss = loss + (x.double() * weight).sum()
    return loss


def in_float64(inputs: OpInputs) -> OpInputs:
    """The same values in float64, for the oracle."""
    return inputs.map_floats(Tensor.double)


def _log_decay(kind: str, uniform: Tensor) -> Tensor:
    if kind == "none":
        return torch.zeros_like(uniform)
    if kind == "steep":
        return torch.tensor([0.0, -0.01, -1000.0], dtype=torch.float64)[(3 * uniform).long()]
    if kind == "brisk":
        return -2.4 - uniform
    if kind == "uneven":
        steep, brisk = _log_decay("steep", uniform), _log_decay("brisk", uniform)
        return torch.cat([brisk[:, :10], steep[:, 10:20], brisk[:, 20:]], 1)
    if kind == "by chunk":
        t = torch.arange(uniform.shape[1])[:, None, None] % 256
        steep = torch.where((t >= 180) & (t < 192), _log_decay("steep", uniform), -0.5 * uniform)
        brisk = _log_decay("brisk", uniform) - 1.8 * (t // 64 == 3)
        return torch.where(t // 64 % 2 == 1, brisk, steep)
    return -0.5 * uniform


def _as_tuple(*parts: Tensor) -> tuple[Tensor, ...]:
    return parts
