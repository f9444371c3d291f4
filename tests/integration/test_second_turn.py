"""A second turn with the whole conversation and a cache: right where the cache lines up, an error where it cannot."""

import pytest
import torch

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.modeling.compat_hires_lmm import CACHE


TURN_ONE = "<image>\nHow many cats are there? "
SECOND = "Two. And here? <image>\nTell me. "
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
THRESHOLD = [{"part": "router", "keep": {"rule": "threshold", "gamma": 0.5}}]


def build(token_ops=None):
    changes = {} if token_ops is None else {"connector_config": {"token_ops": token_ops}}
    config = tiny_config("llava_hd", **changes)
    model = tiny_model(config)
    model.generation_config.suppress_tokens = [config.image_token_id]  # an answer must not hold image tokens
    return model, tiny_processor(config)


def turns(processor, model, images, budget=None):
    """Inputs of turn one, what it generated, and inputs of both turns that open with the same ids."""
    extra = {} if budget is None else {"max_image_tokens": budget}
    first = make_batch(processor, [(TURN_ONE, images[:1])], **extra)
    out = model.generate(**first, **OPTIONS)
    both = make_batch(processor, [(TURN_ONE + SECOND, images)], **extra)
    cached = out[CACHE].get_seq_length()
    shared = out.sequences.shape[1] - 1
    new = both["input_ids"][:, first["input_ids"].shape[1] :]
    both["input_ids"] = torch.cat([out.sequences[:, :shared], new], dim=1)
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    return both, out[CACHE], cached


@pytest.mark.parametrize("budget", [None, 40])
def test_a_new_image_in_the_second_turn_gets_its_own_features(budget):
    model, processor = build()
    images = [random_image(100, 180, 0), random_image(120, 100, 1)]
    both, cache, cached = turns(processor, model, images, budget)
    assert cached < both["input_ids"].shape[1]
    fresh = model.generate(**both, **OPTIONS)
    continued = model.generate(**both, **{CACHE: cache}, **OPTIONS)
    assert continued.sequences.tolist() == fresh.sequences.tolist()
    torch.testing.assert_close(continued.logits[0], fresh.logits[0], atol=1e-4, rtol=1e-4)


def test_after_dropping_by_threshold_the_whole_conversation_is_refused():
    model, processor = build(THRESHOLD)
    model.config.answer_prefix_ids = None
    images = [random_image(100, 180, 0), random_image(120, 100, 1)]
    both, cache, _ = turns(processor, model, images)
    with pytest.raises(ValueError, match="Pass only the new ids"):
        model.generate(**both, **{CACHE: cache}, **OPTIONS)
    without_pixels = {key: both[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="Pass only the new ids"):
        model.generate(**without_pixels, **{CACHE: cache}, **OPTIONS)


def test_images_that_were_forgotten_are_an_error():
    model, processor = build()
    batch = make_batch(processor, [(TURN_ONE, [random_image(100, 180, 0)])])
    with pytest.raises(ValueError, match="image tokens, but no images were passed"):
        model.generate(input_ids=batch["input_ids"], max_new_tokens=2)
    pixels = batch.pop("pixel_values")
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(**batch, pixel_value=pixels)
    with pytest.raises(ValueError, match="mm_encoder_outputs is"):
        model(input_ids=batch["input_ids"], mm_encoder_outputs={"image_features": pixels})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_token_id": -1}, "image_token_id=-1 is no token"),
        ({"image_token_id": 10**9}, "image_token_id=1000000000 is no token"),
        ({"vision_feature_layer": -99}, "vision_feature_layer=-99 does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_the_model_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(tiny_config("llava_hd", **changes))
