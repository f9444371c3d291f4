"""TRL's trainers on every preset: DPO's exact start in all ways, five steps of each trainer, and two processes."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

import trl_run
from builders.docs import ROOT
from builders.reload import PRESETS
from builders.trl import (
    ONLINE_PRESETS,
    as_dataset,
    assistant,
    logged,
    preferences,
    prompts,
    saved_parts,
    trl_arguments,
)
from hires_lmm.training.lora import lora_config
from hires_lmm.training.rewards import RewardCollator, right_answer
from launching import TESTS, run_launcher


trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LN2 = math.log(2)
WAYS = ("none", "copy", "lora", "recomputed")
COUNTS = ((1, 1), (2, 3), (0, 1), (0, 0))
LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
LOSSES += ["apo_zero", "apo_down", "discopop", "sft"]


def dpo(folder, preset, way, images, **changes):
    model, processor = saved_parts(preset, folder / "model")
    size = {"per_device_train_batch_size": len(images), "max_length": None}
    trainer = trl.DPOTrainer(
        model,
        copy.deepcopy(model) if way == "copy" else None,
        args=trl_arguments(
            trl.DPOConfig, folder / "out", gradient_checkpointing=way == "recomputed", **size, **changes
        ),
        train_dataset=as_dataset(preferences(list(images))),
        processing_class=processor,
        peft_config=lora_config(model, "language_only") if way == "lora" else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("way, images", [*((way, COUNTS[0]) for way in WAYS), *(("none", own) for own in COUNTS[1:])])
def test_the_first_step_of_dpo_has_the_loss_ln_2(preset, way, images, tmp_path):
    images = tuple(min(count, 1) for count in images) if preset == "fusion" else images
    trainer = dpo(tmp_path, preset, way, images)
    assert logged(trainer)[0] == pytest.approx(LN2, abs=1e-4)
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_dpo_trains(loss, tmp_path):
    changes = {"loss_type": [loss], "max_steps": 2, "label_smoothing": 0.1 if loss in ("robust", "exo_pair") else 0.0}
    found = logged(dpo(tmp_path, "slime", "none", (1, 1), **changes))
    assert len(found) == 2 and all(map(math.isfinite, found)) and found[0] != found[1]


# ---- five steps -----------------------------------------------------------------------------------------------------
def parts_of(model: str, folder: Path):
    """Model and processor of a preset, or those of the shipped checkpoint."""
    if model != "needle":
        return saved_parts(model, folder / "model")
    folder = ROOT / "checkpoints" / "needle-slime"
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def rows_of(trainer: str) -> list[dict]:
    if trainer in ("DPO", "Reward"):
        return preferences([1] * 4)
    if trainer == "KTO":
        return [
            {"prompt": row["prompt"], "completion": assistant(text), "label": label, "images": row["images"]}
            for row in prompts(2)
            for text, label in (("a dog", True), ("a cat or so", False))
        ]
    return [{**row, "answer": "dog"} for row in prompts(4)]


@pytest.mark.parametrize("model", ["needle", *ONLINE_PRESETS])
@pytest.mark.parametrize("name", ["GRPO", "RLOO", "Distillation", "DPO", "KTO", "Reward"])
def test_five_steps(name, model, tmp_path):
    policy, processor = parts_of(model, tmp_path)
    values = {"max_steps": 5, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    extra = {}
    if name in ("GRPO", "RLOO", "Distillation"):
        values |= {"max_completion_length": 5, "disable_dropout": True}
        values |= {} if name == "Distillation" else {"num_generations": 2}
        extra = {"reward_funcs": [trl_run.reward, right_answer]}
        if name == "Distillation":
            extra = {"teacher_model": copy.deepcopy(policy)}
            with torch.no_grad():
                extra["teacher_model"].lm_head.weight.mul_(1.1)
    else:
        values["max_length"] = None
    if name == "Reward":
        policy.save_pretrained(tmp_path / "policy")
        policy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1)
        values["remove_unused_columns"] = False
        extra["data_collator"] = RewardCollator(processor)
    before = copy.deepcopy(policy.state_dict())
    trainer = getattr(trl, f"{name}Trainer")(
        policy,
        args=trl_arguments(getattr(trl, f"{name}Config"), tmp_path / "out", **values),
        train_dataset=as_dataset(rows_of(name)),
        processing_class=processor.tokenizer if name == "Reward" else processor,
        **extra,
    )
    trainer.train()
    assert len(logged(trainer)) == 5 and all(map(math.isfinite, [*logged(trainer), *logged(trainer, "grad_norm")]))
    moved = [part for part, own in trainer.model.state_dict().items() if not torch.equal(own, before[part])]
    for part in ("vision_tower", "connector", "language_model"):
        assert any(part in own for own in moved)


# ---- two processes --------------------------------------------------------------------------------------------------
def launch(tmp_path, name: str, images: list[int], **arguments) -> list[dict]:
    """A run in two processes; what each of them wrote."""
    saved_parts("slime", tmp_path / "model")
    settings = {"trainer": name, "images": images, "arguments": arguments, "model": str(tmp_path / "model")}
    settings["folder"] = str(tmp_path / "two")
    run_launcher("ddp.yaml", [str(TESTS / "trl_run.py"), json.dumps(settings)])
    found = [json.loads((tmp_path / "two" / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["world"] == 2
    assert found[0]["sums"] == pytest.approx(found[1]["sums"], rel=1e-6), "both processes hold the same model"
    return found


def test_dpo_in_two_processes_equals_one(tmp_path):
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-2, "max_length": None}
    options["train_sampling_strategy"] = "sequential"
    two = launch(tmp_path, "DPO", [1, 2, 2, 1], per_device_train_batch_size=1, **options)[0]
    folder = {"folder": str(tmp_path / "one"), "model": str(tmp_path / "model")}
    arguments = {**options, "per_device_train_batch_size": 2}
    trl_run.main({"trainer": "DPO", "images": [1, 2, 2, 1], "arguments": arguments, **folder})
    one = json.loads((tmp_path / "one" / "result-0.json").read_text())
    assert two["losses"][0] == pytest.approx(LN2, abs=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-5)


def test_grpo_in_two_processes(tmp_path):
    options = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 5, "max_steps": 2}
    found = launch(tmp_path, "GRPO", [2, 2, 2, 2], steps_per_generation=2, beta=0.1, disable_dropout=True, **options)
    assert len(found[0]["losses"]) == 2 and all(map(math.isfinite, found[0]["losses"]))
    assert found[0]["rewards"] and found[0]["rewards"] == found[1]["rewards"]
