"""Layer ops that learn when visual tokens leave, in real runs of the stock Trainer."""

import pytest
import torch
from transformers import Trainer

from builders.tiny import tiny_config, tiny_model, tiny_processor
from builders.training import conversations, losses, make_trainer, training_arguments
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback, get_plan
from hires_lmm.training.objectives import TokenBudget
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_token_budget_lowers_what_atp_keeps(tmp_path, checkpointing):
    """The terms are those of the masks, and a text without image does not count."""
    model, processor = parts({"part": "atp", "layers": [0, 1], "temperature": 2.0})
    if checkpointing:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")()
    stage = Stage("x", {"connector.layer_ops": 1e-1}, loss_weights={"generation": 0.0, "token_budget": 1.0})
    data, kept = [*conversations(3), text(3)], []
    objective = TokenBudget(target=5.0, share_weight=0.5, target_weight=0.1)
    callback = StageCallback(stage, show_table=False, objectives={"token_budget": objective})
    args = training_arguments(tmp_path, per_device_train_batch_size=4, max_steps=10)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        data_collator=HiResLmmCollator(processor),
        callbacks=[callback],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
    handle = model.register_forward_hook(lambda module, args, output: kept.append(output.aux))
    trainer.train()
    handle.remove()
    counts = torch.stack([kept[0][f"token_budget/{layer}"] for layer in (0, 1)])
    rows = counts[0, :, 1] > 0
    shares = (counts[:, rows, 0] / counts[:, rows, 1]).mean(dim=1)
    wanted = 0.5 * (shares[0] + 2 * shares[1]) + 0.1 * abs(counts[:, rows, 0].mean() - 5)
    assert rows.sum() == 3 and losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-4)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def test_checkpointing_gives_thresholds_their_gradients_or_is_refused_by_name():
    """Soft masks come out of hooks behind layers that run twice: where it is reentrant, first without graph."""
    model, processor = parts({"part": "atp", "layers": [0], "temperature": 2.0})
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable, found = getattr(model, f"{kind}_checkpointing_enable"), []
    batch = HiResLmmCollator(processor)(conversations(2))
    for checkpointing in (False, True):
        if checkpointing:
            enable({"use_reentrant": False})
        model.zero_grad()
        output = model(**batch)
        (output.loss + 1e-2 * output.aux["token_budget/0"][:, 0].sum()).backward()
        found.append([part.grad.clone() for part in model.model.connector.layer_ops.parameters()])
    assert max(grad.abs().max() for grad in found[0]) > 1e-4
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**batch)
    model.model.connector.layer_ops.requires_grad_(False)
    model(**batch).loss.backward()


def test_a_token_budget_without_atp_is_refused_by_name(tmp_path):
    model, processor = parts({"part": "keep_after"})
    stage = Stage("x", {"connector": 1e-3}, loss_weights={"token_budget": 1.0})
    with pytest.raises(ValueError, match="no layer op 'atp'"):
        make_trainer(model, processor, stage, conversations(2), tmp_path)
