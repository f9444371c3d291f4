"""The contrastive loss of the fusion paper as pure functions, against numbers of its released code."""

import pytest
import torch

from builders.fusion import golden_cases, golden_encoder, golden_tensors
from hires_lmm.training.objectives.contrastive_math import (
    compose_answers,
    contrast,
    encode_answers,
    find_outliers,
    identity_term,
    lengthen_positions,
    normalise_texts,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return golden_tensors()


@pytest.fixture(scope="module")
def loss_settings() -> dict:
    return golden_cases()["d_loss"]


def answers(golden: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return golden["input.ans_input_ids"].long(), golden["input.ans_attention_mask"].long()


def test_released_loss_and_gradients(golden, loss_settings):
    encoder = golden_encoder(golden)
    states = golden["output.cl.query_eos_states"]
    projection = golden["weight.imgque_projection.weight"].clone().requires_grad_()
    scale = golden["weight.logit_scale"].clone().requires_grad_()
    projected = encode_answers(encoder, *answers(golden))
    torch.testing.assert_close(projected, golden["output.cl.text_projected"], atol=1e-5, rtol=0)
    assert torch.equal(find_outliers(projected, 1.0).int(), golden["output.cl.text_outlier_mask"])
    texts = normalise_texts(projected, loss_settings["outlier_sigma"])
    torch.testing.assert_close(texts, golden["output.cl.text_embeds"], atol=1e-5, rtol=0)
    queries = torch.nn.functional.normalize(states @ projection.T, dim=-1)
    torch.testing.assert_close(queries, golden["output.cl.query_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(queries @ texts.T, golden["output.cl.logits_per_image"], atol=1e-5, rtol=0)
    pairs, identity = contrast(queries, texts, scale), identity_term(golden["output.slots"])
    assert pairs.item() == pytest.approx(loss_settings["contrastive"], abs=1e-5)
    assert identity.item() == pytest.approx(loss_settings["identity"], abs=1e-5)
    total = pairs + loss_settings["identity_weight"] * identity
    assert total.item() == pytest.approx(loss_settings["total"], abs=1e-5)
    total.backward()
    for gradient, name in (
        (projection.grad, "imgque_projection.weight"),
        (encoder.text_projection.weight.grad, "clip_model.text_projection.weight"),
        (scale.grad, "logit_scale"),
    ):
        torch.testing.assert_close(gradient, golden[f"output.cl.grad.{name}"], atol=1e-5, rtol=1e-4)


def test_answers_are_composed_as_released(golden):
    ids, mask = answers(golden)
    types = golden["input.ans_input_tps"]
    texts = [row[kinds == 32] for row, kinds in zip(ids, types, strict=True)]  # 32 marks answer tokens
    composed, seen = compose_answers(texts, [6, 6, 3], 2, 48, [50, 51, 52, 53, 54])
    assert torch.equal(seen, mask) and torch.equal(composed[mask.bool()], ids[mask.bool()])
    plain, seen = compose_answers(texts, [6, 6, 3], 2, 48)
    assert plain[0].tolist() == [*texts[0].tolist(), *[2] * (plain.shape[1] - len(texts[0]))]
    assert seen.sum(dim=1).tolist() == [len(text) + 1 for text in texts]
    cut, _ = compose_answers([torch.arange(4, 40)], [3], 2, 7, [50, 51])
    assert cut.tolist() == [[4, 5, 6, 7, 50, 51, 2]]
    with pytest.raises(ValueError, match="A block has 4 slots, but block_tokens holds 2 ids"):
        compose_answers(texts[:1], [4], 2, 48, [50, 51])
    with pytest.raises(ValueError, match="max_length=3 leaves no room for an answer beside 3 slots"):
        compose_answers(texts[:1], [3], 2, 3, [50, 51])


def test_padding_and_a_wrong_end_token_do_not_move_an_answer(golden):
    ids, mask = answers(golden)
    usual = encode_answers(golden_encoder(golden), ids, mask)
    wrong = golden_encoder(golden, eos_token_id=2, pad_token_id=0)
    longer = torch.nn.functional.pad(ids, (0, 5), value=54)  # CLIP's pooling for end token 2 would take these
    found = encode_answers(wrong, longer, torch.nn.functional.pad(mask, (0, 5)))
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


def test_longer_positions_keep_the_old_ones(golden):
    encoder = golden_encoder(golden)
    ids, mask = answers(golden)
    before = encode_answers(encoder, ids, mask)
    table = encoder.text_model.embeddings.position_embedding.weight.detach().clone()
    lengthen_positions(encoder, 512)
    longer = encoder.text_model.embeddings.position_embedding.weight.detach()
    assert longer.shape == (512, 32) and torch.equal(longer[:48], table)
    assert longer[48:].mean().item() == pytest.approx(table.mean().item(), abs=0.1 * table.std().item())
    assert longer[48:].std().item() == pytest.approx(table.std().item(), rel=0.05)
    torch.testing.assert_close(encode_answers(encoder, ids, mask), before)
    many = torch.full((1, 500), 9)
    assert encode_answers(encoder, many, torch.ones_like(many)).isfinite().all()
    again = golden_encoder(golden)
    lengthen_positions(again, 512)
    assert torch.equal(again.text_model.embeddings.position_embedding.weight, longer)
    lengthen_positions(encoder, 100)
    assert encoder.config.max_position_embeddings == 512
    with pytest.raises(ValueError, match="Linear has no position_embedding that could be made 9 long"):
        lengthen_positions(torch.nn.Linear(2, 2), 9)
