"""Predicted tokens of an image = its placeholders = its features, for every preset and any size."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import reference_generation as reference
import reference_routing as routing
from builders import (
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    scaled_pinpoints,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)


# preset -> a budget that every image size allows (marks and protected views + 1 at most); None: no budget
PRESETS = {"llava_next": 40, "llava_hd": 40, "slime": 40, "slime_release": 40, "monkey": 40}
NUM_SIZES, NUM_FEATURES = 500, 40
TEXT = "a <image> b"


def random_sizes(count: int, seed: int, largest: int = 1200) -> list[tuple[int, int]]:
    """Log-uniform (height, width) pairs with extremes of shape at the front."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(largest), (count, 2))).round().astype(int)
    extremes = [(1, 1), (1, largest), (largest, 1), (55, 56), (56, 56), (57, 56), (112, 113)]
    return extremes + [(int(h), int(w)) for h, w in sizes][: count - len(extremes)]


@functools.cache
def build(preset: str):
    config = tiny_config(preset, connector_config=routing.SMALL_CONNECTORS.get(preset, {}))
    return tiny_model(config), tiny_processor(config)


@functools.cache
def flat_image(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), (height % 256, width % 256, 77))


all_presets = pytest.mark.parametrize("preset", PRESETS)
budgets = pytest.mark.parametrize("with_budget", [False, True], ids=["full", "budget"])


@budgets
@all_presets
def test_predicted_counts_equal_placeholders(preset, with_budget):
    config, processor = build(preset)[0].config, build(preset)[1]
    extra = {"max_image_tokens": PRESETS[preset]} if with_budget else {}
    sizes = random_sizes(NUM_SIZES, seed=1)
    predicted = [processor.image_tokens(height, width, **extra) for height, width in sizes]
    assert len(set(predicted)) >= 3
    assert predicted == processor._get_num_multimodal_tokens(sizes, **extra)["num_image_tokens"]
    for start in range(0, len(sizes), 50):
        part = slice(start, start + 50)
        batch = make_batch(processor, [(TEXT, [flat_image(*size)]) for size in sizes[part]], **extra)
        placeholders = (batch["input_ids"] == config.image_token_id).sum(1).tolist()
        assert placeholders == predicted[part], [
            (size, got, wanted)
            for size, got, wanted in zip(sizes[part], placeholders, predicted[part], strict=True)
            if got != wanted
        ]
        positions = batch["view_positions"]
        assert positions[positions[:, 8] == 1, 5].tolist() == placeholders
        rows = processor._get_num_multimodal_tokens(sizes[part], **extra)["num_image_patches"]
        assert sum(rows) == len(batch["pixel_values"]) == len(positions)
    if with_budget:
        assert max(predicted) == PRESETS[preset]


@budgets
@all_presets
@torch.no_grad()
def test_predicted_counts_equal_features(preset, with_budget):
    model, processor = build(preset)
    extra = {"max_image_tokens": PRESETS[preset]} if with_budget else {}
    sizes = random_sizes(NUM_FEATURES, seed=2)
    batch = make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **extra)
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    full = [processor.image_tokens(*size) for size in sizes]
    predicted = [processor.image_tokens(*size, **extra) for size in sizes]
    if model.model.connector.is_done_early:
        assert [len(tokens) for tokens in features] == predicted
        return
    assert [len(tokens) for tokens in features] == full  # the question has the last word, inside `forward`
    found = model(**batch, output_token_map=True)
    assert [len(part) for part in found.image_outputs.pooler_output] == predicted
    kept = [int(found.token_map.kept[found.token_map.image == image].sum()) for image in range(len(sizes))]
    for left, promised, count in zip(kept, predicted, full, strict=True):
        assert left == promised if promised < count else left <= count  # a budget goes before the threshold


@pytest.mark.parametrize("view_size", [56, 336])
def test_llava_next_counts_are_those_of_transformers(view_size):
    """Also at the released view size of 336 pixels, where rounding differs from the tiny one."""
    config = tiny_config("llava_next", tiny_vision_config("clip", view_size))
    processor = tiny_processor(config)
    size = {"height": view_size, "width": view_size}
    theirs = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=scaled_pinpoints(view_size)),
        plain_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    sizes = [*random_sizes(1000, seed=4, largest=5000), (14, 1296), (333, 1999), (4000, 400), (10000, 300)]
    expected = theirs._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    got = [processor.image_tokens(height, width) for height, width in sizes]
    assert got == expected, [row for row in zip(sizes, got, expected, strict=True) if row[1] != row[2]][:5]


@all_presets
@pytest.mark.parametrize("views", ["global", "crops"])
@torch.no_grad()
def test_counts_with_one_kind_of_view(preset, views):
    model, processor = build(preset)
    sizes = [(100, 180), (60, 50), (300, 90), (112, 112)]
    batch = make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], views=views)
    placeholders = (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    predicted = [processor.image_tokens(*size, views=views) for size in sizes]
    assert placeholders == predicted == [len(tokens) for tokens in features]
    full = make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes])
    whole = model.model.get_image_features(**geometry_of(full)).pooler_output
    kinds = [
        kinds for size in sizes for kinds in reference.full_visual_tokens(model, processor, [random_image(*size)])[1]
    ]
    for one, both, names in zip(features, whole, kinds, strict=True):
        own = {"global"} if views == "global" else {"crop", "mark" if preset.startswith("llava") else "crop"}
        wanted = [index for index, kind in enumerate(names) if kind in own]  # a mark between blocks needs two of them
        assert 0 < len(wanted) < len(both)
        torch.testing.assert_close(one, both[wanted], atol=1e-5, rtol=0)


@all_presets
@torch.no_grad()
def test_a_wrong_number_of_placeholders_names_both_numbers(preset):
    model, processor = build(preset)
    batch = make_batch(processor, [(TEXT, [random_image(100, 180)])])
    count = processor.image_tokens(100, 180)
    place = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    ids = torch.cat([batch["input_ids"][:, :place], batch["input_ids"][:, place + 1 :]], 1)
    with pytest.raises(ValueError, match=rf"{count - 1}\D.*{count}|{count}\D.*{count - 1}"):
        model(input_ids=ids, **geometry_of(batch))
