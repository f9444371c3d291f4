"""The plans of VLSA and its ablation: what each stage of each row trains, weighs and asks."""

import pytest

from builders.objectives import reconstruction, vlsa_config
from builders.tiny import tiny_config, tiny_model
from hires_lmm.training import get_plan
from hires_lmm.training.objectives.run import attach
from hires_lmm.training.parameters import list_parts, part_name


EPIGONE, DENOISER = "objectives.reconstruction.epigone", "objectives.reconstruction.denoiser"
LANGUAGE = {"language_model", "lm_head"}


def next_config():
    return tiny_config("llava_next")


def low_config():
    return vlsa_config(view_ops=[])


# plan -> model, views, reconstruction, cognition
ROWS = {
    "vlsa_baseline": (next_config, "all", False, False),
    "vlsa_low_resolution": (low_config, "global", False, False),
    "vlsa_perceiver": (vlsa_config, "all", False, False),
    "vlsa_reconstruction": (vlsa_config, "all", True, False),
    "vlsa_cognition": (next_config, "all", False, True),
    "vlsa": (vlsa_config, "all", True, True),
}


@pytest.mark.parametrize("plan", ROWS)
def test_every_row_trains_what_it_has(plan):
    make_config, views, has_reconstruction, has_cognition = ROWS[plan]
    model = tiny_model(make_config())
    if has_reconstruction:
        attach(model, model.model, {"reconstruction": reconstruction(model)})
    stages = get_plan(plan)
    assert [stage.name for stage in stages] == [f"{plan}/I", f"{plan}/II", f"{plan}/III"]
    assert [stage.batch_size for stage in stages] == [256, 256, 128]
    connector = {part for part in list_parts(model) if part.startswith("connector")}
    assert ("connector.view_ops.0" in connector) is (make_config is vlsa_config)
    painted = [{EPIGONE}, {EPIGONE, DENOISER}, {EPIGONE, DENOISER}] if has_reconstruction else [set()] * 3
    expected = [connector, connector | {"vision_tower"}, connector | {"vision_tower"} | LANGUAGE]
    for stage, parts, extra in zip(stages, expected, painted, strict=True):
        stage.apply(model)
        learning = {part_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = {part for part in list_parts(model) if any(f"{name}.".startswith(f"{part}.") for name in learning)}
        assert found == parts | extra
        assert stage.views == views
        assert stage.loss_weights == ({"reconstruction": 1.0} if has_reconstruction else {})
    asked = [stage.cognition for stage in stages]
    assert asked == [None, None, {"pixels": 0.5, "codebook": 0.5} if has_cognition else None]


def test_the_rates_are_as_documented():
    first, second, third = get_plan("vlsa", "llama3_8b")
    assert first.trainable == {"connector": 1e-3, EPIGONE: 1e-3}
    assert second.trainable == {"vision_tower": 2e-6, "connector": 1e-4, EPIGONE: 1e-4, DENOISER: 1e-5}
    assert third.trainable == {
        "vision_tower": 2e-6,
        **dict.fromkeys(("connector", "language_model", "lm_head", EPIGONE, DENOISER), 1e-5),
    }
    assert get_plan("vlsa", tower_rate=3e-6)[1].trainable["vision_tower"] == 3e-6
    with pytest.raises(ValueError, match="Unknown column 'vicuna_7b'"):
        get_plan("vlsa", "vicuna_7b")
