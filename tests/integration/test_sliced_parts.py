"""Views that are no plain crops in whole models: two perspectives, slices of unequal size, layers across crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor


TEXT = "<image>What is it?"


def parts(preset="llava_next", vision="clip", **changes):
    config = tiny_config(preset, vision, **changes)
    return tiny_model(config), tiny_processor(config)


def ask(processor, *sizes, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **options)


def generated(model, batch):
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, do_sample=False)[:, length:].tolist()


def assert_batch_is_single(model, processor, *sizes, **options):
    together = generated(model, ask(processor, *sizes, **options))
    assert together == [generated(model, ask(processor, size, **options))[0] for size in sizes]


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


def two_perspectives(op, plain, local, wide, rows, cols):
    """What the op makes of a global view `(16, C)` and both maps `(4 rows, 4 cols, C)`, view by view."""
    by_global, by_local = torch.zeros_like(wide), torch.zeros_like(local)
    for a, b in np.ndindex(rows, cols):
        tile = (slice(4 * a, 4 * a + 4), slice(4 * b, 4 * b + 4))
        phase = (slice(a, None, rows), slice(b, None, cols))
        for cut, queries, keys, result in ((tile, wide, local, by_global), (phase, local, wide, by_local)):
            query = queries[cut].reshape(1, 16, -1)
            key = keys[cut].reshape(1, 16, -1)
            result[cut] = op.attention_norm(op.attention(query, key, key) + query).view(4, 4, -1)
    mixed = torch.cat([op.local_mlp(by_local), op.global_mlp(by_global)], dim=-1)
    fused = op.output_norm(mixed + by_global + by_local)
    small = torch.nn.functional.interpolate(fused.permute(2, 0, 1)[None], (4, 4), mode="bilinear")
    return (plain + small[0].flatten(1).T) / 2


@pytest.mark.parametrize(
    ("planner", "shapes"),
    [({"n": 3}, [(3, 3)] * 3), ({"n": 2}, [(2, 2)] * 3), ({"n": 3, "follow_aspect": True}, [(3, 2), (1, 5), (3, 3)])],
    ids=str,
)
@torch.no_grad()
def test_two_perspectives_join_the_global_view(planner, shapes):
    model, processor = parts("inf_llava", planner={"name": "dual", **planner})
    sizes = ((90, 60), (40, 200), (56, 56))
    assert {processor.image_tokens(*size) for size in sizes} == {16}
    batch, op = ask(processor, *sizes), model.model.connector.view_ops[0]
    found = model.model.get_image_features(**geometry_of(batch)).pooler_output
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    at = 0
    for (rows, cols), own in zip(shapes, found, strict=True):
        number = rows * cols
        assert batch["view_positions"][at, 1:3].tolist() == [rows, cols]
        local, wide = (
            whole_map(hidden[start : start + number].unflatten(1, (4, 4)), rows, cols, is_strided)
            for start, is_strided in ((at + 1, False), (at + 1 + number, True))
        )
        mixed = two_perspectives(op, hidden[at], local, wide, rows, cols)
        torch.testing.assert_close(own, model.model.connector.adapter(mixed[None], 0)[0], atol=1e-4, rtol=1e-4)
        at += 1 + 2 * number
    assert_batch_is_single(model, processor, *sizes)


def test_without_crops_the_global_view_stays_as_it_is():
    model, processor = parts("inf_llava")
    plain, _ = parts("llava_next")
    batch = ask(processor, (90, 60), views="global")
    with torch.no_grad():
        plain.model.connector.adapter.load_state_dict(model.model.connector.adapter.state_dict())
        plain.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
        found, wanted = (own.model.get_image_features(**geometry_of(batch)).pooler_output for own in (model, plain))
    torch.testing.assert_close(found, wanted)


def test_what_two_perspectives_cannot_read_is_refused_by_name():
    layout = {"order": ["global", "crops"]}
    with pytest.raises(ValueError, match=r"dual_enhancement reads global views.*no strided reach it"):
        tiny_config("inf_llava", connector_config={"layout": layout})
    merge = [{"part": "conv_merge", "on": "crops"}, {"part": "dual_enhancement"}]
    with pytest.raises(ValueError, match="crops and strided views of one token grid"):
        tiny_config("inf_llava", connector_config={"view_ops": merge})
    model, processor = parts("inf_llava")
    batch = ask(processor, (90, 60), planner="slime")
    with pytest.raises(ValueError, match=r"Image 0 has 4 crops and 0 strided views; .*planner dual"):
        model(**batch)
    with pytest.raises(ValueError, match="planner='dual' cannot leave out padding"):
        ask(processor, (90, 60), unpad=True, global_view="pad")


@pytest.mark.parametrize("size", [(90, 60), (40, 200)])
def test_a_padded_picture_is_padded_in_all_its_views(size):
    """Strided views together show what crops together show."""
    _, processor = parts("inf_llava", planner={"name": "dual", "n": 2})
    options = {"global_view": "pad", "resample": Image.Resampling.BICUBIC}
    pixels = processor.image_processor(random_image(*size), **options)["pixel_values"]
    pixels = torch.as_tensor(np.asarray(pixels))
    square = torch.cat([torch.cat(list(row), dim=2) for row in pixels[1:5].view(2, 2, 3, 56, 56)], dim=1)
    for number in range(4):
        torch.testing.assert_close(pixels[5 + number], square[:, number // 2 :: 2, number % 2 :: 2])
    plan = processor.image_processor.plan(*size, global_view="pad")
    half, pixel = 128 * max(size), 256 * max(size) / 112
    wanted = [128 * side + sign * half for sign in (-1, 1) for side in size]
    assert len({view.box for view in plan.views[5:]}) == 1
    assert list(plan.views[5].box) == pytest.approx(wanted, abs=2 * pixel)  # sizes are rounded up
