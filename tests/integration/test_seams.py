"""Mechanisms that come next, sketched: each is one class and one registry line, and all else follows."""

import numpy as np
import pytest
import torch
from PIL import Image

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from builders.sketches import SKETCHED_PLANNERS, SKETCHES
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.parts_hires_lmm import SLOTS
from hires_lmm.processing.planners_hires_lmm import PLANNERS


TEXT = "<image>What is it?"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, (slot, part) in SKETCHES.items():
        monkeypatch.setitem(SLOTS[slot], name, part)
    for name, planner in SKETCHED_PLANNERS.items():
        monkeypatch.setitem(PLANNERS, name, planner)


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


# ---- two perspectives: tiles and every n-th pixel -----------------------------------------------------------------
def whole_map(views, rows: int, cols: int, is_strided: bool):
    """Tokens `(n, 4, 4, C)` of views by their place in the picture, one by one."""
    return torch.stack(
        [
            torch.stack(
                [
                    views[(r % rows) * cols + c % cols][r // rows, c // cols]
                    if is_strided
                    else views[(r // 4) * cols + c // 4][r % 4, c % 4]
                    for c in range(4 * cols)
                ]
            )
            for r in range(4 * rows)
        ]
    )


@torch.no_grad()
def test_strided_views_take_every_nth_pixel_and_are_interleaved_in_the_sequence():
    layout = {
        "order": ["global", "crops", "strided"],
        "separators": {"row": {"place": "token_row_end", "on": "strided"}},
    }
    model, processor = parts(planner={"name": "dual", "n": 3}, connector_config={"layout": layout})
    batch = ask(processor, (90, 60))
    squeezed = processor.image_processor.preprocess(
        random_image(90, 60).resize((168, 168), Image.Resampling.BICUBIC),
        return_tensors="pt",
        planner={"name": "dual", "n": 3},
    )["pixel_values"][1:10]
    picture = torch.cat([torch.cat(list(row), dim=2) for row in squeezed.view(3, 3, 3, 56, 56)], dim=1)
    strided = batch["pixel_values"][10:]
    for number in range(9):
        torch.testing.assert_close(strided[number], picture[:, number // 3 :: 3, number % 3 :: 3])
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    adapted = model.model.connector.adapter(hidden, 1).unflatten(1, (4, 4))
    found = model.model.get_image_features(**geometry_of(batch)).pooler_output[0]
    torch.testing.assert_close(found[16:160], whole_map(adapted[1:10], 3, 3, False).flatten(0, 1))
    lines = found[160:].view(12, 13, -1)
    torch.testing.assert_close(lines[:, :12], whole_map(adapted[10:], 3, 3, True))
    assert torch.equal(lines[:, 12], model.model.connector.layout.separators.row.expand(12, -1))
    assert_batch_is_single(model, processor, (90, 60), (40, 200))


@torch.no_grad()
def test_two_perspectives_join_the_global_view():
    layout = {"order": ["global", "crops", "strided"]}
    connector = {"view_ops": [{"part": "two_perspectives"}], "layout": layout}
    model, processor = parts(planner={"name": "dual", "n": 3}, connector_config=connector)
    assert processor.image_tokens(90, 60) == processor.image_tokens(400, 30) == 16
    batch, op = ask(processor, (90, 60)), model.model.connector.view_ops[0]
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    plain, local, wide = (
        hidden[0],
        *(
            whole_map(views.unflatten(1, (4, 4)), 3, 3, is_strided)
            for views, is_strided in ((hidden[1:10], False), (hidden[10:], True))
        ),
    )
    by_global, by_local = torch.zeros_like(wide), torch.zeros_like(local)
    for a, b in np.ndindex(3, 3):
        tile = (slice(4 * a, 4 * a + 4), slice(4 * b, 4 * b + 4))
        phase = (slice(a, None, 3), slice(b, None, 3))
        for cut, queries, keys, result in ((tile, wide, local, by_global), (phase, local, wide, by_local)):
            query = queries[cut].reshape(1, 16, -1)
            result[cut] = op.attend(query, keys[cut].reshape(1, 16, -1)).view(4, 4, -1)
    mixed = torch.cat([op.ffn_crop(by_local), op.ffn_stride(by_global)], dim=-1)
    fused = op.norm_fused(mixed + by_global + by_local)[1::3, 1::3].flatten(0, 1)  # what bilinear takes of 3 x 3
    wanted = model.model.connector.adapter((plain + fused)[None] / 2, 0)[0]
    torch.testing.assert_close(
        model.model.get_image_features(**geometry_of(batch)).pooler_output[0], wanted, atol=1e-4, rtol=1e-4
    )
    assert_batch_is_single(model, processor, (90, 60), (40, 200))


# ---- views of unequal size ----------------------------------------------------------------------------------------
UHD_LAYOUT = {
    "order": ["crops", "global"],
    "crop_order": "views",
    "separators": {
        "comma": {"place": "crop_column", "value": [11], "on": "crops"},
        "newline": {"place": "crop_row_end", "value": [13], "on": "crops"},
    },
}
UHD_SIZES = ((112, 168), (90, 60), (40, 200), (50, 50))


def unequal(**connector):
    return parts(planner={"name": "uhd"}, unequal_views=True, connector_config={"layout": UHD_LAYOUT, **connector})


def test_slices_follow_the_rule_of_the_paper():
    """Sizes from a released table, divided by six: the view is a sixth of 336, the patch stays."""
    _, processor = parts(planner={"name": "uhd"}, unequal_views=True, connector_config={"layout": UHD_LAYOUT})
    found = {}
    for width, height in ((672, 1008), (672, 1088), (1920, 1080), (1344, 336), (500, 375), (336, 336), (100, 80)):
        plan = processor.image_processor.plan(height, width, view_size=336, token_layout=None)
        *slices, overview = plan.views
        small = plan.view_pixels(slices[0]) if slices else None
        found[width, height] = (plan.view_pixels(overview), (overview.grid_rows, overview.grid_cols), small)
    assert found == {
        (672, 1008): ((406, 266), (3, 2), (336, 336)),
        (672, 1088): ((420, 252), (3, 2), (336, 322)),
        (1920, 1080): ((252, 448), (2, 3), (308, 364)),
        (1344, 336): ((168, 672), (1, 4), (336, 336)),
        (500, 375): ((280, 378), (1, 2), (406, 266)),
        (336, 336): ((336, 336), (0, 0), None),
        (100, 80): ((294, 364), (0, 0), None),
    }


@torch.no_grad()
def test_unequal_views_are_padded_and_arranged_with_their_separators():
    model, processor = unequal()
    batch = ask(processor, *UHD_SIZES)
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    table, tower, row = model.get_input_embeddings().weight, model.model.vision_tower, 0
    assert len({tuple(plan.tolist()) for plan in batch["view_positions"][:, 6:8]}) == 4
    for size, found in zip(UHD_SIZES, features, strict=True):
        plan, wanted = processor.image_processor.plan(*size), []
        picture = random_image(*size)
        for view in plan.views:
            high, wide = plan.view_pixels(view)
            pixels = batch["pixel_values"][row]
            assert not pixels[:, high:].any() and not pixels[:, :, wide:].any()
            drawn = picture.resize(plan.canvas[::-1] if view.kind else (wide, high), Image.Resampling.BICUBIC)
            drawn = np.asarray(drawn, dtype=np.float32) / 255
            top, left = (view.row * high, view.col * wide) if view.kind else (0, 0)
            settings = processor.image_processor
            normal = (drawn[top : top + high, left : left + wide] - settings.image_mean) / settings.image_std
            alone = pixels[None, :, :high, :wide]
            torch.testing.assert_close(alone[0].double(), torch.tensor(normal).permute(2, 0, 1), atol=1e-5, rtol=1e-4)
            hidden = tower(alone, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
            assert hidden.shape[1] == high * wide // 14**2
            tokens = model.model.connector.adapter(hidden, view.kind)[0]
            if view.kind and view.col:
                wanted.append(table[[11]])
            wanted.append(tokens)
            if view.kind and view.col == view.grid_cols - 1:
                wanted.append(table[[13]])
            row += 1
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)
        assert processor.image_tokens(*size) == len(found)
    assert_batch_is_single(model, processor, *UHD_SIZES)
    assert_batch_is_single(model, processor, *UHD_SIZES[:3], max_image_tokens=20)


@torch.no_grad()
def test_as_many_tokens_of_every_view_whatever_its_size():
    """Means over the cells of the patches that a view has: what is padded counts nowhere."""
    model, processor = unequal(view_ops=[{"part": "cells"}])
    batch = ask(processor, *UHD_SIZES)
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    row = 0
    for size, found in zip(UHD_SIZES, features, strict=True):
        at = 0
        for view in processor.image_processor.plan(*size).views:
            high, wide = view.patches
            alone = batch["pixel_values"][row : row + 1, :, : 14 * high, : 14 * wide]
            hidden = model.model.vision_tower(alone, output_hidden_states=True, interpolate_pos_encoding=True)
            planes = hidden.hidden_states[-2][0, 1:].unflatten(0, (high, wide))
            cells = [
                planes[a * high // 2 : -(-(a + 1) * high // 2), b * wide // 2 : -(-(b + 1) * wide // 2)].mean((0, 1))
                for a, b in np.ndindex(2, 2)
            ]
            wanted = model.model.connector.adapter(torch.stack(cells)[None], view.kind)[0]
            at += view.kind and view.col > 0  # a comma
            torch.testing.assert_close(found[at : at + 4], wanted, atol=1e-4, rtol=1e-4)
            at += 4 + (view.kind and view.col == view.grid_cols - 1)  # the newline
            row += 1
        assert at == len(found)
    assert_batch_is_single(model, processor, *UHD_SIZES)


def test_a_prefill_with_unequal_views_compiles_whole():
    model, processor = unequal()
    batch = ask(processor, UHD_SIZES[0])
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    inputs["image_geometry"] = model.model.read_images(batch["view_positions"], batch["view_spans"])
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        wanted = model(**batch, logits_to_keep=1).logits  # the first call installs hooks, which no compiler follows
        found = compiled(**inputs, logits_to_keep=1, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
