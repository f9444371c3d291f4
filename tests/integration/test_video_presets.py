"""The presets that read videos: images too, with one checkpoint; budgets, mixed batches, weights of another preset."""

import copy

import pytest
import torch

from builders.tiny import geometry_of, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.conversion import apply_preset
from hires_lmm.modeling.geometry_hires_lmm import Kind, spread_evenly


COMPRESS = {"part": "query_compressor", "on": ["crops", "frames"], "num_queries": 4}
SMALL = {
    "pllava": {
        "connector_config": {"map_ops": [{"part": "pool3d", "shape": [4, 3, 2]}]},
        "video_planner": {"num_frames": 6},
    },
    "ts_llava": {
        "planner": {"name": "llava_next", "pinpoints": [[56, 112], [112, 56], [112, 112]]},
        "connector_config": {"view_ops": [{"part": "sample_tokens", "number": 20}]},
        "video_planner": {"num_frames": 7},
    },
    "slime_video": {
        "connector_config": {
            "view_ops": [{"part": "mean_global"}, COMPRESS],
            "layout": {
                "order": ["global", "crops", "frames"],
                "separators": {"separator": {"place": "between_views", "value": [7]}},
            },
        },
        "video_planner": {"num_frames": 8},
    },
    "llava_mini": {
        "connector_config": {
            "view_ops": [{"part": "mini_compressor", "num_queries": 1, "num_heads": 2}],
            "token_ops": [{"part": "prompt_fuser", "num_layers": 1, "num_heads": 2}],
        },
        "video_planner": {"name": "frames", "num_frames": 5},
    },
}
every_preset = pytest.mark.parametrize("preset", SMALL)


def clip(frames: int, height: int = 50, width: int = 70, seed: int = 0) -> list:
    return [random_image(height, width, 100 * seed + number) for number in range(frames)]


def build(preset: str):
    config = tiny_config(preset, **copy.deepcopy(SMALL[preset]))
    return tiny_model(config), tiny_processor(config)


def run(model, processor, texts, images=None, videos=None, **options) -> torch.Tensor:
    batch = processor(text=texts, images=images, videos=videos, return_tensors="pt", padding=True, **options)
    with torch.no_grad():
        return model(**batch).logits


@every_preset
def test_a_batch_of_a_video_an_image_and_a_text_equals_its_rows(preset):
    model, processor = build(preset)
    texts = ["<video> What happens?", "<image> What is it?", "Just text."]
    picture, video = random_image(90, 60), clip(9)
    together = run(model, processor, texts, [picture], [video])
    alone = [run(model, processor, texts[:1], None, [video]), run(model, processor, texts[1:2], [picture])]
    alone.append(run(model, processor, texts[2:]))
    for row, own in enumerate(alone):
        torch.testing.assert_close(together[row, -own.shape[1] :], own[0], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(alone[0][0, -1], run(model, processor, texts[:1], None, [clip(9, seed=1)])[0, -1])


@every_preset
def test_counts_of_videos_are_those_of_the_model(preset):
    model, processor = build(preset)
    wanted = {"pllava": 4 * 6, "ts_llava": 20 + 16, "slime_video": 16 + 1 + 8 * 4, "llava_mini": 5}[preset]
    for frames in (9, 8, 30):
        assert processor.video_tokens(frames, 50, 70) == wanted
        batch = processor(text="<video>", videos=[clip(frames)], return_tensors="pt")
        tokens = model.model.get_image_features(**geometry_of(batch)).tokens
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == wanted
        assert preset == "llava_mini" or tokens.lengths == [wanted]


@every_preset
def test_a_budget_is_honoured_exactly_on_a_video(preset):
    model, processor = build(preset)
    if preset == "llava_mini":
        with pytest.raises(ValueError, match="max_image_tokens=3 is too small.* 5"):
            processor(text="<video>", videos=[clip(9)], max_image_tokens=3)
        return
    full = processor.video_tokens(9, 50, 70)
    for budget in (full - 1, 19, full + 5):
        batch = processor(text="<video> What?", videos=[clip(9)], max_image_tokens=budget, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch, output_token_map=True)
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == min(budget, full)
        assert int(found.token_map.kept.sum()) == min(budget, full) or (preset == "slime_video" and budget > full)


def test_slime_video_reads_the_mean_of_the_frames_and_then_their_map_row_by_row():
    model, processor = build("slime_video")
    batch = processor(text="<video> What?", videos=[clip(8)], return_tensors="pt", max_image_tokens=49)
    with torch.no_grad():
        found = model(**batch, output_token_map=True).token_map
    assert found.kind.tolist() == [int(Kind.GLOBAL)] * 16 + [int(Kind.SEPARATOR)] + [int(Kind.FRAME)] * 32
    rows = [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]]
    assert found.view[17:].tolist() == 2 * rows[0] + 2 * rows[1]


def test_ts_llava_samples_all_frames_and_then_shows_the_collage():
    model, processor = build("ts_llava")
    batch = processor(text="<video>", videos=[clip(7)], return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, output_token_map=True).token_map
    places = spread_evenly(7 * 16, 20)
    assert found.view[:20].tolist() == [1 + place // 16 for place in places]
    assert (4 * found.cell[:20, 0] + found.cell[:20, 1]).tolist() == [place % 16 for place in places]
    assert found.view[20:].tolist() == [0] * 16


def test_a_converted_llava_next_reads_videos_as_ts_llava_with_the_same_weights(tmp_path):
    config = tiny_config("llava_next")
    model, processor = tiny_model(config), tiny_processor(config)
    weights = copy.deepcopy(model.state_dict())
    wanted = run(model, processor, ["<image> What?"], [random_image(90, 60)])
    with pytest.raises(ValueError, match="places no frames"):
        processor(text="<video>", videos=[clip(7)])
    processor = apply_preset(model, processor, "ts_llava")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(run(model, processor, ["<image> What?"], [random_image(90, 60)]), wanted)
    seen = run(model, processor, ["<video> What?"], None, [clip(7)])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = type(model).from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, again, ["<video> What?"], None, [clip(7)]), seen)


def test_released_slime_reads_videos_with_the_same_weights():
    separators = {"separator": {"place": "between_views", "value": [7]}}
    parts = {"view_ops": [{**COMPRESS, "on": "crops"}], "layout": {"separators": separators}}
    config = tiny_config("slime_release", connector_config=parts)
    model, processor = tiny_model(config), tiny_processor(config)
    weights = model.model.connector.state_dict()
    with pytest.raises(ValueError, match=r"adapter\.gate.* differ or are on one side only"):
        apply_preset(model, processor, "llava_next")
    wanted = run(model, processor, ["<image> What?"], [random_image(90, 60)])
    processor = apply_preset(model, processor, "slime_video")
    torch.testing.assert_close(run(model, processor, ["<image> What?"], [random_image(90, 60)]), wanted)
    moved = model.model.connector.view_ops[1].state_dict()
    assert all(torch.equal(value, weights[f"view_ops.0.{name}"]) for name, value in moved.items())
    assert run(model, processor, ["<video> What?"], None, [clip(8)]).isfinite().all()
