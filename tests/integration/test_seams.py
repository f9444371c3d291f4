"""Mechanisms that come next, sketched: each is one class and one registry line, and all else follows."""

import pytest
import torch

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from builders.sketches import SKETCHES
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.parts_hires_lmm import SLOTS


TEXT = "<image>What is it?"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, (slot, part) in SKETCHES.items():
        monkeypatch.setitem(SLOTS[slot], name, part)


def parts(preset="llava_next", vision="clip", **changes):
    config = tiny_config(preset, vision, **changes)
    return tiny_model(config), tiny_processor(config)


def ask(processor, *sizes, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **options)


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


def generated(model, batch):
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, do_sample=False)[:, length:].tolist()


def assert_batch_is_single(model, processor, *sizes, **options):
    together = generated(model, ask(processor, *sizes, **options))
    assert together == [generated(model, ask(processor, size, **options))[0] for size in sizes]


def second_tower(**connector):
    fine = tiny_vision_config("siglip", image_size=84, hidden_size=16)
    return parts(extra_towers={"fine": fine.to_dict()}, connector_config=connector)


def test_tokens_of_a_second_tower_enter_the_sequence():
    model, processor = second_tower(layout={"order": ["global", "crops", "detail"]})
    plain = parts(connector_config={"layout": {"order": ["global", "crops"]}})[1]
    batch = ask(processor, (90, 60))
    assert processor.image_tokens(90, 60) == plain.image_tokens(90, 60) + 36
    features = model.model.get_image_features(**geometry_of(batch), pixel_values_fine=batch["pixel_values_fine"])
    with torch.no_grad():
        hidden = model.model.extra_towers["fine"](batch["pixel_values_fine"], output_hidden_states=True).hidden_states
        wanted = model.model.connector.tower_adapters["fine"](hidden[-1], int(Kind.DETAIL))
    torch.testing.assert_close(features.pooler_output[0][-36:], wanted[0])
    assert_batch_is_single(model, processor, (90, 60), (40, 200))


@torch.no_grad()
def test_a_second_part_with_tokens_of_its_own():
    """Two images in a row, and generation on a cache equal to none."""
    model, processor = parts(connector_config={"token_ops": [{"part": "ends"}]})
    assert {processor.image_tokens(*size) for size in ((90, 60), (40, 200), (900, 900))} == {2}
    batch = make_batch(processor, [("<image>a<image>b", [random_image(90, 60), random_image(40, 200)])])
    found = generated(model, batch)[0]
    ids = batch["input_ids"]
    for number, token in enumerate(found):
        so_far = torch.cat([ids, torch.tensor([found[:number]], dtype=torch.long)], dim=1)
        logits = model(**{**batch, "input_ids": so_far, "attention_mask": torch.ones_like(so_far)}).logits
        assert int(logits[0, -1].argmax()) == token
    assert_batch_is_single(model, processor, (90, 60), (40, 200))
