"""How many programs work on a head of CARVE's content stages."""

import pytest
import torch

from megatron_carve.kernels.triton_backend import content


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
