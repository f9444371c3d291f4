"""Views pass the tower in chunks: the same values and gradients, at most so many views at once."""

import pytest
import torch

from builders.tiny import (
    geometry_of,
    make_batch,
    random_image,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)
from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration
from hires_lmm.modeling.towers_hires_lmm import is_sharded, split_views


@pytest.fixture(scope="module", params=["clip", "siglip"])
def parts(request):
    config = tiny_config("slime", vision=tiny_vision_config(request.param), planner={"name": "slime", "max_crops": 6})
    processor = tiny_processor(config)
    samples = [
        ("<image> What?", [random_image(100, 150)]),
        ("<image> And <image>?", [random_image(60, 40, s) for s in (1, 2)]),
    ]
    return tiny_model(config), make_batch(processor, samples, max_image_tokens=30)


def rows_of(model, call) -> list[int]:
    """Views in each call of the tower."""
    rows = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    call()
    handle.remove()
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_values_are_equal_and_chunks_bounded(parts, size, monkeypatch):
    model, batch = parts
    views = len(batch["pixel_values"])
    found = {}
    with torch.no_grad():
        expected = model(**batch, output_token_map=True)
        with monkeypatch.context() as patch:
            patch.setattr(model.config, "vision_chunk_size", size)
            rows = rows_of(model, lambda: found.update(out=model(**batch)))
        features = model.get_image_features(
            *(batch[name] for name in ("pixel_values", "view_positions", "view_spans")), vision_chunk_size=size
        )
    assert views > 4 and rows == [size] * (views // size) + [views % size] * (views % size > 0)
    torch.testing.assert_close(found["out"].logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert features.last_hidden_state.shape[0] == views


def test_gradients_are_equal(parts, monkeypatch):
    model, batch = parts
    kept = model.train().model.connector.token_ops[0].options.noise
    model.model.connector.token_ops[0].options.noise = 0.0
    model.model.connector.adapter.forced_expert = "mlp"
    found = []
    try:
        for size in (None, 2):
            model.zero_grad()
            labels = torch.where(batch["input_ids"] == model.config.image_token_id, -100, batch["input_ids"])
            monkeypatch.setattr(model.config, "vision_chunk_size", size)
            model(**batch, labels=labels, prompt_mask=batch["attention_mask"]).loss.backward()
            named = model.model.vision_tower.named_parameters()
            found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    finally:
        model.eval().zero_grad()
        model.model.connector.token_ops[0].options.noise = kept
        model.model.connector.adapter.forced_expert = None
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_configuration_sets_it_and_the_call_goes_before(parts, tmp_path):
    model, batch = parts
    views = len(batch["pixel_values"])
    model.config.vision_chunk_size = 4
    try:
        with torch.no_grad():
            assert max(rows_of(model, lambda: model(**batch))) == 4
            images = geometry_of(batch)
            assert max(rows_of(model, lambda: model.get_image_features(**images, vision_chunk_size=views))) == views
            generated = rows_of(model, lambda: model.generate(**batch, max_new_tokens=2))
        assert max(generated) == 4 and sum(generated) == views
        model.save_pretrained(tmp_path)
    finally:
        model.config.vision_chunk_size = None
    assert HiResLmmForConditionalGeneration.from_pretrained(tmp_path).config.vision_chunk_size == 4


@pytest.mark.parametrize("size", [0, -1])
def test_a_wrong_size_is_refused(parts, size):
    model, batch = parts
    with pytest.raises(ValueError, match=f"vision_chunk_size={size} must be an integer of at least 1"):
        model.get_image_features(**geometry_of(batch), vision_chunk_size=size)
    with pytest.raises(ValueError, match=f"vision_chunk_size={size} must be at least 1"):
        HiResLmmConfig(vision_chunk_size=size)


def test_a_tower_that_is_spread_over_processes_is_called_once():
    tower, pixels = torch.nn.Linear(2, 2), torch.zeros(5, 2)
    assert not is_sharded(tower) and [len(part) for part in split_views(pixels, 2, tower)] == [2, 2, 1]
    tower.weight.ds_id = 0  # what DeepSpeed puts on the parameters of ZeRO-3
    assert is_sharded(tower) and [len(part) for part in split_views(pixels, 2, tower)] == [5]
