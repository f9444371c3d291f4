"""What the model reads back from the device: one copy before the tower, nothing after it, and so it compiles whole.

A meta tensor has no values: `.item()`, `.tolist()`, `.cpu()`, `nonzero` and masks as indices fail on it. A model on
the meta device that runs through has therefore read nothing back.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling import inputs_hires_lmm


COMPRESS = {"part": "query_compressor", "on": "crops", "num_queries": 4}
CHAINS = {
    "llava_next": {},
    "monkey": {"connector_config": {"view_ops": [{**COMPRESS, "on": "all"}]}},
    "slime": {
        "connector_config": {
            "view_ops": [COMPRESS],
            "token_ops": [{"part": "router", "on": "crops", "score": "cosine", "keep": {"rule": "budget"}}],
        },
        "answer_prefix_ids": [5, 6],
    },
    "saliency": {
        "connector_config": {
            "token_ops": [{"part": "router", "on": "all", "score": "saliency", "keep": {"rule": "budget"}}]
        }
    },
}
SIZES = ((60, 90), (120, 60))


def build(name: str, vision: str = "clip"):
    """Configuration and processor of one chain."""
    preset = name if name != "saliency" else "slime"
    config = tiny_config(preset, vision=tiny_vision_config(vision), **CHAINS[name])
    return config, tiny_processor(config)


def encode(processor, size=(60, 90), images: int = 1, **kwargs):
    samples = [("<image> " * images + "What is it?", [random_image(*size, seed) for seed in range(images)])]
    return make_batch(processor, samples, **kwargs)


def on_meta(config):
    with torch.device("meta"):
        return HiResLmmForConditionalGeneration(config).eval()


def moved(batch) -> dict[str, torch.Tensor]:
    return {name: value.to("meta") for name, value in batch.items()}


class Copies:
    """Stands for `copy_to_host`: gives values that the caller knows, and notes when it was asked."""

    def __init__(self, model, answers: list):
        self.answers, self.events = answers, []
        model.model.vision_tower.register_forward_pre_hook(lambda module, args: self.events.append("tower"))

    def __call__(self, *tensors):
        assert all(tensor is None or tensor.device.type == "meta" for tensor in tensors)
        assert [None if tensor is None else tensor.shape for tensor in tensors] == [
            None if answer is None else answer.shape for answer in self.answers
        ]
        self.events.append("copy")
        return list(self.answers)


def known(batch, config) -> list[torch.Tensor | None]:
    """Geometry, no objects, number of placeholders, whether pixels are finite, padding is missing or on the right."""
    count = (batch["input_ids"] == config.image_token_id).sum()
    mask = batch["attention_mask"]
    finite = batch["pixel_values"].isfinite().all()
    return [batch["view_positions"], batch["view_spans"], None, count, finite, mask.all(), (mask[:, -1] == 0).any()]


@pytest.mark.parametrize("budget", [None, 18])
@pytest.mark.parametrize("name", CHAINS)
def test_one_copy_before_the_tower_and_none_after_it(name, budget, monkeypatch):
    config, processor = build(name)
    batch = encode(processor, images=2, **({"max_image_tokens": budget} if budget else {}))
    model = on_meta(config)
    copies = Copies(model, known(batch, config))
    monkeypatch.setattr(inputs_hires_lmm, "copy_to_host", copies)
    with torch.no_grad():
        logits = model(**moved(batch), use_cache=True).logits
    assert logits.shape[:2] == batch["input_ids"].shape and logits.device.type == "meta"
    assert copies.events == ["copy", "tower"]


def test_the_hook_of_generate_copies_once_as_well(monkeypatch):
    config, processor = build("slime")
    batch = encode(processor)
    model = on_meta(config)
    copies = Copies(model, known(batch, config))
    monkeypatch.setattr(inputs_hires_lmm, "copy_to_host", copies)
    inputs = moved(batch)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        made = model._maybe_prepare_encoder_kwargs_for_generation(ids, inputs, "input_ids", model.generation_config)
        image = made["mm_encoder_outputs"]["image"]
        assert copies.events == ["copy", "tower"] and image.is_unpadded and not image.prompt.is_right_padded
        model(input_ids=ids, mm_encoder_outputs=made["mm_encoder_outputs"], attention_mask=inputs["attention_mask"])
    assert copies.events == ["copy", "tower"]


@pytest.mark.parametrize("name", CHAINS)
def test_given_geometry_nothing_is_copied(name):
    config, processor = build(name)
    batch = encode(processor)
    model = on_meta(config)
    images = model.model.read_images(batch["view_positions"], batch["view_spans"])
    inputs = {"input_ids": batch["input_ids"].to("meta"), "pixel_values": batch["pixel_values"].to("meta")}
    with torch.no_grad():
        assert model(**inputs, image_geometry=images).logits.device.type == "meta"


def test_generate_takes_every_form_of_the_images():
    config, processor = build("slime")
    model, batch = tiny_model(config), encode(processor, images=2)
    options = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(**batch, **options)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    images = model.model.read_images(batch["view_positions"], batch["view_spans"])
    found = model.generate(**text, pixel_values=batch["pixel_values"], image_geometry=images, **options)
    assert torch.equal(found, wanted)
    with torch.no_grad():
        features = model.model.encode_pixels(batch["pixel_values"])
    rest = {name: batch[name] for name in ("view_positions", "view_spans")}
    assert torch.equal(model.generate(**text, **rest, vision_features=features, **options), wanted)
    with pytest.raises(ValueError, match="image_geometry came without pixel_values"):
        model(**text, image_geometry=images)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_padding_is_known_and_changes_no_logits(padding):
    config, processor = build("llava_next")
    model, single = tiny_model(config), encode(processor)
    batch = dict(single)
    if padding != "none":
        pad = (3, 0) if padding == "left" else (0, 3)
        batch["input_ids"] = torch.nn.functional.pad(single["input_ids"], pad, value=processor.tokenizer.pad_token_id)
        batch["attention_mask"] = torch.nn.functional.pad(single["attention_mask"], pad, value=0)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        expected, found = model(**single).logits, model(**batch).logits
    assert seen[0] is None and (seen[1] is None) == (padding == "none")
    length = expected.shape[1]
    found = found[:, -length:] if padding == "left" else found[:, :length]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, backend",
    [("slime", "eager"), *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in CHAINS)],
)
def test_prefill_compiles_whole_once_a_grid(name, backend):
    config, processor = build(name)
    model, counter = tiny_model(config), CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    graphs = []
    for size in (SIZES[0], SIZES[0], SIZES[1], SIZES[0]):
        batch = encode(processor, size)
        images = model.model.read_images(batch["view_positions"], batch["view_spans"])
        inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], "image_geometry": images}
        with torch.no_grad():
            expected = model(**batch, logits_to_keep=1).logits
            found = compiled(**inputs, logits_to_keep=1, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]
    torch._dynamo.reset()


def test_decoding_with_a_static_cache_compiles_whole():
    config, processor = build("slime")
    model, batch = tiny_model(config), encode(processor)
    length = batch["input_ids"].shape[1]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    caches = [StaticCache(config=config.text_config, max_cache_len=length + 8) for _ in range(2)]
    with torch.no_grad():
        ids = [model(**batch, cache=cache, logits_to_keep=1).logits.argmax(-1) for cache in caches]
        for position in range(length, length + 4):
            inputs = {"position_ids": torch.tensor([[position]]), "logits_to_keep": 1}
            expected = model(ids[0], cache=caches[0], **inputs).logits
            found = step(ids[1], cache=caches[1], **inputs).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            ids = [expected.argmax(-1), found.argmax(-1)]
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prefill_is_captured_as_a_cuda_graph():
    config, processor = build("slime")
    model, batch = tiny_model(config).cuda(), encode(processor)
    images = model.model.read_images(batch["view_positions"], batch["view_spans"])
    inputs = {"input_ids": batch["input_ids"].cuda(), "pixel_values": batch["pixel_values"].cuda()}

    def run():
        return model(**inputs, image_geometry=images, logits_to_keep=1, use_cache=False).logits

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = run().clone()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        inputs["pixel_values"].copy_(inputs["pixel_values"].flip(-1))
        graph.replay()
        assert not torch.allclose(found, expected)
        torch.testing.assert_close(found, run())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CHAINS)
def test_nothing_waits_for_a_cuda_device_after_the_tower(name):
    config, processor = build(name)
    model, batch = tiny_model(config).cuda(), encode(processor, images=2).to("cuda")
    with torch.no_grad():
        model(**batch, logits_to_keep=1)
        tower = model.model.vision_tower
        tower.register_forward_pre_hook(lambda module, args: torch.cuda.set_sync_debug_mode("error"))
        try:
            model(**batch, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
