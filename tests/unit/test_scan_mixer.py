"""The view op `scan_mixer`: where it starts, what it refuses, views of unequal size."""

import math

import pytest
import torch

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.carriers_hires_lmm import ViewGroup
from hires_lmm.modeling.geometry_hires_lmm import Kind


MIXER = {"part": "scan_mixer", "state_size": 4, "head_dim": 16}


def config_with(**options):
    return tiny_config("llava_next", connector_config={"view_ops": [{**MIXER, **options}]})


def test_a_checkpoint_without_it_starts_it_as_a_new_model_does(tmp_path):
    tiny_model(tiny_config("llava_next")).save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # memory without a value is NaN then
    try:
        model, _ = HiResLmmForConditionalGeneration.from_pretrained(
            tmp_path, config=config_with(), output_loading_info=True
        )
    finally:
        torch.use_deterministic_algorithms(False)
    mixer = model.model.connector.view_ops[0].mixer
    torch.testing.assert_close(mixer.A_log, torch.tensor([math.log(n) for n in range(1, 5)]))
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert torch.equal(mixer.D, torch.ones(4)) and bool(((steps > 9e-4) & (steps < 0.11)).all())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@torch.no_grad()
def test_views_of_unequal_size_are_read_each_by_itself():
    part = tiny_model(config_with()).model.connector.view_ops[0]
    small, large = torch.randn(1, 2 * 3, 32), torch.randn(1, 4 * 4, 32)
    padded = torch.full((1, 4, 4, 32), 7.0)
    padded[:, :2, :3] = small.unflatten(1, (2, 3))
    group = ViewGroup(int(Kind.CROP), torch.cat([padded.flatten(1, 2), large]), (4, 4), (0, 1))
    found = part.forward_views(group, [(2, 3), (4, 4)]).features.unflatten(1, (4, 4))
    torch.testing.assert_close(found[:1, :2, :3].flatten(1, 2), part.forward_group(small, (2, 3)))
    torch.testing.assert_close(found[1:].flatten(1, 2), part.forward_group(large, (4, 4)))


def test_the_compiled_part_gives_the_same():
    part = tiny_model(config_with(scan="rotated")).model.connector.view_ops[0]
    features = torch.randn(2, 12, 32)
    compiled = torch.compile(part.forward_group, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, (3, 4)), part.forward_group(features, (3, 4)))


def test_a_patch_hears_of_all_others():
    """The first in one order is the last in another: a change anywhere reaches every patch."""
    model, processor = tiny_model(config_with()), tiny_processor(config_with())
    part = model.model.connector.view_ops[0]
    features = torch.randn(1, 12, 32, requires_grad=True)
    for place in (0, 5, 11):
        (heard,) = torch.autograd.grad(part.forward_group(features, (3, 4))[0, place].sum(), features)
        assert bool((heard[0].abs().amax(dim=1) > 0).all())
    batch = make_batch(processor, [("<image> What is it?", [random_image(90, 130)])])
    assert bool(torch.isfinite(model(**batch).logits).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 24}, "scan_mixer has head_dim=24, which does not divide 64"),
        ({"state_size": 0}, "state_size=0 and head_dim=16 must be at least 1"),
        ({"scan": "spiral"}, "scan"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(config_with(**options))
