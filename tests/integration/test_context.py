"""Prompts that are longer than the language model reads."""

import pytest
import torch

from builders.chat import chat, fusion_setup
from builders.tiny import make_batch, random_image, tiny_model, tiny_processor
from builders.training import slime_config
from hires_lmm.modeling.compat_hires_lmm import CACHE


WORDS = "what is on the left of this picture and what is right"


def shortened(model, length: int):
    model.config.text_config.max_position_embeddings = length
    return model


@pytest.mark.parametrize("kind", ["budget", "threshold", "fusion"])
@pytest.mark.parametrize("modes", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_generate_reads_what_fits_and_refuses_one_more(kind, modes):
    """The tokens that are kept count, not placeholders nor padding; both numbers and the remedy are named."""
    if kind == "fusion":
        model, processor = fusion_setup()
        text, before = processor.apply_chat_template(chat(2)), model.config.text_config.max_position_embeddings
    else:
        ops = (
            []
            if kind == "budget"
            else [{"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.5}}]
        )
        config = slime_config(token_ops=ops)
        model, processor = tiny_model(config).eval(), tiny_processor(config, "chatml")
        text, before = f"<image>{WORDS}", config.text_config.max_position_embeddings
    batch = make_batch(processor, [(text, [random_image(100, 130)])])
    with torch.no_grad():
        kept = int(model(**batch).kept_mask.sum())
    length = batch["input_ids"].shape[1]
    assert (kept < length) == (kind == "threshold")
    options = {"max_new_tokens": 2, "do_sample": False, **modes}
    padded = processor(
        text=text, images=random_image(100, 130), padding="max_length", max_length=length + 9, return_tensors="pt"
    )
    assert padded["input_ids"].shape[1] == length + 9
    try:
        wanted = model.generate(**batch, **options)
        shortened(model, kept)
        assert torch.equal(model.generate(**batch, **options), wanted)
        assert model.generate(**padded, **options).shape[1] == wanted.shape[1] + 9
        shortened(model, kept - 1)
        for inputs in (batch, padded):
            with pytest.raises(
                ValueError, match=rf"prompt has {kept} tokens, more than the {kept - 1} .*max_image_tokens"
            ):
                model.generate(**inputs, **options)
    finally:
        shortened(model, before)


def test_a_second_turn_on_a_cache_counts_what_the_cache_holds():
    config = slime_config(token_ops=[])
    model, processor = tiny_model(config).eval(), tiny_processor(config, "chatml")
    first = make_batch(processor, [("<image>what", [random_image(60, 60)])])
    whole = make_batch(processor, [("<image>what <image>that", [random_image(60, 60), random_image(50, 90)])])
    length, seen = whole["input_ids"].shape[1], first["input_ids"].shape[1]
    shortened(model, length - 1)
    with torch.no_grad():
        cache = model(**first, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=rf"prompt has {length} tokens, more than the {length - 1}"):
        model.generate(**whole, **{CACHE: cache}, max_new_tokens=2)
    assert seen < length
