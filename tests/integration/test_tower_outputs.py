"""Outputs: the images with what the tower gave where it is asked for; tuples hold what dicts hold."""

import pytest
import torch
from transformers.utils import ModelOutput

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor
from reference_routing import SMALL_CONNECTORS


@pytest.fixture(scope="module")
def parts():
    config = tiny_config("llava_next")
    model, processor = tiny_model(config), tiny_processor(config)
    model.set_attn_implementation("eager")
    return model, geometry_of(make_batch(processor, [("<image>", [random_image(90, 130)])]))


@pytest.fixture(scope="module")
def tower(parts):
    """What the tower itself gives."""
    model, batch = parts
    with torch.no_grad():
        output = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3 and len(batch["pixel_values"]) > 2
    return output


@pytest.mark.parametrize("chunk", [None, 2])
@torch.no_grad()
def test_the_states_are_those_of_the_tower(parts, tower, chunk):
    model, batch = parts
    found = model.get_image_features(
        **batch, vision_chunk_size=chunk, output_hidden_states=True, output_attentions=True
    )
    torch.testing.assert_close(found.hidden_states, tower.hidden_states)
    torch.testing.assert_close(found.attentions, tower.attentions)


@torch.no_grad()
def test_the_configuration_of_the_tower_decides(parts, tower):
    model, batch = parts
    config = model.model.vision_tower.config
    config.output_hidden_states = config.output_attentions = True
    try:
        found = model.get_image_features(**batch)
        none = model.get_image_features(**batch, output_hidden_states=False, output_attentions=False)
    finally:
        config.output_hidden_states = config.output_attentions = False
    torch.testing.assert_close(found.hidden_states, tower.hidden_states)
    torch.testing.assert_close(found.attentions, tower.attentions)
    assert none.hidden_states is None and none.attentions is None


@pytest.mark.parametrize("preset", ["slime", "llava_next"])
@torch.no_grad()
def test_tuples_hold_what_dicts_hold(preset):
    config = tiny_config(preset, connector_config=SMALL_CONNECTORS.get(preset, {}))
    model, processor = tiny_model(config), tiny_processor(config)
    batch = make_batch(processor, [("<image> What is it?", [random_image(90, 130)])])
    for network in (model, model.model):
        named = network(**batch, use_cache=False, output_hidden_states=True)
        assert {"image_outputs", "kept_mask", "hidden_states"} <= named.keys()
        plain = network(**batch, use_cache=False, output_hidden_states=True, return_dict=False)
        found, wanted = ([*leaves(output)] for output in (plain, named.values()))
        assert len(found) > 10
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def leaves(output):
    """The tensors of a nested output in order."""
    for value in output:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from leaves(value)
        elif isinstance(value, ModelOutput):
            yield from leaves(value.values())


@pytest.mark.parametrize("chunk", [None, 2])
@torch.no_grad()
def test_the_output_carries_what_the_tower_gave_for_its_images(parts, tower, chunk, monkeypatch):
    model = parts[0]
    monkeypatch.setattr(model.config, "vision_chunk_size", chunk)
    whole = make_batch(tiny_processor(model.config), [("<image>What is it?", [random_image(90, 130)])])
    asked = {"output_hidden_states": True, "output_attentions": True}
    for network in (model, model.model):
        images = network(**whole, **asked).image_outputs
        torch.testing.assert_close(images.hidden_states, tower.hidden_states)
        torch.testing.assert_close(images.attentions, tower.attentions)
        read = tower.hidden_states[model.config.vision_feature_layer]
        torch.testing.assert_close(images.last_hidden_state, read)
        assert network(**whole).image_outputs.hidden_states is None
        assert network(input_ids=torch.tensor([[1, 2]])).image_outputs is None


@pytest.mark.parametrize("preset", ["slime", "llava_next", "vlsa", "fusion"])
@torch.no_grad()
def test_the_images_of_an_output_hold_what_was_spliced_and_serve_a_further_call(preset):
    config = tiny_config(preset, connector_config=SMALL_CONNECTORS.get(preset, {}))
    model, processor = tiny_model(config), tiny_processor(config)
    samples = [("<image> What is it?", [random_image(90, 130)]), ("<image> Who?", [random_image(50, 40, 1)])]
    batch, seen = make_batch(processor, samples), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model.model(**batch)
    images, ids, real = output.image_outputs.pooler_output, batch["input_ids"], batch["attention_mask"].bool()
    packed = real if output.packed_attention_mask is None else output.packed_attention_mask.bool()
    assert output.kept_mask.all() == (preset != "slime")
    wanted = model.get_input_embeddings()(ids)
    for row, part in enumerate(images):
        wanted[row, ids[row] == config.image_token_id] = part
        torch.testing.assert_close(seen[0][row, packed[row]], wanted[row, output.kept_mask[row] & real[row]])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    again = model.model(**text, mm_encoder_outputs={"image": output.image_outputs})
    torch.testing.assert_close(again.last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_the_layer_of_features_is_that_of_the_configuration_or_of_the_call():
    model = tiny_model(tiny_config("llava_next"))
    batch = make_batch(tiny_processor(model.config), [("<image>What is it?", [random_image(90, 130)])])
    views = geometry_of(batch)
    features = model.get_image_features(**views, vision_feature_layer=1)
    text = {"input_ids": batch["input_ids"], "mm_encoder_outputs": {"image": features}}
    wanted, written = model(**text).logits, model.generate(**text, max_new_tokens=4, do_sample=False)
    assert not torch.allclose(model(**batch).logits, wanted)
    model.config.vision_feature_layer = 1
    torch.testing.assert_close(model(**batch).logits, wanted)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), written)


WRONG = {
    "limits of the processor": ({"max_image_tokens": 30}, "max_image_tokens=30 is no argument of the model"),
    "an option of a part": ({"gamma": 0.5}, "gamma=0.5 is no argument of the model"),
    "a short mask": ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has the shape \(1, 3\), expected \(1, "),
    "short labels": ({"labels": torch.ones(1, 3, dtype=torch.long)}, r"labels have the shape \(1, 3\), expected"),
    "views at once": ({"vision_chunk_size": 2}, "vision_chunk_size=2 is no argument of the model.* configuration or"),
    "a layer": ({"vision_feature_layer": 1}, "vision_feature_layer=1 is no argument of the model"),
    "a bare tensor": ({"mm_encoder_outputs": {"image": torch.ones(2, 3)}}, "is a Tensor; pass what get_image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_a_call_are_named(parts, name):
    model, _ = parts
    batch = dict(make_batch(tiny_processor(model.config), [("<image>What is it?", [random_image(90, 130)])]))
    changes, message = WRONG[name]
    if "mm_encoder_outputs" in changes:
        batch = {"input_ids": batch["input_ids"]}
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **changes})
