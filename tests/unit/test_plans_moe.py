"""The plan `moe_llava`: its numbers, and what each stage moves in the dense and in the upcycled model."""

import pytest
import torch

from builders.tiny import tiny_config, tiny_model, tiny_processor
from builders.training import conversations, training_arguments
from families.language import family_config, family_model
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.conversion import upcycle
from hires_lmm.training import HiResLmmCollator, get_plan


def test_the_stages_have_the_published_numbers():
    stages = get_plan("moe_llava")
    assert [stage.name for stage in stages] == [f"moe_llava/{number}" for number in ("I", "II", "III")]
    found = [(set(stage.trainable.values()), stage.batch_size, stage.zero_stage) for stage in stages]
    assert found == [({1e-3}, 256, 2), ({2e-5}, 128, 2), ({2e-5}, 128, 2)]
    with pytest.raises(ValueError, match="Unknown column 'vicuna_7b' of the plan 'moe_llava'"):
        get_plan("moe_llava", "vicuna_7b")


def moved(model, processor, stage, folder, steps: int) -> dict[str, torch.Tensor]:
    """What some steps of a stage change."""
    stage.apply(model.train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = stage.optimizer(model, training_arguments(folder))
    batch = HiResLmmCollator(processor)(conversations(2))
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    return {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_three_steps_of_the_third_stage_change_experts_and_gates_alone(family, tmp_path):
    config = tiny_config("llava_next", text=family_config(family))
    model, processor = tiny_model(config), tiny_processor(config, "chatml")
    first, second, third = get_plan("moe_llava")
    assert all(".connector." in name for name in moved(model, processor, first, tmp_path, 2))
    assert not any("vision_tower" in name for name in moved(model, processor, second, tmp_path, 2))
    with pytest.raises(ValueError, match=r"language_model\.\*\.mlp\.experts"):
        third.apply(model)  # the dense model has none
    model.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    every = 2 if family == "qwen2" else 1
    upcycle(tmp_path / "dense", tmp_path / "out", every=every)
    sparse = HiResLmmForConditionalGeneration.from_pretrained(tmp_path / "out")
    changed = moved(sparse, processor, third, tmp_path, 3)
    layers = range(0, 2, every)
    weights = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    assert set(changed) == {f"model.language_model.layers.{n}.mlp.{name}" for n in layers for name in weights}
    for name, change in changed.items():  # every row of the gates, and the experts that any token has passed
        moves = change.flatten(1).any(dim=1)
        assert moves.all() if name.endswith("gate.weight") else moves.sum() > 1, name
    down = sparse.model.language_model.layers[0].mlp.experts.down_proj
    assert len({each.sum().item() for each in down}) > 1  # copies no longer


def test_the_loss_that_balances_reaches_the_gates():
    model, _ = family_model("qwen2_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    batch = HiResLmmCollator(tiny_processor(model.config, "chatml"))(conversations(2))
    model.train()(**batch).aux_loss.backward()
    gates = [part.grad for name, part in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates and all(grad.any() for grad in gates)
