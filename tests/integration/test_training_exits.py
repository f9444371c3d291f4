"""Layer ops that learn when visual tokens leave, in real runs of the stock Trainer."""

import pytest
import torch

from builders.tiny import tiny_config, tiny_model, tiny_processor
from builders.training import conversations, losses, make_trainer
from hires_lmm.training import Stage, get_plan
from training_run import text


def parts(spec: dict):
    """A tiny LLaVA-NeXT in training mode with one layer op, and its processor."""
    config = tiny_config("llava_next", connector_config={"layer_ops": [spec]})
    return tiny_model(config).train(), tiny_processor(config, "chatml")


def trained(model, before: dict) -> set[str]:
    """Parameters that are not what they were."""
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_of_dyvte_trains_gates_and_nothing_else(tmp_path, checkpointing):
    """Also with a text without image; the gate learns what it is told."""
    model, processor = parts({"part": "dyvte", "middle": 8})
    (stage,) = get_plan("dyvte")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(model, f"{kind}_checkpointing_enable")()
    data = [*conversations(3), text(3)]
    stage = Stage(**{**vars(stage), "trainable": {"connector.layer_ops": 1e-2}})
    trainer = make_trainer(model, processor, stage, data, tmp_path, per_device_train_batch_size=4, max_steps=12)
    trainer.train()
    changed = trained(model, before)
    assert changed and all("connector.layer_ops" in name for name in changed)
    logged = losses(trainer)
    assert logged[-1] < logged[0]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss/exit_gate"])


def test_an_exit_gate_without_exits_is_refused_by_name(tmp_path):
    model, processor = parts({"part": "keep_after"})
    stage = Stage("x", {"connector": 1e-3}, loss_weights={"exit_gate": 1.0})
    with pytest.raises(ValueError, match="no layer op 'dyvte'"):
        make_trainer(model, processor, stage, conversations(2), tmp_path)
