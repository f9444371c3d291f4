"""The stock Trainer under a stage: what moves, what runs, what is logged, what is refused."""

import dataclasses
from collections import Counter

import pytest
import torch
from rich.console import Console
from transformers import DefaultFlowCallback, TrainerCallback

from builders.training import conversation, conversations, losses, make_trainer, slime_parts, training_arguments
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback, cache_vision_features, get_plan, put_first
from hires_lmm.training.callbacks import render_table
from hires_lmm.training.plans import FORCED_EXPERT
from training_run import text


QUIET = Stage(
    "quiet",
    {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3},
    settings={FORCED_EXPERT: "mlp"},
)


def test_the_whole_plan_runs_and_moves_what_each_stage_names(tmp_path):
    model, processor = slime_parts()
    for number, stage in enumerate(get_plan("slime")):
        stage = dataclasses.replace(stage, trainable=dict.fromkeys(stage.trainable, 1e-3))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        make_trainer(model, processor, stage, conversations(4), tmp_path / str(number)).train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        named = {name for name in before if stage.pattern_of(name) is not None}
        assert moved <= named, stage.name
        still = named - moved
        assert all("embed_tokens" in name or "noise" in name or "k_proj.bias" in name for name in still), still
    assert model.config.connector_config.adapter["forced_expert"] is None
    assert model.config.training_stage == "slime/III"


def test_accumulation_equals_a_large_batch(tmp_path):
    runs = []
    for size, accumulation in ((8, 1), (1, 8)):
        model, processor = slime_parts()
        data = [conversation(n) if n % 3 else text(n) for n in range(24)]
        trainer = make_trainer(
            model,
            processor,
            QUIET,
            data,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # Adam blows up gradients that are zero but for rounding, such as those of key biases
        )
        trainer.train()
        runs.append((losses(trainer), {name: p.detach() for name, p in trainer.model.named_parameters()}))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, parameter in runs[0][1].items():
        torch.testing.assert_close(parameter, runs[1][1][name], atol=2e-5, rtol=1e-4, msg=name)


def test_auxiliary_losses_do_not_depend_on_accumulation(tmp_path):
    found = []
    stage = Stage(
        "aux",
        {"connector": 1e-3},
        settings={FORCED_EXPERT: None},
        loss_weights={"gate_balance": 100.0},
    )
    for size, accumulation in ((4, 1), (1, 4)):
        model, processor = slime_parts()
        gate = model.model.connector.adapter.gate
        gate.forward = lambda features: torch.full((*features.shape[:2], 2), 0.5) * torch.tensor([1.6, 0.4])
        trainer = make_trainer(
            model,
            processor,
            stage,
            conversations(4),
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 36  # 100 times 0.36, and the language loss


@pytest.mark.parametrize("views", ["global", "crops"])
@pytest.mark.parametrize("cached", [False, True])
def test_modules_that_a_stage_leaves_out_run_in_no_batch(tmp_path, views, cached):
    stage = get_plan("slime")[1 if views == "global" else 2]
    model, processor = slime_parts()
    examples = [conversation(1), text(1)]
    store = cache_vision_features(model, processor, examples[0]["images"], tmp_path / "f") if cached else None
    calls, rows = Counter(), []
    connector = model.model.connector
    watched = {"compressor": connector.view_ops[0].query_former.attention, "former": connector.adapter.query_former}
    for name, module in {**watched, "gate": connector.adapter.gate, "mlp": connector.adapter.mlp}.items():
        module.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    counts = []
    for example in examples:
        data = [example] * 4
        collator = HiResLmmCollator(processor, views=views, features=store)
        calls.clear()
        make_trainer(model, processor, stage, data, tmp_path, collator=collator, max_steps=1).train()
        counts.append(set(calls))
    used = {"former", "mlp"} if views == "global" else {"compressor", "mlp"}
    assert counts == [used, used]
    crops = 2 * (len(HiResLmmCollator(processor)([examples[0]])["pixel_values"]) - 1)
    assert rows == ([] if cached else [2 if views == "global" else crops, 1])


@pytest.mark.parametrize(
    "stage, kept",
    [
        (QUIET, False),
        (Stage("tower", {"vision_tower": 1e-3}, settings={FORCED_EXPERT: "mlp"}), True),
    ],
)
def test_a_frozen_tower_keeps_no_activations(stage, kept):
    model, processor = slime_parts()
    stage.apply(model)
    batch, saved, inside = HiResLmmCollator(processor)([conversation(1)]), [], []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: inside.append(True))
    tower.register_forward_hook(lambda module, args, output: inside.clear())

    def pack(tensor):
        saved.append(bool(inside))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss.backward()
    assert saved and any(saved) == kept


def test_activation_checkpointing_changes_no_loss(tmp_path):
    found = []
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    for extra in ({}, options):
        model, processor = slime_parts()
        trainer = make_trainer(model, processor, get_plan("slime")[2], conversations(4), tmp_path, **extra)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bf16_stays_close_to_float32(tmp_path):
    found = []
    for bf16 in (False, True):
        model, processor = slime_parts()
        trainer = make_trainer(model, processor, QUIET, conversations(4), tmp_path, bf16=bf16)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.05)


class Seen(TrainerCallback):
    """Keeps what later callbacks are given to log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_numbers_reach_the_history_and_later_callbacks(tmp_path):
    model, processor = slime_parts()
    seen, stage = Seen(), get_plan("slime")[3]
    stage = dataclasses.replace(stage, trainable={**stage.trainable, "lm_head": 1e-4})
    trainer = make_trainer(model, processor, stage, conversations(4), tmp_path, callbacks=[seen])
    put_first(trainer)
    first = [type(callback) for callback in trainer.callback_handler.callbacks[:2]]
    assert first == [DefaultFlowCallback, StageCallback], "what decides when to log comes before what adds numbers"
    trainer.train()
    for entry in (trainer.state.log_history[0], seen.logs[0]):
        assert 0 < entry["kept_share"] < 1 and 0 < entry["gate_mlp_share"] < 1
        assert entry["stage"] == "slime/III" and entry["dropped_samples"] == 0
        assert entry["learning_rate/connector"] == entry["learning_rate"] == 2e-5
        assert entry["learning_rate/lm_head"] == 1e-4


def test_the_table_names_parts_numbers_and_rates():
    model, _ = slime_parts()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_table(model, get_plan("slime")[1]))
    page = console.export_text()
    total = sum(p.numel() for p in model.parameters())
    for words in ("slime/I-b", "connector.adapter.query_former", "4,928", "0.001", "frozen", f"{total:,}"):
        assert words in page


def test_arguments_that_train_something_else_are_refused(tmp_path):
    model, processor = slime_parts()
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_trainer(model, processor, QUIET, conversations(2), tmp_path, remove_unused_columns=True)
    stage = dataclasses.replace(QUIET, loss_weights={"gate_balance": 0.1}, settings={FORCED_EXPERT: None})
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 is refused"):
        make_trainer(model, processor, stage, conversations(2), tmp_path, label_smoothing_factor=0.1)


def test_an_optimizer_and_a_collator_of_another_stage_are_refused(tmp_path):
    model, processor = slime_parts()
    stage, other = get_plan("slime")[0], get_plan("slime")[2]
    args = training_arguments(tmp_path)
    wrong = {"optimizers": (other.optimizer(model, args), None)}
    trainer = make_trainer(model, processor, stage, conversations(2), tmp_path, trainer_kwargs=wrong)
    with pytest.raises(ValueError, match=r"The optimizer lacks connector\.adapter\.mlp"):
        trainer.train()
    trainer = make_trainer(model, processor, stage, conversations(2), tmp_path, trainer_kwargs={}, learning_rate=5e-5)
    with pytest.raises(ValueError, match=r"learning rate 5e-05, but stage 'slime/I-a'"):
        trainer.train()
    trainer = make_trainer(
        model, processor, stage, conversations(2), tmp_path, collator=HiResLmmCollator(processor, views="crops")
    )
    with pytest.raises(ValueError, match="uses views='global', but the collator makes views='crops'"):
        trainer.train()


def test_evaluation_and_callback_restoring_work(tmp_path):
    model, processor = slime_parts()
    changes = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "restore_callback_states_from_checkpoint": True,
    }
    trainer = make_trainer(model, processor, QUIET, conversations(4), tmp_path, **changes)
    trainer.train()
    numbers = trainer.evaluate(conversations(2))
    assert numbers["eval_loss"] > 0
    again = make_trainer(model, processor, QUIET, conversations(4), tmp_path, **{**changes, "max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.log_history[-2]["stage"] == "quiet"
