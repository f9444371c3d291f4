"""The contrastive loss of the fusion paper as pure functions, by hand; its released numbers are in `tests/golden`."""

import copy

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from builders.fusion import tiny_text_encoder
from builders.tiny import randomise
from hires_lmm.training.objectives.contrastive_math import (
    compose_answers,
    contrast,
    encode_answers,
    find_outliers,
    identity_term,
    lengthen_positions,
    normalise_texts,
)


@pytest.fixture
def encoder() -> CLIPTextModelWithProjection:
    return randomise(tiny_text_encoder()[0].eval(), seed=1)


def answers(encoder: CLIPTextModelWithProjection) -> tuple[torch.Tensor, torch.Tensor]:
    """Two answers and their end tokens; the shorter one is padded."""
    end, pad = encoder.config.eos_token_id, encoder.config.pad_token_id
    ids = torch.tensor([[9, 10, 11, 50, 51, end], [20, 50, end, pad, pad, pad]])
    return ids, torch.tensor([[1] * 6, [1] * 3 + [0] * 3])


def test_answers_are_composed_by_hand():
    texts = [torch.tensor([9, 10]), torch.tensor([20])]
    composed, seen = compose_answers(texts, [4, 2], 2, 48, [50, 51, 52])
    assert [row[mask.bool()].tolist() for row, mask in zip(composed, seen, strict=True)] == [
        [9, 10, 50, 51, 52, 2],
        [20, 50, 2],
    ]
    plain, seen = compose_answers(texts, [4, 2], 2, 48)
    assert [row[mask.bool()].tolist() for row, mask in zip(plain, seen, strict=True)] == [[9, 10, 2], [20, 2]]
    assert plain.tolist() == [[9, 10, *[2] * (plain.shape[1] - 2)], [20, *[2] * (plain.shape[1] - 1)]]
    cut, _ = compose_answers([torch.arange(4, 40)], [3], 2, 7, [50, 51])
    assert cut.tolist() == [[4, 5, 6, 7, 50, 51, 2]]
    with pytest.raises(ValueError, match="A block has 4 slots, but block_tokens holds 2 ids"):
        compose_answers(texts[:1], [4], 2, 48, [50, 51])
    with pytest.raises(ValueError, match="max_length=3 leaves no room for an answer beside 3 slots"):
        compose_answers(texts[:1], [3], 2, 3, [50, 51])


def test_padding_and_a_wrong_end_token_do_not_move_an_answer(encoder):
    ids, mask = answers(encoder)
    usual = encode_answers(encoder, ids, mask)
    wrong = CLIPTextModelWithProjection(CLIPTextConfig(**{**encoder.config.to_dict(), "eos_token_id": 2}))
    wrong.load_state_dict(encoder.state_dict())
    longer = torch.nn.functional.pad(ids, (0, 5), value=60)  # CLIP's pooling for end token 2 would take these
    found = encode_answers(wrong.eval(), longer, torch.nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(found, usual, atol=1e-5, rtol=0)


def test_outliers_by_hand():
    matrix = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 6.0]])
    # mean 1, unbiased variance (5 + 25) / 5 = 6: one deviation spans -1.449 to 3.449
    assert find_outliers(matrix, 1.0).tolist() == [[False] * 3, [False, False, True]]
    assert not find_outliers(matrix, 2.1).any()
    assert normalise_texts(matrix, 1.0).tolist() == [[0.0] * 3, [0.0] * 3]  # finite where the released code divides 0
    assert normalise_texts(matrix, None).tolist() == [[0.0] * 3, [0.0, 0.0, 1.0]]
    assert not find_outliers(torch.tensor([[3.0]]), 1.0).any()


def test_identity_term_counts_pairs_of_the_batch_or_of_a_block():
    slots = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    # off the diagonal: rows 0, 2 and 3 are parallel, six ordered pairs of cosine 1
    assert identity_term(slots).item() == pytest.approx(6 / 16)
    assert identity_term(slots, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(2 / 8)
    assert identity_term(slots, torch.tensor([0, 1, 2, 3])).item() == pytest.approx(0.0)


def test_contrast_of_one_pair_is_zero_and_of_swapped_pairs_large():
    unit, scale = torch.eye(2), torch.tensor(2.0)
    own = torch.log(1 + torch.exp(-scale.exp()))
    assert contrast(unit, unit, scale).item() == pytest.approx(own.item(), rel=1e-5)
    assert contrast(unit, unit.flip(0), scale).item() == pytest.approx((own + scale.exp()).item(), rel=1e-5)
    assert contrast(unit[:1], unit[:1], scale).item() == 0.0


def test_longer_positions_keep_the_old_ones(encoder):
    ids, mask = answers(encoder)
    before = encode_answers(encoder, ids, mask)
    table, twin = encoder.text_model.embeddings.position_embedding.weight.detach().clone(), copy.deepcopy(encoder)
    lengthen_positions(encoder, 512)
    longer = encoder.text_model.embeddings.position_embedding.weight.detach()
    assert len(longer) == 512 and torch.equal(longer[: len(table)], table)
    assert longer[len(table) :].mean().item() == pytest.approx(table.mean().item(), abs=0.1 * table.std().item())
    assert longer[len(table) :].std().item() == pytest.approx(table.std().item(), rel=0.05)
    torch.testing.assert_close(encode_answers(encoder, ids, mask), before)
    many = torch.full((1, 500), 9)
    assert encode_answers(encoder, many, torch.ones_like(many)).isfinite().all()
    lengthen_positions(twin, 512)
    assert torch.equal(twin.text_model.embeddings.position_embedding.weight, longer)
    lengthen_positions(encoder, 100)
    assert encoder.config.max_position_embeddings == 512
    with pytest.raises(ValueError, match="Linear has no position_embedding that could be made 9 long"):
        lengthen_positions(torch.nn.Linear(2, 2), 9)
