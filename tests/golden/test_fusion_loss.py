"""The contrastive loss of the fusion paper, as pure functions and as an objective on the model."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from builders.tiny import randomise
from hires_lmm.training.objectives import Contrastive, StepValues
from hires_lmm.training.objectives.contrastive import AnswerColumn
from hires_lmm.training.objectives.contrastive_math import (
    compose_answers,
    contrast,
    encode_answers,
    find_outliers,
    identity_term,
    normalise_texts,
)

from .fusion import GOLDEN, MODEL, hand_made, inputs_of, released_weights, text_encoder


LOSS = GOLDEN.cases["d_loss"]


def measure(
    cases: dict, weights: dict, tensors: dict, states: torch.Tensor, slots: torch.Tensor, settings: dict
) -> dict[str, torch.Tensor]:
    """Every number on the way from the end states of the blocks, by the names of the set."""
    encoder = text_encoder(cases, weights)
    projection = weights["imgque_projection.weight"].clone().requires_grad_()
    scale = weights["logit_scale"].clone().requires_grad_()
    ids, mask = tensors["input.ans_input_ids"].long(), tensors["input.ans_attention_mask"].long()
    projected = encode_answers(encoder, ids, mask)
    texts = normalise_texts(projected, settings["outlier_sigma"])
    queries = torch.nn.functional.normalize(states @ projection.T, dim=-1)
    pairs, identity = contrast(queries, texts, scale), identity_term(slots)
    total = pairs + settings["identity_weight"] * identity
    total.backward()
    return {
        "cl.text_projected": projected,
        "cl.text_outlier_mask": find_outliers(projected, settings["outlier_sigma"]).int(),
        "cl.text_embeds": texts,
        "cl.query_embeds": queries,
        "cl.logits_per_image": queries @ texts.T,
        "cl.loss_contrastive": pairs,
        "cl.loss_identity": identity,
        "cl.loss": total,
        "cl.grad.imgque_projection.weight": projection.grad,
        "cl.grad.clip_model.text_projection.weight": encoder.text_projection.weight.grad,
        "cl.grad.logit_scale": scale.grad,
    }


def objective_on_model(cases: dict, weights: dict, tensors: dict, settings: dict) -> dict[str, torch.Tensor]:
    """Loss and gradients of the objective in a training step of the golden model."""
    kinds = cases["token_types"]
    model, inputs = hand_made(cases, weights), inputs_of(cases, tensors)
    encoder = text_encoder(cases, weights)
    contrastive = Contrastive(
        encoder,
        cases["settings"]["hid"],
        end_token=cases["query_eos"],
        outlier_sigma=settings["outlier_sigma"],
        identity_weight=settings["identity_weight"],
        max_length=encoder.config.max_position_embeddings,
        block_tokens=cases["placeholder_ids"],
    )
    contrastive.projection.weight.data.copy_(weights["imgque_projection.weight"])
    contrastive.logit_scale.data.copy_(weights["logit_scale"])
    outputs = model.train()(**inputs)
    rows = zip(tensors["input.ans_input_ids"].long(), tensors["input.ans_input_tps"], strict=True)
    answers = [ids[kind == kinds["ANS"]] for ids, kind in rows]
    column = AnswerColumn(None).join([answers[:1], answers[1:]])
    loss = contrastive(StepValues(outputs, {"answers": column}, inputs, True, model.model))
    loss.backward()
    connector = model.model.connector
    return {
        "cl.loss": loss,
        "cl.grad.clip_model.vision_model.token_LF": connector.layout.separators.view_end.grad[None, None],
        "cl.grad.imgque_model.norm.weight": connector.token_ops[0].model.norm.weight.grad,
        "cl.grad.imgque_projection.weight": contrastive.projection.weight.grad,
        "cl.grad.clip_model.text_projection.weight": encoder.text_projection.weight.grad,
        "cl.grad.logit_scale": contrastive.logit_scale.grad,
    }


def test_loss_and_gradients_as_pure_functions():
    states, slots = GOLDEN["output.cl.query_eos_states"], GOLDEN["output.slots"]
    found = measure(MODEL, GOLDEN.under("weight."), GOLDEN.tensors, states, slots, LOSS)
    assert torch.equal(found["cl.text_outlier_mask"], GOLDEN["output.cl.text_outlier_mask"])
    for name, value in found.items():
        GOLDEN.close(value, f"output.{name}", atol=1e-5, rtol=1e-4 if ".grad." in name else 0)
    for name, key in (("contrastive", "loss_contrastive"), ("identity", "loss_identity"), ("total", "loss")):
        assert found[f"cl.{key}"].item() == pytest.approx(LOSS[name], abs=1e-5)


def test_answers_are_composed_as_released():
    ids, mask = GOLDEN["input.ans_input_ids"].long(), GOLDEN["input.ans_attention_mask"].long()
    kinds = MODEL["token_types"]
    texts = [row[kind == kinds["ANS"]] for row, kind in zip(ids, GOLDEN["input.ans_input_tps"], strict=True)]
    counts = [int(((kind == kinds["QED"]) | (kind == kinds["EOS"])).sum()) for kind in GOLDEN["input.ans_input_tps"]]
    end, slots = MODEL["query_eos"], MODEL["placeholder_ids"]
    composed, seen = compose_answers(texts, counts, end, len(ids[0]), slots)
    assert torch.equal(seen, mask) and torch.equal(composed[mask.bool()], ids[mask.bool()])


def test_loss_and_gradients_of_the_objective_on_the_model():
    weights = {**released_weights(), **GOLDEN.under("weight.")}
    for name, value in objective_on_model(MODEL, weights, GOLDEN.tensors, LOSS).items():
        GOLDEN.close(value, f"output.{name}", rtol=0)


# ---- for a set at other sizes


def random_weights(cases: dict, seed: int) -> dict[str, torch.Tensor]:
    sizes, text = cases["settings"], cases["text"]
    config = CLIPTextConfig(
        vocab_size=cases["query_vocab"],
        hidden_size=sizes["thid"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["layers"],
        num_attention_heads=sizes["theads"],
        max_position_embeddings=20,
        projection_dim=sizes["proj"],
    )
    states = randomise(CLIPTextModelWithProjection(config), seed).state_dict()
    weights = {f"clip_model.{key}": value for key, value in states.items() if "position_ids" not in key}
    projection = torch.randn(sizes["proj"], sizes["hid"]) / sizes["hid"] ** 0.5
    return {**weights, "imgque_projection.weight": projection, "logit_scale": torch.tensor(1.5)}


def remade(cases: dict, weights: dict, tensors: dict, slots: torch.Tensor) -> tuple[dict, dict]:
    """Outputs and settings of the loss."""
    settings = {"identity_weight": 0.5, "outlier_sigma": 1.5}
    sizes, kinds = cases["settings"], cases["token_types"]
    counts = [int((kind == kinds["QED"]).sum()) + 1 for kind in tensors["input.ans_input_tps"]]
    assert sum(counts) == len(slots) and counts[0] == sizes["n_l"]
    states = slots[torch.tensor(counts).cumsum(0) - 1]
    found = measure(cases, weights, tensors, states, slots, settings)
    found |= {"cl.query_eos_states": states, **objective_on_model(cases, weights, tensors, settings)}
    numbers = {"contrastive": "cl.loss_contrastive", "identity": "cl.loss_identity", "total": "cl.loss"}
    return found, {**settings, **{name: found[key].item() for name, key in numbers.items()}}
