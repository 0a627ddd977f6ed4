"""How many programs work on a head of CARVE's content stages, and that they work together."""

import multiprocessing
from typing import Any

import pytest
import torch
from support.inputs import make_inputs, run_with_grads
from support.interpreter import DEVICE

from megatron_carve.kernels import CarveState, chunk_carve
from megatron_carve.kernels.triton_backend import content, content_gradient


@pytest.mark.parametrize(
    ("heads", "side_by_side", "most", "programs"),
    [(64, 2, 3, 2), (44, 2, 3, 3), (45, 2, 3, 2), (16, 2, 2, 2), (16, 1, 3, 1), (1000, 4, 3, 2)],
)
def test_a_team_fills_a_gpu_and_no_more(monkeypatch, heads, side_by_side, most, programs):
    """Chunks that are worked on side by side ask for two; a third runs where all of them do at the same time."""
    monkeypatch.setattr(content, "cooperates", lambda device: True)
    monkeypatch.setattr(content, "multiprocessors", lambda device: 132)
    assert content.team_of(heads, side_by_side, most, torch.device("cuda")) == programs


def test_interpreted_programs_follow_each_other():
    assert content.team_of(16, 2, 3, torch.device("cpu")) == 1


class Team:
    """A kernel whose programs, two for one head, run in processes of their own, which share its tensors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        assert grid == (2,)
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        for x in args:
            if isinstance(x, torch.Tensor):
                x.share_memory_()
        fork = multiprocessing.get_context("fork")
        programs = [fork.Process(target=self.kernel[(1,)], args=args, kwargs=options) for _ in range(2)]
        for program in programs:
            program.start()
        for program in programs:
            program.join(60)
        finished = [program.exitcode == 0 for program in programs]
        for program in programs:
            program.kill()
        assert all(finished)


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs of a launch work together by themselves")
def test_two_programs_find_what_one_does(monkeypatch):
    """Of a sequence that begins and ends within a content chunk, after the state of another."""
    inputs = make_inputs(
        "previous", B=1, T=200, H=1, K=32, V=32, dtype=torch.float32, content_chunk=128, counts=[70],
        initial_state=True,
    )  # fmt: skip
    options = {"state_type": CarveState, "output_final_state": True, "backend": "triton"}
    expected = run_with_grads(chunk_carve, inputs, **options)
    monkeypatch.setattr(content_gradient, "content_gradient_kernel", Team(content_gradient.content_gradient_kernel))
    monkeypatch.setattr(content_gradient, "team_of", lambda *_: 2)
    found = run_with_grads(chunk_carve, inputs, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
