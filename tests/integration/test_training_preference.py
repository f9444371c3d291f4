"""TRL's DPO: policy and reference are the same model at first, so the first loss is ln 2 whatever is random inside."""

import math

import pytest
from transformers import AutoModelForImageTextToText

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from builders.training import COMPRESS
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids
from hires_lmm.training.lora import lora_config


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # by TRL and PEFT
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]

NOISY = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.75}, "noise": 3.0}
CONNECTORS = {
    "slime": {"view_ops": [COMPRESS], "token_ops": [NOISY]},
    "slime_release": {
        "view_ops": [COMPRESS],
        "layout": {"separators": {"separator": {"place": "between_views", "value": [7]}}},
    },
    "llava_next": {},
}


def pairs():
    """One question with a better and a worse answer of different lengths."""
    turns = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    columns = {"prompt": turns, "chosen": turns, "rejected": turns, "images": datasets.List(datasets.Image())}
    rows = {
        "prompt": [[{"role": "user", "content": "what is it"}]],
        "chosen": [[{"role": "assistant", "content": "a dog"}]],
        "rejected": [[{"role": "assistant", "content": "a cat or so"}]],
        "images": [[random_image(80, 120)]],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


@pytest.mark.parametrize("way", ["reference", "lora"])
@pytest.mark.parametrize("preset", CONNECTORS)
def test_the_first_step_of_dpo_has_the_loss_ln_2(preset, way, tmp_path):
    config = tiny_config(preset, connector_config=CONNECTORS[preset])
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    tiny_model(config).save_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    args = trl.DPOConfig(
        str(tmp_path / "out"),
        report_to=[],
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=1,
        logging_steps=1,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model,
        args=args,
        train_dataset=pairs(),
        processing_class=processor,
        peft_config=lora_config(model, "language_only") if way == "lora" else None,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
