"""Captions of single tokens: what they say, what the loss measures, and which models can learn them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from builders.needle import joined, run_options, scene_set
from hires_lmm.training import get_plan
from needle import NeedleOptions
from needle.runs import SceneSet, cache_scenes, near_options, small_rates, train
from needle.runs.captions import (
    NO_WORD,
    CaptionCollator,
    SceneCaptions,
    can_learn_captions,
    caption_loss,
)
from needle.runs.collator import Near
from needle.runs.run import LOG
from needle.scenes import Scene, SceneObject


def item(kind, value, colour, top, left, place):
    """An object of 12 x 12 scene pixels."""
    return SceneObject(kind, value, colour, top, left, 12, 12, 0, False, place, True)


def said(processor, ids):
    """View, token -> words, without the tokens that say one word."""
    tokenizer = processor.tokenizer
    words = [[[tokenizer.decode([i]) for i in token if i != NO_WORD] for token in view] for view in ids.tolist()]
    return {(v, t): token for v, view in enumerate(words) for t, token in enumerate(view) if len(token) > 1}


def test_captions_stand_where_the_middle_of_an_object_lies():
    _, processor = joined()
    scene = Scene(
        (item("digit", "7", "red", 100, 20, "top left"), item("word", "bus", "blue", 350, 300, "bottom right")),
        "sky",
        "train",
        0,
        NeedleOptions(),
    )  # 384 pixels: patches of the global view are 48 wide, crops 64, tokens of a crop 32
    whole, crops = SceneCaptions(processor.tokenizer, (8, 8), (2, 2))(scene)
    assert whole.shape[:2] == (1, 64) and crops.shape[:2] == (36, 4)
    assert said(processor, whole) == {
        (0, 2 * 8 + 0): ["object", "red", "top", "left"],
        (0, 7 * 8 + 6): ["object", "blue", "bottom", "right"],
    }
    assert said(processor, crops) == {  # middles at (106, 26) and (356, 306)
        (1 * 6 + 0, 1 * 2 + 0): ["red", "digit", "7"],
        (5 * 6 + 4, 1 * 2 + 1): ["blue", "word", "bus"],
    }
    background = processor.tokenizer.convert_tokens_to_ids("sky")
    assert whole[0, 0].tolist() == [background, *[NO_WORD] * (whole.shape[2] - 1)]
    near = replace(
        scene, options=near_options(scene.options), objects=(item("shape", "ring", "red", 40, 8, "top left"),)
    )
    whole, crops = SceneCaptions(processor.tokenizer, (8, 8), (2, 2))(replace(near))
    assert said(processor, whole) == {(0, 5 * 8 + 1): ["object", "red", "shape", "ring", "top", "left"]}
    assert said(processor, crops) == {(0, 1 * 2 + 0): ["red", "shape", "ring"]}, "one view, as a crop"


def test_the_loss_is_the_relative_distance_to_summed_embeddings_with_groups_alike():
    words = torch.nn.Embedding(5, 3)
    captions = torch.tensor([[[0, NO_WORD], [1, 2], [0, NO_WORD], [3, 4]]])
    right = torch.stack(
        [words.weight[0], words.weight[1] + words.weight[2], words.weight[0], words.weight[[3, 4]].sum(0)]
    )
    tokens = right.clone()
    tokens[2] = 0  # half of the background tokens
    tokens[3] = 0
    connector = SimpleNamespace(
        adapt=lambda views: replace(views, groups=[replace(group, features=tokens[None]) for group in views.groups])
    )
    model = SimpleNamespace(
        connector=connector, config=SimpleNamespace(patch_grid=(2, 2)), get_input_embeddings=lambda: words
    )
    loss = caption_loss(model, {"global_views": torch.zeros(1, 4, 3), "global_captions": captions})
    several = right[3].square().sum() / (right[1].square().sum() + right[3].square().sum())
    torch.testing.assert_close(loss, 0.5 * several + 0.5 * 0.5)
    tokens.copy_(right)
    assert caption_loss(model, {"global_views": torch.zeros(1, 4, 3), "global_captions": captions}) == 0


def test_batches_hold_the_crops_with_objects_and_as_many_without(tmp_path):
    model, processor = joined()
    scenes = scene_set(3, "train")
    store = cache_scenes(model, processor, scenes, tmp_path)
    captions = SceneCaptions(processor.tokenizer, *(grid.size for grid in model.model.connector.layout.grids.values()))
    batch = CaptionCollator(captions, scenes, store, "all")([{"scene": 1, "visit": 0}])
    features = store.first_views([1], 37)
    torch.testing.assert_close(batch["global_views"], features[:1])
    crops = captions(scenes.scene(1))[1]
    speaks = (crops != NO_WORD).sum((1, 2)) > 4
    assert len(batch["crop_views"]) == 2 * speaks.sum()
    for views, ids in zip(batch["crop_views"], batch["crop_captions"], strict=True):
        (number,) = (features[1:] == views).all(dim=(1, 2)).nonzero()[0].tolist()
        assert torch.equal(crops[number], ids)
    other = CaptionCollator(captions, scenes, store, "all")([{"scene": 1, "visit": 1}])
    assert not torch.equal(batch["crop_views"], other["crop_views"]), "other empty crops at another visit"
    assert set(CaptionCollator(captions, scenes, store, "crops")([{"scene": 1, "visit": 0}])) == {
        "crop_views",
        "crop_captions",
    }
    near = SceneSet("train", 3, options=near_options(scenes.options))
    close = Near(near, cache_scenes(model, processor, near, tmp_path), 1.0)
    batch = CaptionCollator(captions, scenes, store, "global", close)([{"scene": 2, "visit": 0}])
    assert any(torch.equal(batch["global_views"], close.store.first_views([number], 1)) for number in range(3))
    batch = CaptionCollator(captions, scenes, store, "crops", close)([{"scene": 2, "visit": 0}])
    assert any(torch.equal(batch["crop_views"], close.store.first_views([number], 1)) for number in range(3))


def test_stages_without_language_model_learn_captions_and_the_others_answers(tmp_path):
    model, processor = joined()
    stages = small_rates(get_plan("slime"))
    options = run_options(tmp_path / "cache", (8, 0, 8, 2), captions=True, caption_batch_size=2, caption_views=4)
    language = {name: value.clone() for name, value in model.model.language_model.state_dict().items()}
    train(model, processor, stages[:3], tmp_path / "run", replace(options, visits=(8, 0, 8)))
    assert all(torch.equal(value, language[n]) for n, value in model.model.language_model.state_dict().items())
    train(model, processor, stages, tmp_path / "run", options)
    log = json.loads((tmp_path / "run" / LOG).read_text())["stages"]
    assert [(stage["loss_of"], stage["batch_size"]) for stage in log] == [
        ("captions", 2),
        ("captions", 2),
        ("answers", 2),
    ]
    assert log[0]["loss"][0][1] > log[0]["loss"][-1][1], "the loss falls"


@pytest.mark.parametrize(
    ("preset", "able"), [("slime", True), ("llava_next", True), ("vlsa", False), ("fusion", False)]
)
def test_captions_are_for_connectors_whose_tokens_are_places(tmp_path, preset, able):
    model, processor = joined(preset)
    assert can_learn_captions(model.model.connector) is able
    if not able:
        plan = small_rates(get_plan("end_to_end"))
        with pytest.raises(ValueError, match=r"cannot learn captions.*captions=False"):
            train(model, processor, plan, tmp_path, run_options(tmp_path / "cache", (2, 0), captions=True))
