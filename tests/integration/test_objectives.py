"""Objectives in real runs of the stock Trainer: what is added, logged, trained, saved, resumed and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText, TrainerCallback

from builders.objectives import WIDTH, objective_trainer, reconstruction, vlsa_parts
from builders.training import conversation, conversations, losses, slime_parts
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback
from hires_lmm.training.objectives import OBJECTIVES, Objective, load_objectives
from training_run import text


EPIGONE = "objectives.reconstruction.epigone"
STAGE = Stage(
    "vlsa",
    {"connector": 1e-2, EPIGONE: 1e-2, "objectives.reconstruction.denoiser": 1e-3},
    loss_weights={"reconstruction": 2.0},
)


class Energy(Objective):
    """Half the squared length of the visual tokens times a learned number: one loss an image, nothing random."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, step):
        tokens = step.aux["global_tokens"]
        return step.per_row(self.factor * tokens.float().square().sum(dim=(1, 2)) / 2)


@pytest.fixture
def energy(monkeypatch):
    """A new objective under the name `energy`."""
    monkeypatch.setitem(OBJECTIVES, "energy", Energy)
    return Energy()


class SeedEveryStep(TrainerCallback):
    """Random numbers that depend on the step alone."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)


class WatchGradients(TrainerCallback):
    """Notes parameters that learn but got no gradient, which DDP would wait for."""

    def __init__(self):
        self.missing = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_loss_is_the_sum_of_its_parts(tmp_path):
    model, processor = vlsa_parts()
    objective = reconstruction(model)
    data = [conversation(0), conversation(1, images=2), text(2)]
    changes = {"max_steps": 1, "per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"}
    batch = HiResLmmCollator(processor, columns=objective.columns())(data)
    images, labels = batch.pop("source_images"), batch["labels"]
    views = []
    handle = model.model.connector.layout.register_forward_pre_hook(lambda module, args: views.append(args[0]))
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    handle.remove()
    tokens = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    generation = tokens.sum() / (labels[:, 1:] != -100).sum()
    torch.manual_seed(100)
    with torch.no_grad():
        each = objective.image_losses(views[0].group("global").features, views[0].aux["global_embedding"], images)
    share = (labels[:, 1:] != -100).sum(dim=1) / (labels[:, 1:] != -100).sum()
    painted = share[0] * each[0] + share[1] * (each[1] + each[2]) / 2
    trainer = objective_trainer(
        model, processor, STAGE, {"reconstruction": objective}, data, tmp_path, [SeedEveryStep()], **changes
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/generation"] == pytest.approx(generation.item(), rel=1e-5)
    assert log["loss/reconstruction"] == pytest.approx(painted.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((generation + 2.0 * painted).item(), rel=1e-4)
    assert painted > 0.1


def test_row_losses_do_not_depend_on_accumulation(tmp_path, energy):
    stage = Stage("e", {"connector": 1e-3, "objectives.energy": 1e-3}, loss_weights={"energy": 0.1})
    data, runs = [conversation(n) if n % 3 else text(n) for n in range(8)], []
    for size, accumulation in ((4, 1), (1, 4)):
        model, processor = vlsa_parts()
        trainer = objective_trainer(
            model,
            processor,
            stage,
            {"energy": Energy()},
            data,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            train_sampling_strategy="sequential",
        )
        trainer.train()
        runs.append((trainer.state.log_history[:2], dict(trainer.model.named_parameters())))
    for one, two in zip(runs[0][0], runs[1][0], strict=True):
        for name in ("loss", "loss/energy", "loss/generation"):
            assert one[name] == pytest.approx(two[name], rel=1e-5), name
        assert one["loss"] == pytest.approx(one["loss/generation"] + 0.1 * one["loss/energy"], rel=1e-5)
    assert runs[0][1]["objectives.energy.factor"] != 0.7
    for name, parameter in runs[0][1].items():
        torch.testing.assert_close(parameter, runs[1][1][name], atol=2e-5, rtol=1e-4, msg=name)


def test_a_weight_of_zero_switches_the_language_loss_off(tmp_path, energy):
    rates = {"language_model": 1e-2, "connector": 1e-2}
    stage = Stage("warm", rates, loss_weights={"energy": 1.0, "generation": 0.0})
    model, processor = vlsa_parts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = objective_trainer(model, processor, stage, {"energy": energy}, conversations(4), tmp_path, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["loss/energy"], rel=1e-6) and log["loss/generation"] > 1
    moved = {
        name.split(".")[1] for name, p in model.named_parameters() if name in before and (p != before[name]).any()
    }
    assert moved == {"connector"}


def test_reconstruction_reaches_the_global_query_and_text_batches_change_nothing(tmp_path):
    weights = {"reconstruction": 1.0, "generation": 0.0}
    stage = Stage("query", {"connector.view_ops": 1e-2, "objectives.reconstruction.[ed]*": 1e-2}, loss_weights=weights)
    for data, moves in ((conversations(4), True), ([text(n) for n in range(4)], False)):
        model, processor = vlsa_parts()
        objective = reconstruction(model)
        watched = [model.model.connector.view_ops[0].global_query, objective.epigone.pooled.linear_2.weight]
        before = [p.detach().clone() for p in watched]
        run = {"max_steps": 1, "weight_decay": 0.0}
        callback = WatchGradients()
        trainer = objective_trainer(
            model, processor, stage, {"reconstruction": objective}, data, tmp_path / str(moves), [callback], **run
        )
        trainer.train()
        assert [bool((p != b).any()) for p, b in zip(watched, before, strict=True)] == [moves, moves]
        assert callback.missing == []
        assert (trainer.state.log_history[0]["loss/reconstruction"] > 0) is moves


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.01}

    def trainer(seed, folder):
        model, processor = vlsa_parts()
        objective = reconstruction(model, seed)  # what a resumed run builds is overwritten by the checkpoint
        data = [conversation(n) if n % 3 else text(n) for n in range(8)]
        torch.manual_seed(0)
        return objective_trainer(model, processor, STAGE, {"reconstruction": objective}, data, folder, **run)

    whole = trainer(0, tmp_path / "run")
    whole.train()
    again = trainer(5, tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again) == losses(whole) and len(set(losses(whole))) == 4
    expected = whole.model.state_dict()
    assert sum(name.startswith("objectives.") for name in expected) > 50
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    final = load_objectives(tmp_path / "run" / "objectives")["reconstruction"]
    for name, tensor in final.state_dict().items():
        assert torch.equal(tensor, expected[f"objectives.reconstruction.{name}"]), name
    elsewhere = trainer(5, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is not in .*elsewhere/checkpoint-2.*resume_from_checkpoint"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    elsewhere.args.resume_from_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(elsewhere) == losses(whole)


BLOCKED = """
import sys
sys.modules["diffusers"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__.split(".")[0], hasattr(model, "objectives"))
"""


def test_the_saved_checkpoint_knows_nothing_of_the_objective(tmp_path):
    model, processor = vlsa_parts()
    names = set(model.state_dict())
    objectives = {"reconstruction": reconstruction(model)}
    run = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = objective_trainer(model, processor, STAGE, objectives, conversations(4), tmp_path / "run", **run)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            assert set(weights.keys()) == names
        for file in [*folder.glob("*.json"), *folder.glob("*.py")]:
            if file.name != "trainer_state.json":
                assert "diffusers" not in file.read_text() and "epigone" not in file.read_text().lower(), file
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert torch.equal(
        plain.model.connector.view_ops[0].global_query, trainer.model.model.connector.view_ops[0].global_query
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path / "final")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.split() == ["transformers_modules", "False"], done.stderr[-2000:]


def test_the_next_stage_takes_objectives_from_a_folder_and_an_old_one_leaves_the_model(tmp_path):
    model, processor = vlsa_parts()
    objectives = {"reconstruction": reconstruction(model)}
    first = objective_trainer(model, processor, STAGE, objectives, conversations(2), tmp_path / "1", max_steps=1)
    first.train()
    carried = load_objectives(tmp_path / "1" / "objectives")
    stage = Stage("next", {EPIGONE: 1e-2}, loss_weights={"reconstruction": 1.0})
    objective_trainer(model, processor, stage, carried, conversations(2), tmp_path / "2", max_steps=1).train()
    assert model.objectives["reconstruction"] is carried["reconstruction"]
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learned and all(name.startswith(EPIGONE) for name in learned)
    plain = Stage("plain", {"connector": 1e-3})
    trainer = objective_trainer(model, processor, plain, {}, conversations(2), tmp_path / "3", max_steps=1)
    trainer.train()
    assert not hasattr(model, "objectives") and not model._keys_to_ignore_on_save
    assert not (tmp_path / "3" / "objectives").exists()
    assert "loss/reconstruction" not in trainer.state.log_history[0]


def test_evaluation_takes_the_columns_away_and_computes_no_objective(tmp_path):
    model, processor = vlsa_parts()
    objective = reconstruction(model)
    calls = []
    objective.register_forward_hook(lambda *args: calls.append(1))
    run = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True}
    trainer = objective_trainer(
        model,
        processor,
        STAGE,
        {"reconstruction": objective},
        conversations(2),
        tmp_path,
        eval_dataset=conversations(2),
        **run,
    )
    trainer.train()
    assert len(calls) == 1 and trainer.state.log_history[1]["eval_loss"] > 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.log_history[1]["eval_loss"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_objectives_train_beside_lora_and_stay_out_of_its_folder(tmp_path):
    from peft import get_peft_model

    from hires_lmm.training.lora import lora_config

    model, processor = vlsa_parts()
    objective = reconstruction(model)
    model = get_peft_model(model, lora_config(model, "language_only", r=2, alpha=4))
    stage = Stage(
        "lora", {"language_model": 1e-2, "connector": 1e-2, EPIGONE: 1e-2}, loss_weights={"reconstruction": 1.0}
    )
    before = objective.epigone.prompt.linear_1.weight.detach().clone()
    trainer = objective_trainer(
        model, processor, stage, {"reconstruction": objective}, conversations(2), tmp_path / "out", max_steps=1
    )
    trainer.train()
    assert (objective.epigone.prompt.linear_1.weight != before).any()
    trainer.save_model(str(tmp_path / "lora"))
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as weights:
        assert not [name for name in weights.keys() if "objectives" in name]  # noqa: SIM118


def test_the_table_shows_the_parts_of_objectives(tmp_path, capsys):
    model, processor = vlsa_parts()
    trainer = objective_trainer(
        model, processor, STAGE, {"reconstruction": reconstruction(model)}, conversations(2), tmp_path, max_steps=1
    )
    next(c for c in trainer.callback_handler.callbacks if isinstance(c, StageCallback)).show_table = True
    trainer.train()
    shown = " ".join(capsys.readouterr().err.split())
    assert "objectives.reconstruction.epigone" in shown and "objectives.reconstruction.vae" in shown


REFUSED = {
    "no objective": (Stage("x", {"connector": 1e-3}, loss_weights={"reconstruction": 1.0}), [], "pass StageCallback"),
    "no weight": (Stage("x", {"connector": 1e-3}), ["reconstruction"], "does not weigh"),
    "the autoencoder learns": (
        Stage("x", {"objectives.reconstruction": 1e-3}, loss_weights={"reconstruction": 1.0}),
        ["reconstruction"],
        "reconstruction.vae, which must stay frozen",
    ),
    "crops": (
        Stage("x", {EPIGONE: 1e-3}, views="crops", loss_weights={"reconstruction": 1.0}),
        ["reconstruction"],
        "views='crops'",
    ),
    "no gate": (
        Stage("x", {"connector": 1e-3}, loss_weights={"gate_balance": 1.0}),
        [],
        "no gate runs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_contradict_themselves_are_refused(tmp_path, case):
    stage, given, message = REFUSED[case]
    model, processor = vlsa_parts()
    with pytest.raises(ValueError, match=message):
        objective_trainer(
            model, processor, stage, {name: reconstruction(model) for name in given}, conversations(2), tmp_path
        )


def test_an_objective_of_another_model_and_a_missing_column_are_refused(tmp_path):
    model, processor = vlsa_parts()
    other = reconstruction(slime_parts()[0])
    other.epigone.global_width = WIDTH + 1
    with pytest.raises(ValueError, match="global embedding of width 33"):
        objective_trainer(model, processor, STAGE, {"reconstruction": other}, conversations(2), tmp_path)
    objectives = {"reconstruction": reconstruction(model)}
    trainer = objective_trainer(model, processor, STAGE, objectives, conversations(2), tmp_path)
    trainer.data_collator.columns = []
    with pytest.raises(ValueError, match="column 'source_images'"):
        trainer.train()
    trainer.data_collator = lambda rows: HiResLmmCollator(processor)(rows)  # unknown to the callback
    with pytest.raises(ValueError, match="no source_images for 2 images"):
        trainer.train()


def test_the_command_paints_an_image(tmp_path, capsys):
    from PIL import Image
    from typer.testing import CliRunner

    from builders import random_image
    from hires_lmm.cli import app

    model, processor = vlsa_parts()
    objectives = {"reconstruction": reconstruction(model)}
    trainer = objective_trainer(model, processor, STAGE, objectives, conversations(2), tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "run" / "final"))
    random_image(60, 90, 1).save(tmp_path / "a.png")
    random_image(60, 90, 2).save(tmp_path / "b.png")

    def paint(image, *options):
        out = tmp_path / "out.png"
        words = ["reconstruct", str(tmp_path / "run" / "final"), str(tmp_path / image), "--out", str(out)]
        result = CliRunner().invoke(app, [*words, "--steps", "3", "--device", "cpu", *options])
        assert result.exit_code == 0, result.output
        return torch.tensor(list(Image.open(out).tobytes()))

    first = paint("a.png")
    assert len(first) == 16 * 16 * 3
    assert torch.equal(first, paint("a.png", "--objectives", str(tmp_path / "run" / "objectives")))
    assert not torch.equal(first, paint("b.png")) and not torch.equal(first, paint("a.png", "--seed", "1"))
    (tmp_path / "run" / "objectives").rename(tmp_path / "moved")
    words = ["reconstruct", str(tmp_path / "run" / "final"), str(tmp_path / "a.png"), "--out", "x.png"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "--objectives FOLDER" in " ".join(result.output.split())


def test_the_folder_says_what_it_holds(tmp_path):
    model, processor = vlsa_parts()
    objectives = {"reconstruction": reconstruction(model)}
    objective_trainer(model, processor, STAGE, objectives, conversations(2), tmp_path, max_steps=1).train()
    config = json.loads(Path(tmp_path, "objectives", "reconstruction", "config.json").read_text())
    assert config["objective"] == "reconstruction" and config["settings"]["image_size"] == 16
    config["objective"] = "painting"
    Path(tmp_path, "objectives", "reconstruction", "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown objective 'painting'"):
        load_objectives(tmp_path / "objectives")
