"""Packing: dropped positions leave, and hidden states come back to the input length."""

import pytest
import torch

from hires_lmm.modeling.packing_hires_lmm import expand, pack, plan_packing


REAL = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()


def packed_by_hand(row: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return torch.stack([state for keep, state in zip(row.tolist(), states, strict=True) if keep])


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_hold_the_kept_states_in_order(side):
    states = torch.randn(3, 7, 4)
    packing = plan_packing(REAL, side)
    packed = pack(states, packing)
    assert packed.shape == (3, 7, 4)
    for row in range(3):
        wanted = packed_by_hand(REAL[row], states[row])
        count = len(wanted)
        columns = slice(7 - count, 7) if side == "left" else slice(0, count)
        torch.testing.assert_close(packed[row, columns], wanted, rtol=0, atol=0)
        assert packing.mask[row].nonzero()[:, 0].tolist() == list(range(7))[columns]


@pytest.mark.parametrize("side", ["left", "right"])
def test_expanded_positions_repeat_the_last_kept_one_before_them(side):
    states = torch.randn(3, 7, 4)
    packing = plan_packing(REAL, side)
    expanded = expand(pack(states, packing), packing)
    stands_for = [[0, 1, 1, 3, 3, 3, 6], [2, 2, 2, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5, 6]]
    for row, sources in enumerate(stands_for):
        torch.testing.assert_close(expanded[row], states[row, sources], rtol=0, atol=0)


def test_rows_shrink_to_the_longest():
    packing = plan_packing(REAL[:2], "right")
    assert packing.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_row_without_any_real_position_does_not_break_the_others():
    packing = plan_packing(torch.tensor([[False, False], [True, True]]), "left")
    assert packing.mask.tolist() == [[False, False], [True, True]]
    assert packing.expand.min() >= 0 and packing.expand.max() < 2
