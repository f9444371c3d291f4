"""`trainer.save_model` leaves a model card that is true: its code runs, and it names base, stage and adapter."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, Trainer

from builders.tiny import random_image
from builders.training import conversation, conversations, make_trainer, slime_parts, training_arguments
from hires_lmm.training import HiResLmmCollator, Stage
from hires_lmm.training.lora import lora_config


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

STAGE = Stage("mine/II", {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3})
ADAPTERS = {
    "lora": lambda model: lora_config(model, "language_only", r=2),
    "prompt": lambda model: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a base checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    model, processor = slime_parts()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_code(folder: Path, monkeypatch) -> dict:
    """Names after the code of the card has run where the card lies."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    random_image(60, 90).save("picture.png")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def trainer_for(model, processor, folder, with_stage=True):
    if with_stage:
        return make_trainer(model, processor, STAGE, conversations(2), folder, max_steps=1)
    args = training_arguments(folder, max_steps=1)
    collator = HiResLmmCollator(processor)
    return Trainer(model, args, train_dataset=[conversation(1)], data_collator=collator, processing_class=processor)


@pytest.mark.parametrize("with_stage", [True, False], ids=["stage", "plain"])
def test_a_trained_model_gets_a_card(with_stage, base, tmp_path, monkeypatch):
    model, processor = AutoModelForImageTextToText.from_pretrained(base), slime_parts()[1]
    trainer = trainer_for(model, processor, tmp_path / "run", with_stage)
    trainer.train()
    trainer.save_model(str(tmp_path / "tune"))
    card = ModelCard.load(tmp_path / "tune" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder is no name on the Hub
    assert "# tune" in card.text and f"Trained from `{base}`" in card.text
    assert ("stage `mine/II`" in card.text) == with_stage
    tokens = processor.image_tokens(1080, 1920)
    assert re.search(rf"\| 1920 x 1080 \| \d+ \| {tokens} \|", card.text)
    names = run_code(tmp_path / "tune", monkeypatch)
    assert torch.equal(names["model"].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_gets_a_card_in_place_of_the_empty_one(kind, base, tmp_path, monkeypatch):
    model, processor = AutoModelForImageTextToText.from_pretrained(base), slime_parts()[1]
    wrapped = peft.get_peft_model(model, ADAPTERS[kind](model))
    trainer = trainer_for(wrapped, processor, tmp_path / "run", with_stage=False)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert "More Information" not in card.text and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-text-to-text" and f"An adapter for `{base}`" in card.text
    assert {"lora": "r: `2`", "prompt": "num_virtual_tokens: `3`"}[kind] in card.text
    names = run_code(tmp_path / "adapter", monkeypatch)
    batch = HiResLmmCollator(processor)([conversation(1)])
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(**batch).logits, wrapped.eval()(**batch).logits)
    assert names["processor"].image_tokens(60, 90) == processor.image_tokens(60, 90)


def test_a_model_that_is_saved_alone_and_again_gets_a_card_of_its_own(base, tmp_path, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.save_pretrained(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "README.md").exists()
    for stage in ("first", "second"):
        model.config.training_stage = stage
        model.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "stage `second`" in text and "first" not in text and "processor" not in text
    assert torch.equal(run_code(tmp_path / "model", monkeypatch)["model"].lm_head.weight, model.lm_head.weight)


def test_a_card_that_somebody_wrote_stays(base, tmp_path):
    own = "# Mine\n\nDo not touch.\n"
    model, processor = AutoModelForImageTextToText.from_pretrained(base), slime_parts()[1]
    (tmp_path / "README.md").write_text(own)
    model.config.training_stage = "mine"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == own
