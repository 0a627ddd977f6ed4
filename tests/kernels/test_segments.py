"""Chains of chunks that are cut into segments: the same values and gradients, and where it is done."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.inputs import in_float64, make_inputs, run_with_grads
from support.interpreter import DEVICE
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import assert_close

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2
from megatron_carve.kernels.triton_backend import chunk_state, segments

OPS = {"gdn2": chunk_gdn2, "carve": chunk_carve}
ORACLES = {"gdn2": oracle_gdn2, "carve": oracle_carve}
SIZES: dict[str, dict[str, Any]] = {
    # without decay, so that what enters a segment matters to its end
    "grouped heads": {"B": 1, "T": 330, "H": 1, "HV": 2, "K": 32, "V": 64, "initial_state": True, "decay": "none"},
    "two sequences": {"B": 2, "T": 256, "H": 2, "K": 64, "V": 32, "decay": "none"},
    "steep": {"B": 1, "T": 270, "H": 1, "K": 32, "V": 32, "decay": "by chunk", "initial_state": True},
}


@pytest.mark.parametrize("form", ["gdn2", "previous", "decayed"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(form: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []

    def cut(call: Any, programs: int) -> segments.Segments:
        cuts.append(programs)
        return segments.segments_of_sequences(call, 4)

    monkeypatch.setattr(chunk_state, "segments_of", cut)
    given = SIZES[size]
    if form != "gdn2":
        # without a gradient through means the chain of the state's gradient is GDN-2's; with a state tokens are counted
        given = given | {"initial_state": False, "content_grad": "detached"}
    inputs = make_inputs(form, dtype=torch.float32, **given)
    options = {"state_type": CarveState, "output_final_state": True}
    found = run_with_grads(OPS[inputs.op], inputs.to(DEVICE), backend="triton", **options)
    plain = run_with_grads(OPS[inputs.op], inputs, backend="torch", **options)
    expected = run_with_grads(ORACLES[inputs.op], in_float64(inputs))
    assert len(cuts) == 1
    known = [name for name, x in expected.items() if x is not None]
    assert_close(
        {name: found[name].cpu() for name in known}, {name: expected[name] for name in known}, "float32", plain
    )


def test_segments_fill_a_gpu_that_chains_leave_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "multiprocessors", lambda device: 132)

    def count(tokens: int, sequences: int, programs: int, spare: bool = False) -> int | None:
        chunks = SimpleNamespace(
            count=sequences * tokens // 64, sequences=sequences, spare=spare, first=torch.zeros(1, dtype=torch.int64)
        )
        found = segments.segments_of(SimpleNamespace(chunks=chunks), programs)  # type: ignore[arg-type]
        return found and found.of_sequence

    assert count(65536, 1, 32) == 4
    assert count(65536, 1, 8) == 16
    assert count(4096, 4, 128) is None
    assert count(4096, 1, 8) == 4  # of sixteen chunks each
    assert count(1024, 1, 8) is None
    assert count(65536, 1, 8, spare=True) is None


def test_a_segment_begins_where_the_one_before_it_ends() -> None:
    call = SimpleNamespace(chunks=SimpleNamespace(count=14, sequences=2, first=torch.zeros(1, dtype=torch.int64)))
    assert segments.segments_of_sequences(call, 4).first.tolist() == [0, 1, 3, 5, 7, 8, 10, 12, 14]  # type: ignore[arg-type]
