"""Killed runs go on exactly; a checkpoint of one stage is no checkpoint of another."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import training_run
from builders.training import conversations, losses, make_trainer, slime_parts, training_arguments
from hires_lmm.training import Alternation, Stage, alternating_scheduler, get_plan
from hires_lmm.training.plans import FORCED_EXPERT


SCRIPT = Path(__file__).parents[1] / "training_run.py"
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.01}
STAGE = Stage(
    "mine",
    {"connector": 1e-3, "language_model": 1e-4, "lm_head": 1e-4},
    settings={FORCED_EXPERT: None},
)


def launch(settings: dict) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), json.dumps(settings)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_killed_run_goes_on_exactly(tmp_path):
    settings = {"stage": STAGE.to_dict(), "arguments": RUN, "data": "mixed"}
    training_run.main({**settings, "folder": str(tmp_path / "whole")})
    folder = tmp_path / "killed"
    killed = launch({**settings, "folder": str(folder), "kill_at": 5})
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    training_run.main({**settings, "folder": str(folder), "resume": True})
    expected = json.loads((tmp_path / "whole" / "result-0.json").read_text())
    found = json.loads((folder / "result-0.json").read_text())
    assert len(expected["losses"]) == 6 and len(set(expected["losses"])) == 6
    assert found == expected


class Watch(TrainerCallback):
    """Notes which parts of a module each optimizer step moved."""

    def __init__(self, module):
        self.parameters, self.moved = dict(module.named_parameters()), []

    def on_step_begin(self, *args, **kwargs):
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}

    def on_step_end(self, *args, **kwargs):
        changed = [name for name, p in self.parameters.items() if not torch.equal(p, self.before[name])]
        self.moved.append({name.split(".")[0] for name in changed})


def test_an_alternating_run_goes_on_in_its_turn(tmp_path):
    stage = Stage(
        "turns",
        {"connector.adapter": 1e-2, "connector.view_ops": 1e-2},
        settings={FORCED_EXPERT: None},
        alternation=Alternation([["connector.adapter"], ["connector.view_ops"]], steps=1),
    )

    def trainer(folder):
        model, processor = slime_parts()

        changes = {**RUN, "weight_decay": 0.0}
        optimizer = stage.optimizer(model, training_arguments(folder, **changes))
        extra = {"optimizers": (optimizer, alternating_scheduler(stage, optimizer, 6))}
        torch.manual_seed(0)
        return make_trainer(model, processor, stage, conversations(8), folder, trainer_kwargs=extra, **changes)

    whole = trainer(tmp_path / "a")
    watch = Watch(whole.model.model.connector)
    whole.add_callback(watch)
    whole.train()
    assert watch.moved == [{"adapter"}, {"view_ops"}] * 3
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    for (name, first), (_, second) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    model, processor = slime_parts()
    stage = get_plan("slime")[0]
    make_trainer(model, processor, stage, conversations(4), folder, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def test_the_checkpoint_names_its_stage(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["StageCallback"]["attributes"]["stage_name"] == "slime/I-a"
    assert json.loads((checkpoint / "config.json").read_text())["training_stage"] == "slime/I-a"


def test_another_stage_is_refused(checkpoint, tmp_path):
    model, processor = slime_parts()
    trainer = make_trainer(model, processor, get_plan("slime")[1], conversations(4), tmp_path)
    with pytest.raises(
        ValueError, match=r"written in stage 'slime/I-a', but stage 'slime/I-b' is running.*from_pretrained"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_another_stage_is_refused_under_the_stock_optimizer_too(tmp_path):
    stage, stock = get_plan("slime")[0], {"trainer_kwargs": {}, "learning_rate": 1e-3}
    model, processor = slime_parts()
    first = make_trainer(
        model, processor, stage, conversations(4), tmp_path, save_strategy="steps", save_steps=2, **stock
    )
    first.train()
    other = make_trainer(model, processor, replace(stage, name="another"), conversations(4), tmp_path, **stock)
    with pytest.raises(ValueError, match="written in stage 'slime/I-a', but stage 'another'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_same_stage_goes_on(checkpoint, tmp_path):
    model, processor = slime_parts()
    trainer = make_trainer(model, processor, get_plan("slime")[0], conversations(4), tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
