"""One record a visual token before selection: where it came from, its score, and whether it was kept."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

import reference_generation as reference
import reference_routing as routing
from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor


PRESETS = ["slime", "slime_release", "monkey", "llava_next", "llava_hd"]
TEXT = "USER: <image>\nHow many cats are on the table? ASSISTANT:"
SIZES = [(100, 180), (200, 90), (56, 56), (61, 300)]
NAMES = ["global", "crop", "mark"]
BRIGHT = 24  # side of the bright patch in source pixels


@functools.cache
def build(preset: str, rule: routing.Rule | None = None):
    connector = dict(routing.SMALL_CONNECTORS.get(preset, {}))
    if rule is not None:
        connector["token_ops"] = rule.token_ops()
    config = tiny_config(preset, connector_config=connector)
    return tiny_model(config), tiny_processor(config)


@torch.no_grad()
def run(preset: str, images: list, rule: routing.Rule | None = None, **kwargs):
    """Model, batch (one row an image) and output."""
    model, processor = build(preset, rule)
    batch = make_batch(processor, [(TEXT, [image]) for image in images], padding_side="left", **kwargs)
    return model, batch, model(**batch, output_token_map=True)


def of_image(found, image: int) -> dict[str, torch.Tensor]:
    """The records of one image."""
    mine = found.image == image
    return {name: getattr(found, name)[mine] for name in ("view", "cell", "kind", "box", "score", "kept")}


def grid_of(layout: dict, kind: int) -> tuple[int, int]:
    """Token rows and columns of a whole view."""
    grid = layout["grids"]["crops" if kind else "global"]
    return grid["rows"], grid["cols"]


# --- records -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", [*PRESETS, "vlsa"])
def test_records_are_the_tokens_before_selection(preset):
    model, batch, output = run(preset, [random_image(*size, seed=i) for i, size in enumerate(SIZES)])
    found, layout = output.token_map, model.config.token_layout()
    features = model.get_image_features(**geometry_of(batch), return_dict=True)
    positions, spans = batch["view_positions"].tolist(), batch["view_spans"].tolist()
    starts = [row for row, position in enumerate(positions) if position[8] == 1] + [len(positions)]
    assert len(found.image) == sum(len(part) for part in features.pooler_output)
    for image in range(len(SIZES)):
        records, (start, stop) = of_image(found, image), starts[image : image + 2]
        kinds = reference.layout_kinds(positions[start:stop], spans[start:stop], layout)
        assert [NAMES[kind] for kind in records["kind"]] == kinds
        for view, kind, cell in zip(records["view"], records["kind"], records["cell"], strict=True):
            if kind == -1:
                assert view == -1
                continue
            assert start <= view < stop and positions[view][0] == kind
            grid = grid_of(layout, kind)
            assert 0 <= cell[0] < grid[0] and 0 <= cell[1] < grid[1]
        addresses = torch.cat([records["view"][:, None], records["cell"]], 1)[records["kind"] >= 0]
        assert len(addresses.unique(dim=0)) == len(addresses)


@pytest.mark.parametrize(
    "rule", [routing.Rule("cosine"), routing.Rule("attention"), routing.Rule("saliency", on="all")], ids=str
)
def test_scores_and_kept_are_those_of_the_router(rule):
    images = [random_image(*size, seed=i) for i, size in enumerate(SIZES)]
    model, _, output = run("slime", images, rule)
    for number, image in enumerate(images):
        records = of_image(output.token_map, number)
        tokens, kinds = reference.full_visual_tokens(model, build("slime", rule)[1], [image])
        words = reference.prompt_embeds(model, build("slime", rule)[1], TEXT.replace("<image>", ""), [])[0]
        if number == 0:  # the pieces around the placeholder are tokens of their own
            tokenizer = build("slime", rule)[1].tokenizer
            ids = [id for piece in TEXT.split("<image>") for id in tokenizer(piece).input_ids]
            words = model.model.language_model.get_input_embeddings()(torch.tensor(ids)).detach()
            select = routing.selection(model, rule, words)
            assert records["kept"].nonzero()[:, 0].tolist() == select(tokens[0], kinds[0], None, rule.on)
            scored = [i for i, kind in enumerate(kinds[0]) if kind in routing.SCORED_KINDS[rule.on]]
            wanted = routing.scores_of(model, rule, tokens[0][scored], words)
            torch.testing.assert_close(
                records["score"][scored].double(), torch.tensor(wanted).double(), atol=1e-4, rtol=0
            )
        scored = ~records["score"].isnan()
        assert torch.equal(scored, records["kind"] >= 0 if rule.on == "all" else records["kind"] == 1)
        assert records["kept"][~scored].all()
        assert records["score"][records["kept"] & scored].min() > records["score"][~records["kept"]].max()


def test_the_map_needs_boxes_and_is_absent_unless_asked_for():
    model, batch, output = run("slime", [random_image(60, 60)])
    assert output.token_map is not None
    assert model(**batch).token_map is None
    with pytest.raises(ValueError, match="view_boxes"):
        model(**{**batch, "view_boxes": None}, output_token_map=True)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    features = model.get_image_features(**geometry_of(batch), return_dict=True)
    given = model(**text, mm_encoder_outputs={"image": features}, output_token_map=True).token_map
    for name in vars(given):
        torch.testing.assert_close(
            getattr(given, name), getattr(output.token_map, name), equal_nan=True, atol=1e-5, rtol=0
        )
    ids = torch.tensor([[10, 11, 12]])
    assert model(input_ids=ids, output_token_map=True).token_map is None


# --- boxes ---------------------------------------------------------------------------------------------------------


def patch_means(batch, view: int, cell: torch.Tensor, grid: list[int]) -> float:
    """Mean of the pixels of a view that a token stands for."""
    pixels = batch["pixel_values"][view].mean(0)
    side = pixels.shape[0]
    row, column = int(cell[0]), int(cell[1])
    height, width = side / grid[0], side / grid[1]
    rows = slice(round(row * height), round((row + 1) * height))
    return float(pixels[rows, round(column * width) : round((column + 1) * width)].mean())


@pytest.mark.parametrize("centre", [(20, 30), (75, 150), (50, 95)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_lies_where_it_came_from(preset, centre):
    """Of a dark picture with one bright patch, the tokens whose pixels are brightest have boxes around the patch."""
    pixels = np.zeros((110, 190, 3), np.uint8)
    top, left = centre[0] - BRIGHT // 2, centre[1] - BRIGHT // 2
    pixels[max(top, 0) : top + BRIGHT, max(left, 0) : left + BRIGHT] = 255
    model, batch, output = run(preset, [Image.fromarray(pixels)])
    records, layout = of_image(output.token_map, 0), model.config.token_layout()
    for kind in (0, 1):
        grid = grid_of(layout, kind)
        index = (records["kind"] == kind).nonzero()[:, 0].tolist()
        means = {i: patch_means(batch, int(records["view"][i]), records["cell"][i], grid) for i in index}
        brightest = max(means, key=means.get)
        box = records["box"][brightest]
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        reach = [(BRIGHT + float(box[2 + axis] - box[axis])) / 2 for axis in range(2)]
        for axis in range(2):
            assert abs(float(middle[axis]) - centre[axis]) < reach[axis], (kind, box.tolist(), centre)
        dark = min(means.values())
        for i, mean in means.items():  # a token far from the patch saw none of it
            far = any(
                float(records["box"][i][axis]) > centre[axis] + BRIGHT
                or float(records["box"][i][2 + axis]) < centre[axis] - BRIGHT
                for axis in range(2)
            )
            assert not far or mean < dark + 0.35, (kind, records["box"][i].tolist(), mean)


@pytest.mark.parametrize("preset", ["slime", "monkey", "llava_next"])
@torch.no_grad()
def test_a_token_is_computed_from_the_view_that_the_map_names(preset):
    """Changing the pixels of one view changes the features of its tokens and of no others."""
    model, processor = build(preset)
    batch = make_batch(processor, [(TEXT, [random_image(*size)]) for size in SIZES[:2]])
    found = model(**batch, output_token_map=True).token_map
    before = model.get_image_features(**geometry_of(batch), return_dict=True).tokens.features
    for view in range(len(batch["pixel_values"])):
        pixels = batch["pixel_values"].clone()
        pixels[view] += torch.randn(pixels[view].shape)
        changed = {**geometry_of(batch), "pixel_values": pixels}
        after = model.get_image_features(**changed, return_dict=True).tokens.features
        moved = (after - before).abs().amax(1) > 1e-3
        assert torch.equal(moved, found.view == view)


# --- from generate -------------------------------------------------------------------------------------------------
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "without cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


def same_map(found, wanted) -> None:
    for name, value in vars(wanted).items():
        torch.testing.assert_close(getattr(found, name), value, atol=1e-5, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset, rule", [("slime", None), ("llava_next", routing.Rule("cosine", "budget", on="all"))])
@torch.no_grad()
def test_generate_returns_the_map_of_the_images_as_passed(preset, rule, mode):
    model, processor = build(preset, rule)
    counts = [1] if mode == "lookup" else [2, 0, 1]  # images a row
    samples = [
        ("<image> A boat? " * count + "USER: Why?", [random_image(100, 90 + 40 * i)] * count)
        for i, count in enumerate(counts)
    ]
    batch = make_batch(processor, samples, padding_side="left", **({} if rule is None else {"max_image_tokens": 30}))
    wanted = model(**batch, output_token_map=True).token_map
    assert 0 < int(wanted.kept.sum()) < len(wanted.kept) and wanted.image.unique().tolist() == list(range(sum(counts)))
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, **MODES[mode]}
    output = model.generate(**batch, **options, output_token_map=True)
    same_map(output.token_map, wanted)
    assert output["token_map"] is output.token_map
    if mode != "sampled":
        assert torch.equal(output.sequences, model.generate(**batch, **options).sequences)
