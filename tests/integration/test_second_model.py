"""A second model with a processor of its own in an objective: a distillation written for this test."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from builders.objectives import objective_trainer
from builders.tiny import randomise, tiny_config, tiny_model, tiny_processor
from builders.training import conversations
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.training import HiResLmmCollator, Stage
from hires_lmm.training.objectives import OBJECTIVES, Objective, SecondModel, load_objectives
from training_run import text


RATES = {"connector": 1e-2, "language_model": 1e-3, "objectives.mimic": 1e-2}
WIDTHS = 16


class Mimic(Objective):
    """The student's mean state, projected, resembles the teacher's, which reads the same text by other tokens."""

    needs_images = False
    asks = {"output_hidden_states": True}

    def __init__(self, teacher, width=32):
        super().__init__()
        self.teacher = SecondModel(**teacher)
        self.projection = nn.Linear(width, WIDTHS)

    def columns(self):
        return [self.teacher.column("teacher_inputs")]

    def settings(self):
        return {"teacher": self.teacher.settings()}

    def forward(self, step):
        inputs = step.columns["teacher_inputs"]
        wanted = self.teacher(inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"][..., None]
        wanted = (wanted * mask).sum(dim=1) / mask.sum(dim=1)
        states = self.projection(step.outputs.hidden_states[-1].float().mean(dim=1))
        return (states - wanted.float()).square().mean(dim=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny language model of bytes, its vocabulary and template unlike the student's."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = build_byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTHS, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mimic", Mimic)


def student(seed=0):
    config = tiny_config("llava_next")
    return tiny_model(config, seed).train(), tiny_processor(config, "chatml")


def mimic(teacher, seed=0):
    torch.manual_seed(seed)
    return Mimic({"name": teacher, "dtype": "float32"})


def run(teacher, folder, data, seed=0, **changes):
    model, processor = student()
    changes = {"max_steps": 1, "train_sampling_strategy": "sequential", **changes}
    stage = Stage("mimic", RATES, loss_weights={"mimic": 0.5})
    return objective_trainer(model, processor, stage, {"mimic": mimic(teacher, seed)}, data, folder, **changes)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_the_loss_is_that_of_the_two_models_run_by_hand(teacher, tmp_path, kind):
    data = conversations(2) if kind == "images" else [text(0), text(12345)]
    trainer = run(teacher, tmp_path, data)
    model, objective = trainer.model, mimic(teacher)
    tokenizer, alone = build_byte_tokenizer(), AutoModelForCausalLM.from_pretrained(teacher)
    batch = HiResLmmCollator(trainer.processing_class)(data)
    with torch.no_grad():
        outputs = model.eval()(**batch, output_hidden_states=True)
        states = objective.projection(outputs.hidden_states[-1].mean(dim=1))
        each = []
        for row, example in enumerate(data):
            said = [{"role": m["role"], "content": m["content"].replace("<image>", "")} for m in example["messages"]]
            ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
            wanted = alone(ids, output_hidden_states=True).hidden_states[-1].mean(dim=1)
            each.append((states[row] - wanted[0]).square().mean())
    tokens = (batch["labels"][:, 1:] != -100).sum(dim=1)
    expected = (torch.stack(each) * tokens / tokens.sum()).sum().item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/mimic"] == pytest.approx(expected, rel=1e-4) and expected > 0.1
    assert log["loss"] == pytest.approx(log["loss/generation"] + 0.5 * expected, rel=1e-4)


def test_it_is_neither_trained_nor_saved_and_a_resumed_run_ends_alike(teacher, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    data = [*conversations(4), *(text(n) for n in range(4))]
    whole = run(teacher, tmp_path / "run", data, **options)
    objective = whole.model.objectives["mimic"]
    before = {name: value.clone() for name, value in objective.teacher.model.state_dict().items()}
    whole.train()
    assert not objective.teacher.model.training
    for name, value in objective.teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in objective.teacher.model.parameters()}
    assert set(objective.state_dict()) == {"projection.weight", "projection.bias"}
    folder = tmp_path / "run" / "checkpoint-2"
    assert set(load_file(folder / "objectives" / "mimic" / "model.safetensors")) == set(objective.state_dict())
    assert not [name for name in load_file(folder / "model.safetensors") if "teacher" in name or "objectives" in name]
    again = run(teacher, tmp_path / "run", data, seed=3, **options)
    again.train(resume_from_checkpoint=str(folder))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    loaded = load_objectives(tmp_path / "run" / "objectives")["mimic"]
    assert torch.equal(loaded.projection.weight, objective.projection.weight)
    assert loaded.teacher.settings()["name"] == teacher


def test_it_keeps_its_number_format_under_autocast(teacher, tmp_path):
    objective = mimic(teacher)
    batch = HiResLmmCollator(student()[1], columns=objective.columns())(conversations(2))
    wanted = objective.teacher(batch["teacher_inputs"]).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.teacher(batch["teacher_inputs"]).logits, wanted)
    objective.half()
    assert objective.teacher.model.dtype == torch.float32 and not wanted.requires_grad


def test_a_batch_that_lost_its_samples_has_a_row_for_it(teacher):
    collator = HiResLmmCollator(student()[1], columns=mimic(teacher).columns(), max_length=3, too_long="drop")
    batch = collator(conversations(2))
    assert len(batch["input_ids"]) == len(batch["teacher_inputs"]["input_ids"]) == 1


def test_a_processor_reads_the_images_too():
    """Another model of ours as the second one: its own views, its own placeholders."""
    config = tiny_config("llava_next", planner={"name": "llava_next", "pinpoints": [[56, 112]]})
    processor = tiny_processor(config, "chatml")
    from hires_lmm.training.objectives.second_model import SecondModelColumn

    batch = HiResLmmCollator(student()[1], columns=[SecondModelColumn("second", processor)])(conversations(2))
    assert batch["second"]["pixel_values"].shape[0] == 6  # two images of one global view and two crops
    assert tiny_model(config)(**batch["second"]).logits.isfinite().all()


def test_only_the_selected_messages_are_read(teacher):
    second = SecondModel(teacher)
    column = second.column("answers", lambda messages: messages[-1:])
    batch = HiResLmmCollator(student()[1], columns=[column])([text(0)])
    shown = second.processor.decode(batch["answers"]["input_ids"][0])
    assert "Yes, 0 is a number." in shown and "Is 0 a number?" not in shown
    with pytest.raises(ValueError, match="transformers has no class 'AutoModelForNothing'"):
        SecondModel(teacher, model_class="AutoModelForNothing")
