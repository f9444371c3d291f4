"""Tokens of objects whose boxes the caller gives (MG-LLaVA): values, counts, generation, training, refusals."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders import make_batch, random_image, tiny_config, tiny_convnext, tiny_model, tiny_processor
from builders.training import make_trainer
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.training import HiResLmmCollator, Stage


TEXT = "<image>What is it?"
SIZES = ((90, 60), (40, 200), (56, 56))
BOXES = ([[10, 5, 61.5, 40], [0, 0, 90, 60]], [], [[3, 3, 4, 4], [20, 9, 56, 30], [1, 0, 30, 56]])  # in each of SIZES


def parts(preset="mg_llava", **changes):
    config = tiny_config(preset, **changes)
    return tiny_model(config), tiny_processor(config, "chatml")


@pytest.fixture(scope="module")
def model_and_processor():
    return parts()


def ask(processor, sizes=SIZES, boxes=BOXES, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], image_boxes=list(boxes), **options)


def generated(model, batch, **options):
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, do_sample=False, **options)[:, length:].tolist()


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


def features_of(model, batch):
    return model.model.get_image_features(
        **{name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    )


# ---- values against RoIAlign by hand ------------------------------------------------------------------------------
def at(plane: np.ndarray, y: float, x: float) -> np.ndarray:
    """A map `(h, w, C)` between its cells, at a point in cells from the top left cell's index 0."""
    high, wide = plane.shape[:2]
    y, x = min(max(y, 0.0), high - 1), min(max(x, 0.0), wide - 1)
    top, left = math.floor(y), math.floor(x)
    down, right = min(top + 1, high - 1), min(left + 1, wide - 1)
    a, b = y - top, x - left
    upper = (1 - b) * plane[top, left] + b * plane[top, right]
    return (1 - a) * upper + a * ((1 - b) * plane[down, left] + b * plane[down, right])


def enlarged(plane: np.ndarray, side: int) -> np.ndarray:
    """A square map interpolated to another side, cell centres on cell centres."""
    scale = len(plane) / side
    places = [(number + 0.5) * scale - 0.5 for number in range(side)]
    return np.array([[at(plane, y, x) for x in places] for y in places])


def mean_in(plane: np.ndarray, box: list[float], bins: int) -> np.ndarray:
    """The mean over bins of a box (fractions of the map), each the mean of its points."""
    side = len(plane)
    top, left = box[0] * side, box[1] * side
    high, wide = max(box[2] * side - top, 1.0), max(box[3] * side - left, 1.0)
    down, across = math.ceil(high / bins), math.ceil(wide / bins)
    found = [
        at(plane, top + (row + (i + 0.5) / down) * high / bins, left + (col + (j + 0.5) / across) * wide / bins)
        for row in range(bins)
        for col in range(bins)
        for i in range(down)
        for j in range(across)
    ]
    return np.mean(found, axis=0)


@pytest.mark.parametrize("bins", [1, 3, 5])
@torch.no_grad()
def test_a_token_is_the_mean_of_all_stages_inside_its_box(bins):
    ops = [{"part": "object_tokens", "bins": bins}, {"part": "conv_gate"}]
    model, processor = parts(connector_config={"view_ops": ops})
    batch = ask(processor)
    tower, adapter = model.model.extra_towers["hires"], model.model.connector.tower_adapters["objects"]
    found = features_of(model, batch)
    stages = tower(batch["pixel_values_hires"], output_hidden_states=True).hidden_states[1:]
    for image, (size, boxes) in enumerate(zip(SIZES, BOXES, strict=True)):
        maps = [stage[image].permute(1, 2, 0).double().numpy() for stage in stages]
        plane = np.concatenate([enlarged(each, len(maps[0])) for each in maps], axis=-1)
        assert plane.shape == (16, 16, 8 + 16)
        tokens = found.pooler_output[image]
        assert len(tokens) == 16 + len(boxes)
        for box, token in zip(boxes, tokens[16:], strict=True):
            inside = mean_in(plane, [edge / side for edge, side in zip(box, 2 * size, strict=True)], bins)
            wanted = adapter(torch.from_numpy(inside).float()[None, None], int(Kind.OBJECT))[0, 0]
            torch.testing.assert_close(token, wanted, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_padded_picture_has_its_boxes_where_the_tower_sees_them():
    """The second tower sees the picture padded as the global view is, and the same place gives the same token."""
    model, processor = parts(planner={"name": "multiple", "views": "global", "global_view": "pad"})
    picture = random_image(40, 80)
    batch = make_batch(processor, [(TEXT, [picture])], image_boxes=[[[10, 0, 30, 40]]])
    pixels = batch["pixel_values_hires"][0]
    black = pixels[:, :1, :1]
    assert torch.equal(pixels[:, :16], black.expand(-1, 16, 64)) and torch.equal(
        pixels[:, 48:], black.expand(-1, 16, 64)
    )
    assert not (pixels[:, 16:48] == black).all(dim=0).any()
    assert batch["image_boxes"].tolist() == [[[24576, 0, 40960, 32768]]]
    square = random_image(80, 80)
    square.paste((0, 0, 0), (0, 0, 80, 80))
    square.paste(picture, (0, 20))
    other = make_batch(processor, [(TEXT, [square])], image_boxes=[[[30, 0, 50, 40]]])
    assert torch.equal(other["image_boxes"], batch["image_boxes"])
    token, same = (features_of(model, each).pooler_output[0][-1] for each in (batch, other))
    torch.testing.assert_close(token, same, atol=0.1, rtol=0.1)  # the picture was resized in another place


@pytest.mark.parametrize("views", ["global", "all", "crops"])
def test_a_box_outside_of_the_middle_square_is_refused_and_one_across_its_edge_is_cut(views):
    """`square="crop"` takes rows 25 to 125 of 150: what shows nothing of a box has no token to give."""
    _, processor = parts(planner={"name": "multiple", "square": "crop", "views": views})

    def ask_for(box):
        return make_batch(processor, [(TEXT, [random_image(150, 100)])], image_boxes=[[box]])["image_boxes"]

    assert ask_for([0, 10, 75, 50]).tolist() == [[[0, 6554, 32768, 32768]]]
    for box in ([0, 0, 25, 100], [125, 0, 150, 100]):
        with pytest.raises(ValueError, match=r"the model sees \(top 25, left 0, bottom 125, right 100\) alone"):
            ask_for(box)
        with pytest.raises(ValueError, match="the model sees"):
            processor.image_processor.count_images([(150, 100)], image_boxes=[[box]])


def test_boxes_in_any_number_format_are_the_same_boxes(model_and_processor):
    _, processor = model_and_processor

    def ask_for(boxes):
        return make_batch(processor, [(TEXT, [random_image(90, 60)])], image_boxes=[boxes])["image_boxes"].tolist()

    boxes = torch.tensor([[1, 2, 30, 40]])
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        assert ask_for(boxes.to(dtype)) == ask_for(boxes.tolist())


def test_a_mask_is_the_box_around_it(model_and_processor):
    processor = model_and_processor[1]
    masks = np.zeros((2, 90, 60), dtype=bool)
    masks[0, 10:41, 5] = masks[0, 20, 5:33] = True
    masks[1, 89, 59] = True
    by_mask = ask(processor, SIZES[:1], [masks])
    by_box = ask(processor, SIZES[:1], [[[10, 5, 41, 33], [89, 59, 90, 60]]])
    assert torch.equal(by_mask["image_boxes"], by_box["image_boxes"])
    assert torch.equal(ask(processor, SIZES[:1], [torch.from_numpy(masks)])["image_boxes"], by_box["image_boxes"])


# ---- counts -------------------------------------------------------------------------------------------------------
def test_tokens_are_counted_from_size_budget_and_number_of_objects(model_and_processor):
    model, processor = model_and_processor
    for views in ("global", "all"):
        for size, boxes in zip(SIZES, BOXES, strict=True):
            plain = processor.image_tokens(*size, views=views)
            assert processor.image_tokens(*size, num_objects=len(boxes), views=views) == plain + len(boxes)
            for budget in (1, 7, plain + len(boxes)):
                batch = ask(processor, [size], [boxes], views=views, max_image_tokens=budget)
                assert int((batch["input_ids"] == model.config.image_token_id).sum()) == budget
                assert len(features_of(model, batch).pooler_output[0]) == budget
    counts = processor.image_processor.count_images(list(SIZES), image_boxes=list(BOXES))[0]
    assert counts == [18, 16, 19] == processor.image_processor.count_images(list(SIZES), [2, 0, 3])[0]
    with pytest.raises(ValueError, match="num_objects=-1 of image 0 must be an integer of at least 0"):
        processor.image_tokens(90, 60, num_objects=-1)


@torch.no_grad()
def test_the_token_map_names_objects(model_and_processor):
    model, processor = model_and_processor
    found = model(**ask(processor), output_token_map=True).token_map
    assert [int((found.kind[found.image == image] == Kind.OBJECT).sum()) for image in range(3)] == [2, 0, 3]
    is_object = found.kind == Kind.OBJECT
    assert found.cell[is_object].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0], [2, 0]]
    assert found.view[is_object].tolist() == [-1] * 5 and bool(found.box[is_object].isnan().all())


# ---- the same in every way ----------------------------------------------------------------------------------------
def test_a_batch_of_different_numbers_is_each_row_alone(model_and_processor):
    model, processor = model_and_processor
    together = generated(model, ask(processor))
    alone = [generated(model, ask(processor, [size], [own]))[0] for size, own in zip(SIZES, BOXES, strict=True)]
    assert together == alone
    assert generated(model, ask(processor), num_beams=2) == generated(
        model, ask(processor), num_beams=2, use_cache=False
    )
    none = generated(model, ask(processor, boxes=[[], None, ()]))
    assert none == generated(model, make_batch(processor, [(TEXT, [random_image(*size)]) for size in SIZES]))
    assert none[1] == together[1] and none[0] != together[0]
    features = features_of(model, ask(processor))
    text = {name: ask(processor)[name] for name in ("input_ids", "attention_mask")}
    assert generated(model, {**text, "mm_encoder_outputs": {"image": features}}) == together


@torch.no_grad()
def test_two_images_of_a_row_have_their_own_objects(model_and_processor):
    model, processor = model_and_processor
    pictures = [random_image(*size) for size in SIZES]
    batch = make_batch(processor, [("<image>a<image>b<image>c", pictures)], image_boxes=list(BOXES))
    found = features_of(model, batch).pooler_output
    for own, size, boxes in zip(found, SIZES, BOXES, strict=True):
        torch.testing.assert_close(own, features_of(model, ask(processor, [size], [boxes])).pooler_output[0])


def test_a_saved_model_reads_the_same_boxes(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "image_boxes" not in (tmp_path / "processor_config.json").read_text()
    again = AutoProcessor.from_pretrained(tmp_path)
    batch = ask(again)
    assert torch.equal(batch["image_boxes"], ask(processor)["image_boxes"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, ask(processor)))


@torch.no_grad()
def test_the_main_tower_gives_object_tokens_of_any_preset():
    layout = {
        "order": ["global", "crops", "objects"],
        "separators": {"newline": {"place": "token_row_end", "on": "crops"}},
    }
    model, processor = parts(
        "llava_next", connector_config={"view_ops": [{"part": "object_tokens"}], "layout": layout}
    )
    batch = ask(processor, [(56, 56)], [[[0, 0, 28, 56]]])
    states = model.model.vision_tower(batch["pixel_values"][:1], output_hidden_states=True).hidden_states[-2][:, 1:]
    wanted = mean_in(states.view(4, 4, 32).double().numpy(), [0, 0, 0.5, 1], 56)
    adapter = model.model.connector.tower_adapters["objects"]
    token = features_of(model, batch).pooler_output[0][-1]
    torch.testing.assert_close(
        token, adapter(torch.from_numpy(wanted).float()[None, None], 5)[0, 0], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_geometry_that_was_read_before_serves_the_call(model_and_processor):
    model, processor = model_and_processor
    batch = ask(processor)
    geometry = model.model.read_images(batch["view_positions"], batch["view_spans"], batch["image_boxes"])
    assert [image.num_objects for image in geometry] == [2, 0, 3]
    rest = {name: value for name, value in batch.items() if name not in ("view_positions", "view_spans")}
    torch.testing.assert_close(logits_of(model, {**rest, "image_geometry": geometry}), logits_of(model, batch))


# ---- training -----------------------------------------------------------------------------------------------------
def rows():
    """Three conversations: two objects, none, and no image."""
    answer = {"role": "assistant", "content": "A boat."}
    seen = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, answer], "images": [random_image(90, 60)]}
    text = {"messages": [{"role": "user", "content": "What?"}, answer]}
    return [{**seen, "image_boxes": [BOXES[0]]}, {**seen, "image_boxes": None}, text]


def test_boxes_are_a_column_of_the_data_and_train_their_adapter(tmp_path):
    model, processor = parts()
    batch = HiResLmmCollator(processor)(rows())
    assert batch["image_boxes"].shape == (2, 2, 4) and not batch["image_boxes"][1].any()
    model.train()
    objects = dict(model.model.connector.tower_adapters["objects"].named_parameters())
    for examples, is_read in ((rows(), True), (rows()[1:], False), (rows()[2:], False)):
        model.zero_grad()
        model(**HiResLmmCollator(processor)(examples)).loss.backward()
        assert all(p.grad is not None for p in model.model.connector.parameters())
        assert all(bool(p.grad.any()) == is_read for p in objects.values())
    before = {name: value.clone() for name, value in objects.items()}
    stage = Stage("objects", {"connector.tower_adapters.objects": 1e-2})
    make_trainer(model, processor, stage, rows(), tmp_path, max_steps=3).train()
    assert all(not torch.equal(before[name], value) for name, value in objects.items())


# ---- refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0, 0, 91, 60]]], r"image 0: box 0 is .*bottom 91.* lie in the image of 90 x 60 pixels"),
        ([[[0, 0, 9, 9], [-1, 0, 9, 9]]], "image 0: box 1 is"),
        ([[[9, 0, 9, 9]]], "must have an area"),
        ([[[float("nan"), 0, 9, 9]]], "box 0 is"),
        ([[[0, 0, 9]]], r"pass \(objects, 4\), .*not an array of the shape \(1, 3\)"),
        ([[0, 0, 9, 9]], r"not an array of the shape \(4,\)"),
        ([np.ones((1, 60, 90))], r"masks \(objects, 90, 60\), not an array of the shape \(1, 60, 90\)"),
        ([np.zeros((1, 90, 60))], "mask 0 is empty"),
        ([np.full((1, 90, 60), np.nan)], "mask 0 is empty or not a number"),
        ([["cat"]], "no array of numbers"),
        ([["1234"]], "no array of numbers"),
        ([np.array([[0, 0, 9j, 9]])], "no array of numbers .of the type complex128"),
        ([7], r"image 0: .*not an array of the shape \(\)"),
        ([torch.tensor(7)], r"image 0: .*not an array of the shape \(\)"),
        ([[[0, 0, 9, 9]], []], "image_boxes holds 2 entries for 1 images"),
        (7, "image_boxes holds 7 for 1 images"),
    ],
)
def test_boxes_of_a_wrong_form_are_refused_by_image_and_number(boxes, message, model_and_processor):
    with pytest.raises(ValueError, match=message):
        make_batch(model_and_processor[1], [(TEXT, [random_image(90, 60)])], image_boxes=boxes)


def test_the_model_refuses_boxes_that_no_processor_made(model_and_processor):
    model, processor = model_and_processor
    batch = ask(processor)
    boxes = batch["image_boxes"]
    hole = boxes.clone()
    hole[0, 0] = 0
    for wrong, message in (
        (boxes[:2], "image_boxes is of 2 images, but view_positions describes 3"),
        (boxes.float(), "expected integers"),
        (boxes[..., :3], "expected integers"),
        (boxes.flip(-1), r"image_boxes\[0, 0\] is .* must be top < bottom"),
        (boxes * 4, r"right from 0 to 65536"),
        (hole, r"only zeros may follow the last object"),
        (boxes[:, :1], "Image 0 gives 17 tokens but view_positions promises 18"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, "image_boxes": wrong})
    with pytest.raises(ValueError, match="image_boxes came without pixel_values"):
        model(input_ids=batch["input_ids"], image_boxes=boxes)


def test_models_without_the_part_refuse_boxes_and_wrong_places_of_it_are_named():
    model, processor = parts("llava_next")
    with pytest.raises(ValueError, match="no part of this model makes tokens of objects"):
        ask(processor)
    batch = make_batch(processor, [(TEXT, [random_image(90, 60)])])
    with pytest.raises(ValueError, match="no part of this model makes tokens of objects"):
        model(**batch, image_boxes=torch.zeros(1, 0, 4, dtype=torch.long))
    for connector, message in (
        ({"view_ops": [{"part": "conv_gate"}, {"part": "object_tokens", "tower": "hires"}]}, "put it before parts"),
        ({"layout": {"order": ["global", "crops"]}}, re.escape("Nothing reads the views 'objects'")),
        ({"tower_adapters": {"objects": {"part": "query_former", "num_queries": 4}}}, "makes another number of them"),
        ({"view_ops": [{"part": "object_tokens", "bins": 0}]}, "bins=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config("mg_llava", connector_config=connector)
    with pytest.raises(ValueError, match="extra_towers has the name 'objects'"):
        tiny_config("mg_llava", extra_towers={"objects": tiny_convnext()})
    with pytest.raises(ValueError, match="image_boxes belong to images; pass them in a call"):
        type(processor.image_processor)(image_boxes=[[]])


def test_objects_keep_the_flat_layout_and_are_refused_in_the_dense_one(model_and_processor):
    _, processor = model_and_processor
    asked = {"images": [[random_image(90, 60)]], "text": [TEXT], "padding": True, "return_tensors": "pt"}
    assert "pixel_attention_mask" in processor(**asked)
    assert "image_boxes" in processor(**asked, image_boxes=[BOXES[0]])
    with pytest.raises(ValueError, match=re.escape('image_boxes do not go with image_layout="dense"')):
        processor(**asked, image_boxes=[BOXES[0]], image_layout="dense")
