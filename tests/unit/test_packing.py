"""Packing: dropped positions leave, and hidden states come back to the input length."""

import pytest
import torch

from hires_lmm.modeling.packing_hires_lmm import expand, pack, plan_batch, plan_packing


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
    assert plan_packing(torch.tensor([[False, False], [True, False]]), "left").expand.tolist() == [[0, 0], [0, 0]]


# ---- plan_batch


def batch_by_hand(kept, mask, past: int, side: str) -> tuple[list, list, list]:
    """Input positions that stay, the mask and the positions, row by row in plain Python."""
    kept, length = kept.tolist(), kept.shape[1]
    prefixes = [row[:past] for row in mask.tolist()] if mask is not None else [[1] * past for _ in kept]
    shown = [row[past:] for row in mask.tolist()] if mask is not None else [[1] * length for _ in kept]
    stay = [[i for i in range(length) if k[i] and s[i]] for k, s in zip(kept, shown, strict=True)]
    width = max(map(len, stay))
    masks, positions = [], []
    for prefix, row in zip(prefixes, stay, strict=True):
        real, padding = [1] * len(row), [0] * (width - len(row))
        masks.append([int(bool(p)) for p in prefix] + (padding + real if side == "left" else real + padding))
        count, numbers = 0, []
        for value in masks[-1]:
            count += value
            numbers.append(max(count - 1, 0))
        positions.append(numbers[past:])
    return stay, masks, positions


KEPT = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]).bool()
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
BATCHES = {
    "no mask": (None, 0, False, "left"),
    "no mask, cache": (None, 3, False, "left"),
    "no padding": (torch.ones(3, 6), 0, False, "left"),
    "left": (RIGHT.flip(1), 0, False, "left"),
    "right": (RIGHT, 0, False, "right"),
    "right by one": (RIGHT | torch.tensor([1, 1, 1, 1, 1, 0]), 0, False, "right"),
    "right in generate": (RIGHT, 0, True, "left"),
    "left in generate": (RIGHT.flip(1), 0, True, "left"),
    "left with cache": (torch.cat([torch.tensor([[0, 1], [1, 1], [0, 0]]), RIGHT.flip(1)], 1), 2, False, "left"),
    "right with cache": (torch.cat([torch.tensor([[1, 1], [0, 1], [1, 1]]), RIGHT], 1).bool(), 2, False, "right"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_packed_with_its_padding_and_cache(name):
    mask, past, in_generate, side = BATCHES[name]
    packing, attention_mask, position_ids = plan_batch(KEPT.clone(), mask, past, in_generate)
    stay, masks, positions = batch_by_hand(KEPT, mask, past, side)
    assert attention_mask.tolist() == masks and attention_mask.dtype == torch.long
    assert position_ids.tolist() == positions
    assert packing.mask.tolist() == [[bool(value) for value in row[past:]] for row in masks]
    assert [row[real].tolist() for row, real in zip(packing.index, packing.mask, strict=True)] == stay


def test_the_mask_of_a_batch_must_have_two_axes():
    for mask in (torch.ones(3, 1, 6, 6), torch.ones(6), {"full_attention": None}):
        with pytest.raises(ValueError, match="needs a two-dimensional attention_mask"):
            plan_batch(KEPT, mask, 0, False)


def test_padding_of_the_index_repeats_an_end_of_the_row():
    """Positions that stand for nothing must still be readable."""
    left, right = plan_packing(REAL[:2], "left"), plan_packing(REAL[:2], "right")
    assert left.index.tolist() == [[0, 1, 3, 6], [2, 2, 2, 5]]
    assert right.index.tolist() == [[0, 1, 3, 6], [2, 5, 0, 1]]
    assert left.expand.tolist() == [[0, 1, 1, 2, 2, 2, 3], [2, 2, 2, 2, 2, 3, 3]]
    assert right.expand.tolist() == [[0, 1, 1, 2, 2, 2, 3], [0, 0, 0, 0, 0, 1, 1]]
    empty = plan_packing(torch.zeros(2, 3, dtype=torch.bool), "left")
    assert empty.index.shape == empty.mask.shape == (2, 0) and empty.expand.tolist() == [[0, 0, 0]] * 2
