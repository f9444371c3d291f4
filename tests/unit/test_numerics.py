"""Generation and training in half precision, and equal scores."""

import functools

import pytest
import torch

import reference_routing as routing
from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.modeling.routers_hires_lmm import (
    keep_budget,
    keep_threshold,
)


halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
CASES = {
    "cosine": ("slime", "clip", "llama", routing.Rule("cosine", reduce="mean", temperature=0.05)),
    "attention": ("slime", "siglip", "qwen2", routing.Rule("attention")),
    "saliency": ("slime_release", "clip", "mistral", routing.Rule("saliency", "budget")),
    "monkey": ("monkey", "siglip", "gemma2", None),
    "llava_next": ("llava_next", "clip", "qwen3", None),
}
TEXT = "USER: <image>\nHow many cats are on the table? ASSISTANT:"


@functools.cache
def build(name: str, dtype: torch.dtype = torch.float32):
    preset, vision, text, rule = CASES[name]
    connector = dict(routing.SMALL_CONNECTORS.get(preset, {}))
    if rule is not None:
        connector["token_ops"] = rule.token_ops()
    config = tiny_config(preset, vision, text, connector_config=connector)
    return tiny_model(config, dtype=dtype), tiny_processor(config)


@functools.cache
def batch_of(name: str):
    return make_batch(build(name)[1], [(TEXT, [random_image(100, 180)])])


@halves
@pytest.mark.parametrize("name", CASES)
def test_generation_and_training_steps_run_in_half_precision(name, dtype):
    model, _ = build(name, dtype)
    batch = {**batch_of(name), "pixel_values": batch_of(name)["pixel_values"].to(dtype)}
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 3
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [weight.grad for weight in model.model.connector.parameters() if weight.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    model.zero_grad()


# --- ties ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_the_earlier_of_equal_scores_wins(count, dtype):
    scores = torch.full((count,), 0.3, dtype=dtype)
    for budget in {1, count // 2, count}:
        assert keep_budget(scores, budget).tolist() == [True] * budget + [False] * (count - budget)
    kept = keep_threshold(scores.float(), 0.5, 1.0)
    number = int(kept.sum())
    assert kept[:number].all() and number == count // 2 + 1


@torch.no_grad()
def all_scores_equal(name: str, rule: routing.Rule):
    """A model whose features are all the same vector: every score is equal."""
    preset, vision, text, _ = CASES[name]
    connector = {**routing.SMALL_CONNECTORS[preset], "token_ops": rule.token_ops(), "adapter": {"part": "linear"}}
    config = tiny_config(preset, vision, text, connector_config=connector)
    model, processor = tiny_model(config), tiny_processor(config)
    model.model.connector.adapter.linear.weight.zero_()
    return model, processor


@pytest.mark.parametrize("score", ["cosine", "attention", "saliency"])
@torch.no_grad()
def test_images_without_a_best_token_keep_their_first_ones(score):
    """Alone, in batches and again: the same set, the first tokens."""
    model, processor = all_scores_equal("cosine", routing.Rule(score))
    image, other = random_image(100, 180), random_image(70, 200, seed=5)
    for _ in range(2):
        for samples in ([(TEXT, [image])], [(TEXT, [other]), ("a " + TEXT, [image])], [(TEXT, [image])] * 3):
            found = model(**make_batch(processor, samples), output_token_map=True).token_map
            for number in range(len(samples)):
                routed = found.kept[(found.image == number) & (found.kind == 1)]
                count = int(routed.sum())
                assert routed[:count].all() and count == int(0.75 * len(routed)) + 1, (count, len(routed))


@pytest.mark.parametrize("name", ["cosine", "attention", "saliency"])
@torch.no_grad()
def test_equal_images_keep_the_same_set_and_runs_repeat(name):
    """Two equal images of a batch, two runs, and the image alone: one set."""
    model, processor = build(name)
    image = random_image(100, 180)
    extra = {"max_image_tokens": 40} if name == "saliency" else {}
    alone = model(**make_batch(processor, [(TEXT, [image])], **extra), output_token_map=True).token_map.kept
    assert 0 < int(alone.sum()) < len(alone)
    for _ in range(2):
        found = model(**make_batch(processor, [(TEXT, [image])] * 3, **extra), output_token_map=True).token_map
        for number in range(3):
            assert torch.equal(found.kept[found.image == number], alone)
