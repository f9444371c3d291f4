"""Views that are no plain crops in whole models: two perspectives, slices of unequal size, layers across crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ViewGroup
from hires_lmm.modeling.compat_hires_lmm import layers_of
from hires_lmm.modeling.uhd_hires_lmm import HiResLmmUhdResampler


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
    batch = ask(processor, (90, 60), resize_backend="pillow")
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


RESAMPLER = {"part": "uhd_resampler", "num_queries": 9, "num_heads": 2}


def unequal(**connector):
    """Slices with their separators; all patches are tokens, where nothing else is said."""
    plain = {"view_ops": [], "adapter": {"part": "mlp"}, "layout": UHD_LAYOUT}
    return parts("llava_uhd", connector_config={**plain, **connector})


def alone(tower, pixels, view):
    """Patches of a view without its padding, with positions resized for it alone: `(1, L, C)`."""
    own = pixels[None, :, : 14 * view.patches[0], : 14 * view.patches[1]]
    return tower(own, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]


@torch.no_grad()
def test_unequal_views_are_padded_and_arranged_with_their_separators():
    model, processor = unequal()
    batch = ask(processor, *UHD_SIZES, resize_backend="pillow")
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
            own = pixels[:, :high, :wide].double()
            torch.testing.assert_close(own, torch.tensor(normal).permute(2, 0, 1), atol=1e-5, rtol=1e-4)
            hidden = alone(tower, pixels, view)
            assert hidden.shape[1] == high * wide // 14**2
            tokens = model.model.connector.adapter(hidden, view.kind)[0]
            marks = [11] * (view.col > 0), [13] * (view.col == view.grid_cols - 1)
            wanted.append(tokens if not view.kind else torch.cat([table[marks[0]], tokens, table[marks[1]]]))
            row += 1
        torch.testing.assert_close(found, torch.cat([*wanted[1:], wanted[0]]), atol=1e-4, rtol=1e-4)
        assert processor.image_tokens(*size) == len(found)
    assert_batch_is_single(model, processor, *UHD_SIZES)
    assert_batch_is_single(model, processor, *UHD_SIZES[:3], max_image_tokens=20)


@torch.no_grad()
def test_the_resampler_gives_as_many_tokens_of_every_view():
    """Each as if it were alone, at its own size; commas, newlines, the whole picture last."""
    model, processor = unequal(view_ops=[RESAMPLER], adapter={"part": "identity"})
    batch = ask(processor, *UHD_SIZES)
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    op, table, row = model.model.connector.view_ops[0], model.get_input_embeddings().weight, 0
    for size, found in zip(UHD_SIZES, features, strict=True):
        wanted = []
        for view in processor.image_processor.plan(*size).views:
            hidden = alone(model.model.vision_tower, batch["pixel_values"][row], view)
            group = ViewGroup(int(view.kind), hidden, view.patches, (0,))
            tokens, row = op.compress(group, [view.patches]).features[0], row + 1
            marks = [11] * (view.col > 0), [13] * (view.col == view.grid_cols - 1)
            wanted.append(tokens if not view.kind else torch.cat([table[marks[0]], tokens, table[marks[1]]]))
        torch.testing.assert_close(found, torch.cat([*wanted[1:], wanted[0]]), atol=1e-4, rtol=1e-4)
        assert processor.image_tokens(*size) == 10 * (len(wanted) - 1) + 9
    assert_batch_is_single(model, processor, *UHD_SIZES)
    assert_batch_is_single(model, processor, *UHD_SIZES, max_image_tokens=9)


def test_scores_of_unequal_views_follow_the_grid_of_the_resampler():
    """What pads a view counts nowhere, whatever stands there."""
    op = unequal(view_ops=[RESAMPLER], adapter={"part": "identity"})[0].model.connector.view_ops[0]
    scores = torch.rand(2, 7 * 6)
    group = ViewGroup(1, torch.randn(2, 42, 32), (7, 6), (0, 1), scores={"cls_logits": scores})
    found = op.compress(group, [(6, 3), (7, 6)]).scores["cls_logits"]
    plane = scores[0].view(7, 6)[:6, :3].view(3, 2, 3, 1).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(found[0], plane)
    other = op.compress(replace(group, grid=(6, 7)), [(3, 3), (6, 7)]).scores["cls_logits"]
    torch.testing.assert_close(other[0], scores[0].view(6, 7)[:3, :3].flatten())


def test_the_budget_of_a_resampler_is_shared_by_saliency():
    model, processor = unequal(view_ops=[RESAMPLER], adapter={"part": "identity"})
    least, full = processor.image_processor.min_image_tokens(112, 168), processor.image_tokens(112, 168)
    assert (least, full) == (7, 69)
    for budget in (least, 30, full):
        batch = ask(processor, (112, 168), max_image_tokens=budget)
        with torch.no_grad():
            kept = model(**batch, output_token_map=True).token_map.kept
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == int(kept.sum()) == budget


def test_what_slices_cannot_join_is_refused_by_name():
    model, processor = parts("llava_uhd", unequal_views=False, connector_config={"layout": UHD_LAYOUT})
    batch = ask(processor, (40, 200))
    with pytest.raises(
        ValueError, match=r"pixel_values has the shape .* this model reads views of shape \(views, 3, 56"
    ):
        model(**batch)
    perceiver = [{"part": "sa_perceiver"}, RESAMPLER]
    with pytest.raises(ValueError, match="uhd_resampler reads the views of the main tower, but none reach it"):
        HiResLmmUhdResampler.describe(HiResLmmUhdResampler.Options(), PartContext(None, 8, 8, {}, (4, 4)))
    former = {"part": "query_former", "num_queries": 4}
    for connector in ({"view_ops": perceiver}, {"view_ops": [], "adapter": former}):
        with pytest.raises(ValueError, match="reads views of one size; leave out unequal_views"):
            tiny_config("llava_uhd", connector_config={"layout": UHD_LAYOUT, **connector})
    model, processor = unequal(view_ops=[RESAMPLER], adapter=former)
    assert_batch_is_single(model, processor, (40, 200), (90, 60))


OPS = {
    "query_compressor": {"on": "all", "num_queries": 4},
    "conv_merge": {},
    "mqt": {"num_queries": 4, "num_heads": 2},
    "mqt of content": {"part": "mqt", "num_queries": 4, "num_heads": 2, "key_mode": "content"},
    "uhd_resampler": {"num_queries": 4, "num_heads": 2},
    "self_mining_sampler": {"pool": [2, 3], "num_heads": 2},
}


@pytest.mark.parametrize("merged", [False, True], ids=["patches", "merged"])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_an_op_on_unequal_views_is_the_op_on_each_alone(name, merged):
    """Also behind one that merges patches: what pads a view to the largest of the batch counts nowhere."""
    op = {"part": name, **OPS[name]}
    model, processor = unequal(view_ops=[{"part": "conv_merge"}, op] if merged else [op])
    batch = geometry_of(ask(processor, *UHD_SIZES))
    for pixels, (high, wide) in zip(
        batch["pixel_values"], (14 * batch["view_positions"][:, 6:8]).tolist(), strict=True
    ):
        pixels[:, high:], pixels[:, :, wide:] = 9.0, 9.0
    together = model.model.get_image_features(**batch).pooler_output
    for size, found in zip(UHD_SIZES, together, strict=True):
        own = model.model.get_image_features(**geometry_of(ask(processor, size))).pooler_output[0]
        assert len(found) == processor.image_tokens(*size)
        torch.testing.assert_close(own, found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ops", [[], [RESAMPLER]], ids=["patches", "resampler"])
def test_a_prefill_with_unequal_views_compiles_whole(ops):
    model, processor = unequal(view_ops=ops)
    batch = ask(processor, UHD_SIZES[0])
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    inputs["image_geometry"] = model.model.read_images(batch["view_positions"], batch["view_spans"])
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        wanted = model(**batch, logits_to_keep=1).logits  # the first call installs hooks, which no compiler follows
        found = compiled(**inputs, logits_to_keep=1, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


# ---- layers of the tower across crops -----------------------------------------------------------------------------
def opened(op):
    """A slice restore whose gates are open."""
    with torch.no_grad():
        op.local_gate.fill_(0.7)
        op.global_gate.fill_(-0.4)
    return op


def restored(op, crops, rows, cols):
    """What it makes of crops `(n, 16, C)`, on their map, by operations on whole maps."""
    planes = crops.view(rows, cols, 4, 4, -1).permute(4, 0, 2, 1, 3).reshape(1, -1, 4 * rows, 4 * cols)
    around = functional.conv2d(planes, op.local_conv.weight, op.local_conv.bias, padding=1, groups=planes.shape[1])
    small = functional.adaptive_avg_pool2d(planes, (2 * rows, 2 * cols))
    tokens = op.global_norm(small.flatten(2).transpose(1, 2))
    read = op.attention(tokens, tokens, tokens).transpose(1, 2).view(small.shape)
    far = functional.interpolate(read, planes.shape[2:], mode="bilinear")
    found = planes + op.local_gate * around + op.global_gate * far
    return found.view(-1, rows, 4, cols, 4).permute(1, 3, 2, 4, 0).reshape(crops.shape)


RESTORE = {"part": "slice_restore", "num_heads": 2, "layers": [0, 1]}


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_crops_are_joined_in_the_tower(vision):
    model, processor = parts(vision=vision, connector_config={"layer_ops": [RESTORE]})
    plain, _ = parts(vision=vision)
    plain.model.load_state_dict(model.model.state_dict(), strict=False)
    op, sizes = model.model.connector.layer_ops[0], ((90, 60), (40, 200), (60, 50))
    batch = ask(processor, *sizes)
    op.init_weights()
    before = model.model.get_image_features(**geometry_of(batch)).pooler_output
    opened(op)
    shapes = [tuple(own) for own in batch["view_positions"][batch["view_positions"][:, 8] == 1, 1:3].tolist()]

    def join(module, args, output):
        hidden, at = (output[0] if isinstance(output, tuple) else output).clone(), 0
        for rows, cols in shapes:
            own = slice(at + 1, at + 1 + rows * cols)
            hidden[own, -16:] = restored(op, hidden[own, -16:], rows, cols)
            at += 1 + rows * cols
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for layer in layers_of(plain.model.vision_tower)[:2]:  # before the first call, which hangs hooks of its own
        layer.register_forward_hook(join)
    wanted = plain.model.get_image_features(**geometry_of(batch)).pooler_output
    found = model.model.get_image_features(**geometry_of(batch)).pooler_output
    for own, joined, alone in zip(found, wanted, before, strict=True):
        torch.testing.assert_close(own, joined, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own[:16], alone[:16], atol=1e-4, rtol=1e-4)  # the global view
        assert (own[16:] - alone[16:]).abs().max() > 0.01
    assert_batch_is_single(model, processor, *sizes)


@torch.no_grad()
def test_chunks_of_views_never_split_an_image():
    model, processor = parts(connector_config={"layer_ops": [RESTORE]})
    opened(model.model.connector.layer_ops[0])
    batch, seen = ask(processor, (90, 60), (40, 200), (60, 50)), []
    wanted = model.model.get_image_features(**geometry_of(batch)).pooler_output
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for size in (1, 5, 8):
        model.config.vision_chunk_size, seen[:] = size, []
        found = model.model.get_image_features(**geometry_of(batch)).pooler_output
        assert len(seen) > 1 and sum(seen) == len(batch["pixel_values"])
        for own, whole in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_new_model_sees_as_one_without_the_layer_op():
    config = tiny_config("hires_llava", connector_config={"layer_ops": [RESTORE], "view_ops": [SAMPLER]})
    model, processor = HiResLmmForConditionalGeneration(config).eval(), tiny_processor(config)
    plain = HiResLmmForConditionalGeneration(
        tiny_config("hires_llava", connector_config={"layer_ops": [], "view_ops": [SAMPLER]})
    ).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = ask(processor, (90, 60), (40, 200))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    opened(model.model.connector.layer_ops[0])
    assert not torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-4)


def test_what_slice_restore_cannot_join_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Bad option in layer_ops\[0\] \(slice_restore\).*vision_tower"):
        tiny_config("llava_next", connector_config={"layer_ops": [{**RESTORE, "of": "language_model"}]})
    with pytest.raises(ValueError, match="needs views of one size; leave out unequal_views"):
        tiny_config("llava_uhd", connector_config={"layer_ops": [RESTORE], "layout": UHD_LAYOUT})
    with pytest.raises(ValueError, match="num_heads=5 does not divide the width"):
        parts(connector_config={"layer_ops": [{**RESTORE, "num_heads": 5}]})
    model, processor = parts(connector_config={"layer_ops": [RESTORE]})
    batch = ask(processor, (90, 60))
    rows = [row for row in range(len(batch["pixel_values"])) if row != 1]  # a crop is missing
    images = {name: value[rows] for name, value in geometry_of(batch).items()}
    with pytest.raises(ValueError, match="slice_restore lays crops side by side, but an image has 3 of 2 x 2"):
        model.model.get_image_features(**images)


# ---- pooled tokens that read their view ---------------------------------------------------------------------------
SAMPLER = {"part": "self_mining_sampler", "pool": [2, 3], "num_heads": 2}


@pytest.mark.parametrize("preset", ["hires_llava", "llava_uhd"])
@torch.no_grad()
def test_the_sampler_gives_as_many_tokens_of_every_view(preset):
    """Views of one size and of unequal ones; each as if it were alone."""
    connector = {"view_ops": [SAMPLER], "adapter": {"part": "mlp"}, "layer_ops": []}
    layout = UHD_LAYOUT if preset == "llava_uhd" else {"crop_order": "views"}
    model, processor = parts(preset, connector_config={**connector, "layout": layout})
    batch = ask(processor, *UHD_SIZES)
    features = model.model.get_image_features(**geometry_of(batch)).pooler_output
    op, row = model.model.connector.view_ops[0], 0
    for size, found in zip(UHD_SIZES, features, strict=True):
        wanted = []
        for view in processor.image_processor.plan(*size).views:
            hidden = alone(model.model.vision_tower, batch["pixel_values"][row], view)
            plane = hidden[0].unflatten(0, view.patches).permute(2, 0, 1)
            pooled = functional.adaptive_avg_pool2d(plane, (2, 3)).flatten(1).T
            keys = op.key_norm(hidden)
            tokens = op.attention(op.query_norm(pooled)[None], keys, keys) + pooled
            wanted.append(model.model.connector.adapter(tokens, view.kind)[0])
            row += 1
        if preset == "llava_uhd":
            table = model.get_input_embeddings().weight
            views = processor.image_processor.plan(*size).views[1:]
            marks = [([11] * (view.col > 0), [13] * (view.col == view.grid_cols - 1)) for view in views]
            crops = zip(marks, wanted[1:], strict=True)
            wanted = [torch.cat([table[before], own, table[behind]]) for (before, behind), own in crops] + wanted[:1]
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)
        assert processor.image_tokens(*size) == len(found)
    assert_batch_is_single(model, processor, *UHD_SIZES)


@pytest.mark.parametrize("pool", [[2], [2, 0], [2, 2.0], [True, 2]], ids=str)
def test_what_is_no_pool_is_refused(pool):
    with pytest.raises(ValueError, match="must be rows and columns of tokens, two integers of at least 1"):
        tiny_config("hires_llava", connector_config={"view_ops": [{**SAMPLER, "pool": pool}]})
