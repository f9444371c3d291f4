"""The presets that read videos: images too, with one checkpoint; budgets, mixed batches, weights of another preset."""

import copy
import random

import pytest
import torch

from builders.reload import CHANGES, COMPRESS
from builders.tiny import geometry_of, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from hires_lmm.conversion import apply_preset
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.geometry_hires_lmm import Kind, spread_evenly


SMALL = {
    "pllava": {**CHANGES["pllava"], "video_planner": {"num_frames": 6}},
    "ts_llava": {**CHANGES["ts_llava"], "video_planner": {"num_frames": 7}},
    "slime_video": CHANGES["slime_video"],
    "llava_mini": {"video_planner": {"name": "frames", "num_frames": 5}},
}
MERV = {
    "planner": {"name": "multiple", "views": "global"},
    "video_planner": {"name": "frames"},
    "extra_towers": {"fine": tiny_vision_config("siglip", 84, hidden_size=16).to_dict()},
    "connector_config": {
        "adapter": {"part": "linear"},
        "map_ops": [{"part": "tower_mixer", "shape": [3, 2, 2], "query_width": 16}],
        "layout": {"order": ["global", "frames"]},
    },
}
every_preset = pytest.mark.parametrize("preset", SMALL)


def clip(frames: int, height: int = 50, width: int = 70, seed: int = 0) -> list:
    return [random_image(height, width, 100 * seed + number) for number in range(frames)]


def build(preset: str):
    config = tiny_config(
        "llava_next" if preset == "merv" else preset, **copy.deepcopy({**SMALL, "merv": MERV}[preset])
    )
    return tiny_model(config), tiny_processor(config)


def run(model, processor, texts, images=None, videos=None, **options) -> torch.Tensor:
    batch = processor(text=texts, images=images, videos=videos, return_tensors="pt", padding=True, **options)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("preset", [*SMALL, "merv"])
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
def test_counts_follow_from_the_number_of_frames_alone(preset):
    _, processor = build(preset)
    most = processor.image_processor.num_frames
    draw = random.Random(0)
    for _ in range(50):
        frames, height, width = draw.randint(6, 12), draw.randint(20, 900), draw.randint(20, 900)
        taken = min(frames, most)
        wanted = {
            "pllava": 4 * 3 * 2,
            "ts_llava": min(20, 16 * taken) + 16,
            "slime_video": 16 + 1 + 4 * taken,
            "llava_mini": taken,
        }[preset]
        assert processor.video_tokens(frames, height, width) == wanted
        if preset != "llava_mini":
            budget = draw.randint(19, wanted + 9)
            assert processor.video_tokens(frames, height, width, max_image_tokens=budget) == min(budget, wanted)


@every_preset
def test_a_budget_is_honoured_exactly_on_a_video(preset):
    model, processor = build(preset)
    if preset == "llava_mini":
        with pytest.raises(ValueError, match=r"max_image_tokens=3 is too small.* 5"):
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
    parts = {"view_ops": [COMPRESS], "layout": {"separators": separators}}
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


@torch.no_grad()
def test_a_converted_llava_next_reads_videos_as_pllava():
    """Its tokens are those of the projector, pooled by torch."""
    config = tiny_config("llava_next")
    model, processor = tiny_model(config), tiny_processor(config)
    adapter = model.model.connector.adapter
    processor = apply_preset(model, processor, "pllava")
    batch = processor(text="<video> What?", videos=[clip(16)], return_tensors="pt")
    features = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    volume = adapter(features, int(Kind.FRAME)).permute(2, 0, 1).unflatten(2, (4, 4))
    wanted = torch.nn.functional.adaptive_avg_pool3d(volume, (16, 12, 12)).flatten(1).T
    found = model.model.get_image_features(**geometry_of(batch)).tokens.features
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_budget_is_shared_evenly_among_frames_by_the_attention_of_the_class_token():
    parts = {"token_ops": [{"part": "globalcom2"}], "layout": {"order": ["global", "crops", "frames"]}}
    config = tiny_config("llava_next", connector_config=parts)
    model, processor = tiny_model(config), tiny_processor(config)
    video = clip(3)
    batch = processor(text="<video> What?", videos=[video], return_tensors="pt", max_image_tokens=16)
    tokens = model.model.get_image_features(**geometry_of(batch)).tokens
    tower = copy.deepcopy(model.model.vision_tower)
    last, norm = tower.encoder.layers[-1], tower.encoder.layers[-1].layer_norm1
    states = norm(tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2])
    query, key = last.self_attn.q_proj(states[:, :1]), last.self_attn.k_proj(states[:, 1:])
    scores = (query.unflatten(-1, (4, 8)) * key.unflatten(-1, (4, 8))).sum(-1).mean(-1)
    wanted = [own.topk(number).indices.sort().values.tolist() for own, number in zip(scores, (6, 5, 5), strict=True)]
    assert [own.nonzero()[:, 0].tolist() for own in tokens.kept.unflatten(0, (3, 16))] == wanted
    texts, picture = ["<video> What?", "<image> What?", "Text."], random_image(90, 60)
    together = run(model, processor, texts, [picture], [video], max_image_tokens=16)
    alone = run(model, processor, texts[:1], None, [video], max_image_tokens=16)
    torch.testing.assert_close(together[0, -alone.shape[1] :], alone[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "op", [{"part": "keep_after", "layers": 0, "share": 0.5}, {"part": "dyvte", "layers": [0]}], ids=str
)
@torch.no_grad()
def test_layer_ops_drop_tokens_of_frames(op):
    """In a batch as alone; behind the first layer half of the tokens of a video are left."""
    changes = copy.deepcopy(SMALL["pllava"])
    changes["connector_config"]["layer_ops"] = [op]
    config = tiny_config("pllava", **changes)
    model, processor = tiny_model(config), tiny_processor(config)
    texts, video = ["<video> What happens?", "<image> What is it?", "Just text."], clip(9)
    together = run(model, processor, texts, [random_image(90, 60)], [video])
    alone = run(model, processor, texts[:1], None, [video])
    torch.testing.assert_close(together[0, -3:], alone[0, -3:], atol=1e-4, rtol=1e-3)
    batch = processor(text=texts[:1], videos=[video], return_tensors="pt")
    cache = model(**batch, use_cache=True)[CACHE]
    lengths = [cache.get_seq_length(layer) for layer in range(2)]
    if op["part"] == "keep_after":
        assert lengths[0] - lengths[1] == 12  # of 4 x 3 x 2


@every_preset
def test_a_step_of_training_on_any_batch_trains_the_same_parameters(preset):
    model, processor = build(preset)
    model.train()
    touched = []
    for texts, images, videos in (
        (["<video> What?"], None, [clip(9)]),
        (["<image> What?"], [random_image(90, 60)], None),
        (["Text."], None, None),
    ):
        model.zero_grad()
        batch = processor(text=texts, images=images, videos=videos, return_tensors="pt")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        connector = model.model.connector.named_parameters()
        touched.append({name for name, parameter in connector if parameter.grad is not None})
    assert touched[0] == touched[1] == touched[2] and touched[0]
