"""Plans of published systems: what they train in the model of their preset, and what they leave alone."""

import math

import pytest
import torch

from builders import tiny_config, tiny_model, tiny_processor
from builders.reload import CHANGES
from builders.training import conversations, training_arguments
from hires_lmm import PRESETS, HiResLmmForConditionalGeneration
from hires_lmm.training import HiResLmmCollator, get_plan
from hires_lmm.training.plans_published import SYSTEMS


NUMBERS = {  # rate, batch, ZeRO, views, budget of each stage, as the scripts of the authors have them
    "mqt": [(1e-3, 256, 2, "global", 256), (2e-5, 128, 3, "global", [2 * n for n in range(1, 129)])],
    "llava_uhd": [(1e-3, 256, 2, "global", None), (2e-5, 128, 2, "all", None)],
    "inf_llava": [(1e-3, 256, 2, "all", None), (2e-5, 128, 3, "all", None)],
    "hires_llava": [(1e-3, 256, 2, "all", None), (2e-5, 128, 3, "all", None)],
    "llava_mini": [(1e-3, 256, 2, "all", None), (2e-5, 128, 3, "all", None)],
    "mg_llava": [(1e-3, 256, 2, "global", None), (2e-5, 128, 3, "global", None)],
}
NEW = {"hires_llava": "connector.layer_ops.0", "mg_llava": "connector.tower_adapters.objects"}


def parts(system: str):
    config = tiny_config(system, **CHANGES.get(system, {}))
    return tiny_model(config).train(), tiny_processor(config, "chatml")


def batch_of(stage, processor):
    rows = conversations(2)
    if processor.image_processor.token_layout["grids"].get("objects"):
        rows = [{**row, "image_boxes": [[[0, 0, 30, 40]]]} for row in rows]
    return HiResLmmCollator(processor, views=stage.views, max_image_tokens=stage.max_image_tokens)(rows)


@pytest.mark.parametrize("system", NUMBERS)
def test_stages_have_the_published_numbers(system):
    assert set(NUMBERS) == set(SYSTEMS) <= set(PRESETS)
    stages = get_plan(system)
    assert [stage.name for stage in stages] == [f"{system}/I", f"{system}/II"]
    for stage, (rate, batch, zero, views, budget) in zip(stages, NUMBERS[system], strict=True):
        assert set(stage.trainable.values()) == {rate}
        assert (stage.batch_size, stage.zero_stage, stage.views, stage.max_image_tokens) == (
            batch,
            zero,
            views,
            budget,
        )
    first = "connector.adapter" if system == "llava_mini" else "connector"
    assert [set(stage.trainable) for stage in stages] == [{first}, {"connector", "language_model", "lm_head"}]
    with_tower = get_plan(system, "released", tower_rate=1e-6)
    assert with_tower[1].trainable["vision_tower"] == 1e-6 and "vision_tower" not in with_tower[0].trainable
    with pytest.raises(ValueError, match="Unknown column 'vicuna_7b' of the plan"):
        get_plan(system, "vicuna_7b")


@pytest.mark.parametrize("system", NUMBERS)
def test_a_step_of_each_stage_moves_what_it_names_and_no_bit_of_the_rest(system, tmp_path):
    model, processor = parts(system)
    for stage in get_plan(system):
        stage.apply(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = stage.optimizer(model, training_arguments(tmp_path))
        loss = model(**batch_of(stage, processor)).loss
        loss.backward()
        assert math.isfinite(loss.item())
        optimizer.step()
        moved = {
            name.removeprefix("model.")
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        model.zero_grad()
        assert all(name.startswith(tuple(stage.trainable)) for name in moved)
        for pattern in (*stage.trainable, *([NEW[system]] if system in NEW else [])):
            assert any(name.startswith(pattern) for name in moved), (stage.name, pattern)


def test_what_stage_one_of_llava_mini_learned_goes_into_the_model_of_stage_two(tmp_path):
    plain = tiny_model(
        tiny_config(
            "llava_mini", connector_config={"view_ops": [], "token_ops": [], "layout": {"order": ["crops", "global"]}}
        )
    )
    processor = tiny_processor(plain.config, "chatml")
    first, second = get_plan("llava_mini")
    first.apply(plain.train())
    plain(**batch_of(first, processor)).loss.backward()
    with torch.no_grad():
        for parameter in plain.model.connector.adapter.parameters():
            assert parameter.grad.any()
            parameter -= parameter.grad
    plain.save_pretrained(tmp_path)
    config, options = tiny_config("llava_mini"), {"output_loading_info": True}
    model, report = HiResLmmForConditionalGeneration.from_pretrained(tmp_path, config=config, **options)
    assert all("view_ops" in name or "token_ops" in name for name in report["missing_keys"])
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    second.apply(model.train())
    assert any("token_ops" in name and p.requires_grad for name, p in model.named_parameters())
