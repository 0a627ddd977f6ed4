"""Random tokens through a mixer's step of one token of every sequence; outputs and what is kept by name.

Values are drawn in float64 and rounded to the dtype under test, so that all runs of a case start from the same numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_carve.kernels import CarveState
from megatron_carve.kernels.decoding import mix_token
from megatron_carve.kernels.token_call import TokenCall

WRITE_GATES = {"gdn2": "value_channels", "kda": "key_heads"}


@dataclass(frozen=True)
class TokenSteps:
    """Tokens that follow each other.

    Attributes:
        form: "previous", "decayed" or "delta" of CARVE, "gdn2" or "kda".
        N: sequences; H: key heads; group: value heads of one; K, V: widths; W: taps, 1 for no convolution.
        rank: features of the low-rank maps, 0 for none; content: rank of CARVE's maps, 0 for none.
        in_slots: a serving engine's memory, of more slots than sequences, the second of which is padding.
        counted: where a sequence is in its content chunk is not said there, but counted, as elsewhere.
        steps: tokens of every sequence.
    """

    form: str
    N: int = 3
    H: int = 2
    group: int = 1
    K: int = 32
    V: int = 32
    W: int = 4
    bias: bool = False
    rank: int = 12
    content: int = 5
    activation: str = "silu"
    in_slots: bool = False
    counted: bool = False
    steps: int = 3
    content_chunk: int = 4

    def run(self, dtype: torch.dtype, compute: torch.dtype, device: str, backend: str) -> dict[str, Tensor]:
        """The steps with values of `dtype` held in `compute`."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(compute, torch.float32)

        def draw(*shape: int, scale: float = 1.0, float32: bool = False) -> Tensor:
            values = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
            values = values.to(torch.float32 if float32 else dtype)
            return values.to(wide if float32 else compute).to(device)

        H, HV, K, V, F = self.H, self.H * self.group, self.K, self.V, self.rank
        D, carve = 2 * H * K + HV * V, self.form in ("previous", "decayed", "delta")
        slots = self.N + 2 if self.in_slots else self.N
        gate = self.activation != "none"
        parameters: dict[str, Any] = {
            "taps": draw(D, self.W, scale=0.5) if self.W > 1 else None,
            "convolution_bias": draw(D) if self.bias else None,
            "decay_up": draw(H * K, F, scale=F**-0.5) if F else None,
            "gate_up": draw(HV * V, F, scale=F**-0.5) if F and gate else None,
            "gate_bias": draw(HV * V) if F and gate else None,
            "A_log": draw(H, K, float32=True) if carve else draw(H, float32=True),
            "dt_bias": draw(H, K, float32=True), "norm_weight": draw(V),
        }  # fmt: skip
        kept, state = draw(slots, self.W - 1, D), (draw(slots, HV, K, V, float32=True),)
        if carve:
            parameters |= {"erase_bias": draw(H, K, float32=True), "prediction": "previous"}
            parameters |= {"erase_form": "delta" if self.form == "delta" else "diagonal"}
            parameters |= {"prediction": "decayed"} if self.form == "decayed" else {}
            if self.content:
                down, up = draw(self.content, V, scale=V**-0.5), draw(K, self.content, scale=self.content**-0.5)
                parameters |= {"content_down": down, "content_up": up}
            scale = 0.1 if self.content else 0.0  # a state without content has zeros there
            mean, partial = (draw(slots, HV, V, scale=scale, float32=True) for _ in range(2))
            count = torch.arange(slots, device=device) % self.content_chunk
            state = CarveState(*state, mean, partial, count)
        elif self.form == "gdn2":
            parameters["erase_scale"] = 2.0
        write = {"gdn2": HV * V, "kda": H}.get(self.form, HV)
        sizes = [D, H * K if self.form != "kda" else 0, write, F or H * K, (F or HV * V) if gate else 0]
        rows = torch.tensor([slots - 1, -1, *range(self.N - 2)], device=device) if self.in_slots else None
        outputs = []
        for step in range(self.steps):
            told = self.in_slots and not self.counted
            positions = torch.arange(self.N, dtype=torch.int32, device=device) + step if told else None
            parts = draw(self.N, sum(sizes)).split(sizes, 1)
            call = TokenCall(
                convolved=parts[0], erase=parts[1] if sizes[1] else None, write=parts[2], decay=parts[3],
                gate=parts[4] if gate else None, write_gates=WRITE_GATES.get(self.form, "value_heads"), kept=kept,
                state=state, rows=rows, positions=positions, key_heads=H, content_chunk=self.content_chunk, eps=1e-5,
                activation=self.activation, **parameters,
            )  # fmt: skip
            outputs.append(mix_token(call, backend))
        named = {"o": torch.stack(outputs, 1), "kept": kept, "S": state[0]}
        if isinstance(state, CarveState):
            named |= {"mean": state.mean, "partial": state.partial, "count": state.count}
        return {name: x.cpu() for name, x in named.items() if x.numel()}
