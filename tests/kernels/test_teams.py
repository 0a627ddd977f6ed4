"""How many programs work on a head of CARVE's content stages, and that they work together."""

import multiprocessing
import time
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from support.inputs import make_inputs, named_outputs, random_loss, run_with_grads
from support.interpreter import DEVICE

from megatron_carve.kernels import CarveState, chunk_carve
from megatron_carve.kernels.triton_backend import content_gradient, content_operands, content_terms
from megatron_carve.kernels.triton_backend.chunks import make_chunks
from megatron_carve.kernels.triton_backend.stages import HOPPER, Call

# Workers, states and all, by heads, chunks side by side and columns of values.
TEAMS = {
    (64, 1, 32): (1, 1, 2), (132, 1, 64): (1, 1, 2), (133, 1, 64): (1, 1, 1), (999, 1, 128): (1, 2, 3),
    (64, 2, 64): (2, 1, 3), (64, 2, 128): (2, 2, 4), (999, 4, 128): (2, 2, 4),
}  # fmt: skip
KERNELS = {content_terms: "content_terms_kernel", content_gradient: "content_gradient_kernel"}


def test_teams_have_as_many_programs_as_find_something_to_do(monkeypatch):
    """Those that prepare, as many as chunks are worked on side by side, at most two; and for each 64 columns of the
    state one that carries it; but one alone where two have no room at once. Backward one that carries the state's
    gradient, and one for the sums, if they are wanted."""
    device = torch.device("cuda")
    for stage in (content_gradient, content_terms):
        monkeypatch.setattr(stage, "cooperates", lambda device: True)
    monkeypatch.setattr(content_terms, "multiprocessors", lambda device: 132)
    assert [content_gradient.team_of(wants_terms, device) for wants_terms in (False, True)] == [1, 2]
    teams = {sizes: content_terms.team_of_terms(*sizes, device) for sizes in TEAMS}
    assert {sizes: (team.workers, team.states, team.programs) for sizes, team in teams.items()} == TEAMS


@pytest.mark.parametrize(("programs", "beside"), [(2, 130), (66, 66), (67, None), (0, None)])
def test_operands_form_beside_a_chain_that_leaves_half_of_a_gpu(monkeypatch, programs, beside):
    monkeypatch.setattr(content_gradient, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(content_gradient, "overlaps", lambda device: True)
    x = torch.zeros(2, 130, 1, 32)
    call = Call(make_chunks(x, None, None), *[1] * 6, *[0] * 2, False, False, False, torch.float32, HOPPER)
    assert content_gradient.programs_beside(call, programs) == beside
    packed = call._replace(chunks=make_chunks(x[:1], torch.tensor([0, 30, 130]), None))
    assert content_gradient.programs_beside(packed, programs) is None


def test_interpreted_programs_follow_each_other():
    assert content_gradient.team_of(True, torch.device("cpu")) == 1
    assert content_terms.team_of_terms(16, 2, 128, torch.device("cpu")).programs == 1


class Programs:
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
        for name in ("wait_for", "announce", "announce_one_more"):
            if hasattr(stage, name):
                setattr(stage, name, late(getattr(stage, name)))
        self.kernel[(1,)](*args, **options)
        assert len(places) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs of a launch work together by themselves")
@pytest.mark.parametrize(
    ("stage", "team", "late"),
    [
        (content_terms, content_terms.Team(1, 1, False), 0),
        (content_terms, content_terms.Team(1, 1, False), 1),
        pytest.param(content_terms, content_terms.Team(2, 1, False), 0, marks=pytest.mark.slow),
        pytest.param(content_terms, content_terms.Team(2, 1, False), 2, marks=pytest.mark.slow),
        pytest.param(content_terms, content_terms.Team(2, 2, False), 1, marks=pytest.mark.slow),
        (content_terms, content_terms.Team(2, 2, False), 2),
        (content_gradient, 2, 0),
        (content_gradient, 2, 1),
    ],
    ids=lambda x: KERNELS.get(x, x) if isinstance(x, ModuleType) else getattr(x, "programs", x),
)
def test_programs_find_together_what_one_does(monkeypatch, stage, team, late):
    """Of a sequence that begins and ends within a content chunk, after the state of another."""
    inputs = make_inputs(
        "previous", B=1, T=200, H=1, K=32, V=32, dtype=torch.float32, content_chunk=128, counts=[70],
        initial_state=True,
    )  # fmt: skip
    options = {"state_type": CarveState, "output_final_state": True, "backend": "triton"}
    expected = run_with_grads(chunk_carve, inputs, **options)
    monkeypatch.setattr(stage, KERNELS[stage], Programs(stage, getattr(team, "programs", team), late))
    monkeypatch.setattr(stage, "team_of_terms" if stage is content_terms else "team_of", lambda *_: team)
    found = run_with_grads(chunk_carve, inputs, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs of a launch work together by themselves")
def test_programs_of_a_sequence_without_tokens_wait_for_nothing(monkeypatch):
    inputs = make_inputs(
        "previous", lengths=[1, 0], H=1, K=32, V=32, dtype=torch.float32, content_chunk=128, counts=[0, 70]
    )
    monkeypatch.setattr(content_gradient, "content_gradient_kernel", Programs(content_gradient, 4, 0))
    monkeypatch.setattr(content_gradient, "team_of", lambda *_: 2)
    run_with_grads(chunk_carve, inputs, state_type=CarveState, output_final_state=True, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="there programs of two launches run side by side by themselves")
def test_chain_waits_for_what_is_formed_beside_it(monkeypatch):
    """Three programs form the operands; how many of them the chain waits for is how many there are. Either launch tells
    where the other may begin, and end."""
    inputs = make_inputs("previous", B=2, T=270, H=1, K=32, V=32, dtype=torch.float32, content_chunk=128)
    monkeypatch.setitem(content_operands.TUNING, HOPPER, content_operands.TUNING[HOPPER]._replace(BK=16))
    leaves = inputs.map_floats(lambda x: x.requires_grad_())
    loss = random_loss(named_outputs(leaves.call(chunk_carve, backend="triton")))
    given = [x for x in (*leaves.tensors.values(), *leaves.named.values()) if x.requires_grad]
    wait_for, launch, waits, events = content_gradient.wait_for, content_gradient.launch, [], []

    def noting(counter: Any, least: Any) -> None:
        if not isinstance(least, int):
            waits.append([x.handle.data.item() for x in (triton.language.atomic_add(counter, 0), least)])
        wait_for(counter, least)

    def noting_launch(*args: Any, launch_pdl: bool, **options: Any) -> None:
        events.append(f"dependent: {launch_pdl}")
        launch(*args, **options)

    monkeypatch.setattr(content_gradient, "launch", noting_launch)
    monkeypatch.setattr(content_operands, "let_next_launch_begin", lambda: events.append("begun"))
    monkeypatch.setattr(content_gradient, "end_after_launch_before", lambda: events.append("ended"))
    expected = torch.autograd.grad(loss, given, retain_graph=True)
    assert events == ["dependent: False"]
    monkeypatch.setattr(content_gradient, "wait_for", noting)
    monkeypatch.setattr(content_gradient, "programs_beside", lambda *_: 3)
    found = torch.autograd.grad(loss, given)
    assert all(map(torch.equal, found, expected))
    assert events[1:] == ["begun"] * 3 + ["dependent: True"] + ["ended"] * 2
    waits = [(there, least) for there, least in waits if least > 0]
    assert sorted(waits) == [(2, 2)] * 2 + [(4, 4)] * 4


@pytest.mark.skipif(DEVICE == "cuda", reason="Python stands in for parts of a kernel")
def test_turns_come_in_the_order_of_the_chain(monkeypatch):
    """Six chunks of two sequences and heads in content chunks of four, in two blocks of columns each."""
    turns = []

    def noting(*args: Any) -> None:
        i_c, i_h, o_k = (args[i].handle.data for i in (-9, -8, -6))
        turns.append((i_c.item(), i_h.item(), o_k[0].item()))

    monkeypatch.setattr(content_operands, "block_operands", noting)
    monkeypatch.setattr(content_operands, "add_steep_scores", lambda *_: None)
    kernel, formed = content_operands.content_operands_in_turn_kernel, torch.zeros(12, 2, dtype=torch.int32)
    sizes = {"scale": 1.0, "content_chunk": 256, "sequences": 2, "chunks": 6, "H": 2, "K": 32, "BK": 16, "V": 32}
    options = {"BEFORE": False, "LOGITS_W": False, "CT": triton.language.float32, "PRECISION": "tf32"}
    kernel[(1,)](**dict.fromkeys(kernel.arg_names, formed) | {"formed": formed} | sizes | options)
    assert turns == [(c, h, o) for i in range(5, -1, -1) for c in (i, 6 + i) for h in (0, 1) for o in (0, 16)]
    assert (formed[[0, 6]] == 8).all() and (formed[[4, 10]] == 4).all() and formed.sum() == 48
