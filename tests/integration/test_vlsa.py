"""The preset `vlsa`: the same number of tokens for every image, and checkpoints without triton."""

import functools

import numpy as np
import pytest
import torch

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.conversion import preset_processor


TOKENS = 16  # of the tiny tower; 576 of the real one
SIZES = [(100, 180), (57, 30), (300, 90), (1, 1), (56, 56), (57, 113), (1200, 5)]


@functools.cache
def build():
    config = tiny_config("vlsa")
    return tiny_model(config, seed=2), tiny_processor(config)


# ---- counts


def test_every_size_has_576_tokens():
    """Without pixels: all sides from 100 to 6000 pixels on a grid, and random ones."""
    processor = preset_processor("vlsa")
    sides = [*range(100, 6001, 59), 6000]
    rng = np.random.default_rng(0)
    sizes = [(h, w) for h in sides[::4] for w in sides[::4]] + [(side, side) for side in sides]
    sizes += [(int(h), int(w)) for h, w in rng.integers(100, 6001, (500, 2))]
    for extra in ({}, {"max_crops": 6}, {"views": "global"}, {"unpad": True, "global_view": "pad"}):
        assert {processor.image_tokens(*size, **extra) for size in sizes} == {576}
    plans = [processor.image_processor.plan(*size) for size in ((100, 100), (337, 336), (2000, 3000), (6000, 6000))]
    assert [len(plan.views) - 1 for plan in plans] == [0, 2, 35, 36]


@torch.no_grad()
def test_a_smaller_budget_keeps_the_most_salient_tokens_and_a_larger_one_changes_nothing():
    processor = preset_processor("vlsa")
    for budget in (576, 577, 5000):
        assert processor.image_tokens(2000, 3000, max_image_tokens=budget) == 576
    assert [processor.image_tokens(2000, 3000, max_image_tokens=budget) for budget in (575, 1)] == [575, 1]
    assert processor.min_image_tokens(2000, 3000) == 1
    model, processor = build()
    images = [random_image(60, 50), random_image(100, 180)]
    found = model(**make_batch(processor, [("<image>" * 2, images)], max_image_tokens=9), output_token_map=True)
    for image, tokens in enumerate(found.image_outputs.pooler_output):
        score, kept = (
            values[found.token_map.image == image] for values in (found.token_map.score, found.token_map.kept)
        )
        assert (len(tokens), len(kept), int(kept.sum())) == (9, TOKENS, 9)
        assert score[kept].min() >= score[~kept].max()
    with pytest.raises(ValueError, match=r"has no tokens with views='crops'; take other views\.$"):
        processor(text="<image>", images=images[0], views="crops")


@pytest.mark.parametrize(
    "extra",
    [{}, {"views": "global"}, {"unpad": True, "global_view": "pad"}, {"max_crops": 2}],
    ids=str,
)
@torch.no_grad()
def test_the_model_makes_as_many_tokens_as_promised(extra):
    """Whatever is asked of the planner, the low-resolution view enters as a whole."""
    model, processor = build()
    batch = make_batch(processor, [("a <image> b", [random_image(*size)]) for size in SIZES], **extra)
    features = model.model.get_image_features(**geometry_of(batch))
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(TOKENS, 32)] * len(SIZES)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [TOKENS] * len(SIZES)
    assert features.tokens.aux["global_embedding"].shape == (len(SIZES), 32)
    assert model(**batch, output_token_map=True).token_map.kept.all()


@torch.no_grad()
def test_every_crop_and_the_global_view_matter():
    model, processor = build()
    batch = make_batch(processor, [("<image>", [random_image(100, 180)])])
    wanted = model(**batch).logits
    for view in range(len(batch["pixel_values"])):
        changed = dict(batch)
        changed["pixel_values"] = batch["pixel_values"].clone()
        changed["pixel_values"][view] = changed["pixel_values"][view].flip(-1)
        assert (model(**changed).logits - wanted).abs().max() > 1e-3, view
