"""How many programs work on a head of CARVE's content stages, and that they work together."""

import multiprocessing
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from support.inputs import make_inputs, run_with_grads
from support.interpreter import DEVICE

from megatron_carve.kernels import CarveState, chunk_carve
from megatron_carve.kernels.triton_backend import content, content_gradient, content_terms

KERNELS = {content_terms: "content_terms_kernel", content_gradient: "content_gradient_kernel"}


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
    """The kernel of a stage, whose programs, all for one head, run in processes of their own, which share its tensors.

    Args:
        late: the place of the program that takes its time, so that a wait that is missing in another shows.
    """

    def __init__(self, stage: ModuleType, programs: int, late: int) -> None:
        self.stage, self.programs, self.late = stage, programs, late
        self.kernel = getattr(stage, KERNELS[stage])

    def __getitem__(self, grid: tuple[int]) -> Any:
        assert grid == (self.programs,)
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        for x in args:
            if isinstance(x, torch.Tensor):
                x.share_memory_()
        fork = multiprocessing.get_context("fork")
        programs = [fork.Process(target=self._program, args=args, kwargs=options) for _ in range(self.programs)]
        for program in programs:
            program.start()
        for program in programs:
            program.join(60)
        finished = [program.exitcode == 0 for program in programs]
        for program in programs:
            program.kill()
        assert all(finished)

    def _program(self, *args: Any, **options: Any) -> None:
        stage, take_place, places = self.stage, self.stage.take_place, []

        def noting_place(*counters: Any) -> Any:
            team, place = take_place(*counters)
            places.append(place.handle.data.item())
            return team, place

        def late(function: Any) -> Any:
            def call(*what: Any) -> None:
                function(*what)
                if places == [self.late]:
                    time.sleep(0.05)

            return call

        stage.take_place = noting_place
        stage.wait_for, stage.announce = late(stage.wait_for), late(stage.announce)
        self.kernel[(1,)](*args, **options)
        assert len(places) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs of a launch work together by themselves")
@pytest.mark.parametrize(
    ("stage", "programs", "late"),
    [
        (content_terms, 2, 0),
        (content_terms, 2, 1),
        pytest.param(content_terms, 3, 0, marks=pytest.mark.slow),
        pytest.param(content_terms, 3, 2, marks=pytest.mark.slow),
        (content_gradient, 2, 0),
        (content_gradient, 2, 1),
    ],
    ids=lambda x: KERNELS.get(x, x),
)
def test_programs_find_together_what_one_does(monkeypatch, stage, programs, late):
    """Of a sequence that begins and ends within a content chunk, after the state of another."""
    inputs = make_inputs(
        "previous", B=1, T=200, H=1, K=32, V=32, dtype=torch.float32, content_chunk=128, counts=[70],
        initial_state=True,
    )  # fmt: skip
    options = {"state_type": CarveState, "output_final_state": True, "backend": "triton"}
    expected = run_with_grads(chunk_carve, inputs, **options)
    monkeypatch.setattr(stage, KERNELS[stage], Team(stage, programs, late))
    monkeypatch.setattr(stage, "team_of", lambda *_: programs)
    found = run_with_grads(chunk_carve, inputs, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
