"""Region packers: regions, middles, what becomes of frames, pictures and budgets, and what is refused."""

import pytest
import torch

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from builders.registry import register
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.region_pack_hires_lmm import cut_patches, middle


SMALL = {"part": "region_pack", "spatial_factor": 2, "temporal_factor": 2, "width": 8, "num_heads": 2}
TEXT = "<image>What is it?"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def build(order=("global", "frames", "detail"), kinds=("global", "frames"), **options):
    config = tiny_config(
        "llava_next",
        planner={"name": "every_kind", "kinds": list(kinds)},
        connector_config={"map_ops": [{**SMALL, **options}], "layout": {"order": list(order), "crop_order": "views"}},
    )
    return tiny_model(config), tiny_processor(config)


def ask(processor, *sizes, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **options)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_the_middle_of_a_region_is_what_resizing_leaves(factor):
    planes = torch.randn(2, 3, 2 * factor, 3 * factor)
    wanted = torch.nn.functional.interpolate(planes, scale_factor=1 / factor, mode="bilinear", align_corners=False)
    regions = cut_patches(planes.flatten(2).transpose(1, 2), (2 * factor, 3 * factor), factor)
    torch.testing.assert_close(middle(regions, (factor, factor)), wanted.flatten(2).transpose(1, 2))
    times = torch.randn(1, 3, 4 * factor)
    wanted = torch.nn.functional.interpolate(times, size=4, mode="linear", align_corners=False)
    regions = times[0].T.unflatten(0, (4, factor))
    torch.testing.assert_close(middle(regions, (factor,)), wanted[0].T)


@torch.no_grad()
def test_a_token_knows_its_own_region_alone():
    """A patch that changes in one frame changes one slow and one fast token, at their places."""
    model, processor = build()
    batch = ask(processor, (90, 60))
    views = model.model.get_image_features(
        **{name: batch[name] for name in ("pixel_values", "view_positions", "view_spans")}
    ).tokens
    part = model.model.connector.map_ops[0]
    seen = []
    part.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    model(**batch)
    given, before = seen[0]
    frames = given.group("frames")
    frames.features[1, 4 * 2 + 3] += 1.0  # row 2, column 3 of 4 x 4 in the second frame
    after = part(given)
    changed = {
        name: (before.group(name).features != after.group(name).features).any(dim=-1).nonzero().tolist()
        for name in ("global", "frames", "detail")
    }
    assert changed == {"global": [], "frames": [[1, 0]], "detail": [[0, 3]]}
    kinds = [Kind.GLOBAL] * 4 + [Kind.FRAME] * 2 + [Kind.DETAIL] * 4
    assert views.kind.tolist() == kinds and processor.image_tokens(90, 60) == len(kinds)


def test_fast_and_slow_tokens_stand_as_the_layout_says():
    for order in (("global", "frames", "detail"), ("detail", "frames", "global")):
        model, processor = build(order)
        kinds = model(**ask(processor, (90, 60)), output_token_map=True).token_map.kind.tolist()
        assert list(dict.fromkeys(kinds)) == [{"global": 0, "frames": 3, "detail": 4}[name] for name in order]


def test_the_released_slip_leaves_slow_tokens():
    model, processor = build(compat="release")
    whole = build()[1]
    kinds = model(**ask(processor, (90, 60)), output_token_map=True).token_map.kind.tolist()
    assert Kind.FRAME not in kinds and kinds.count(Kind.DETAIL) == 4
    assert processor.image_tokens(90, 60) == whole.image_tokens(90, 60) - 2 == len(kinds)
    assert model.model.connector.map_ops[0].fast_packer is None


def test_pictures_stay_whole_where_on_names_frames():
    model, processor = build(on="frames")
    assert processor.image_tokens(90, 60) == 16 + 2 + 4
    assert len(model(**ask(processor, (90, 60))).image_outputs.pooler_output[0]) == 22


def test_frames_that_do_not_fit_are_refused_by_processor_and_model():
    model, processor = build(temporal_factor=3)
    with pytest.raises(ValueError, match="joins 3 frames at a time, and a video has 2; set num_frames to a multiple"):
        processor.image_tokens(90, 60)
    batch = ask(build()[1], (90, 60))
    with pytest.raises(ValueError, match="Video 0 has 2 frames, but region_pack joins 3 at a time; set num_frames"):
        model(**batch)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spatial_factor": 3}, "cannot cut 4x4 tokens into regions of 3x3"),
        ({"spatial_factor": 4}, "cannot cut 1x1 tokens into regions of 4x4"),
        ({"temporal_factor": 0}, "temporal_factor=0 must be at least 1"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_second_maker_of_detail_is_refused():
    with pytest.raises(ValueError, match="another part or tower makes them too"):
        tiny_config(
            "llava_next",
            planner={"name": "every_kind", "kinds": ["global", "frames"]},
            connector_config={
                "view_ops": [{"part": "mini_compressor", "num_queries": 4, "num_heads": 2}],
                "map_ops": [SMALL],
                "layout": {"order": ["global", "frames", "detail"], "crop_order": "views"},
            },
        )
