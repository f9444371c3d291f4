"""What makes the model fast keeps its values: checks and scores in one pass over large tensors."""

import inspect

import pytest
import torch

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.modeling.inputs_hires_lmm import all_finite
from hires_lmm.modeling.routers_hires_lmm import cosine_scores, saliency_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    pixels = torch.randn(2, 3, 5, 7).to(dtype)
    assert bool(all_finite(pixels))
    for place in (0, 100, 209):
        broken = pixels.clone()
        broken.view(-1)[place] = value
        assert not bool(all_finite(broken))


def test_the_largest_values_are_finite_and_nothing_is():
    most = torch.finfo(torch.float32).max
    assert bool(all_finite(torch.tensor([most, -most, most])))
    assert bool(all_finite(torch.empty(0, 3)))
    assert all_finite(torch.empty(2, 3, device="meta")).device.type == "meta"  # nothing waits for the device
    leaf = torch.ones(3, requires_grad=True)
    assert not all_finite(leaf).requires_grad


def largest_block(call) -> int:
    """Bytes of the largest tensor that a call makes."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    return max(event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]")


def test_checks_and_scores_copy_no_features():
    features, text = torch.randn(5000, 256), torch.randn(9, 256)
    calls = (
        lambda: all_finite(features),
        lambda: saliency_scores(features),
        lambda: cosine_scores(features, text, torch.ones(9)),
    )
    for call in calls:
        assert largest_block(call) <= 5000 * 8 < features.nbytes / 100


def test_decoding_reads_no_signature_anew(monkeypatch):
    """For custom code the library asks for the signature of `forward` with every token."""
    model = tiny_model(tiny_config("llava_next"))
    processor = tiny_processor(model.config)
    batch = make_batch(processor, [("<image>What is it?", [random_image(60, 90)])])
    forward = type(model).forward
    read, counts = [], []
    original = inspect._signature_from_function

    def noted(cls, function, **options):
        read.append(function)
        return original(cls, function, **options)

    monkeypatch.setattr(inspect, "_signature_from_function", noted)
    for is_ready in (True, False):
        if not is_ready:
            monkeypatch.delattr(forward, "__signature__")
        model.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        counts.append(read.count(inspect.unwrap(forward)))
        read.clear()
    assert counts[0] == 0 < counts[1]
