# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""DPO with TRL's trainer, unchanged: right answers are preferred to wrong ones, with the language loss beside it.

    python examples/dpo.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5] [--lora]

FILE is JSON, a list of {"image", "question", "answer", "wrong"}; images lie beside it. Without `wrong` the answer of
the next row is taken. By default the shipped checkpoint learns from five needle scenes. The loss starts at ln 2 plus
the language loss (`sigmoid + sft`). Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from hires_lmm.training.lora import lora_config
from hires_lmm.training.preference import preference_row


ROOT = Path(__file__).parents[1]


def read_pairs(file: Path) -> Dataset:
    """Rows for TRL: `images`, `prompt`, `chosen`, `rejected`."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    wrong = [row.get("wrong", rows[(index + 1) % len(rows)]["answer"]) for index, row in enumerate(rows)]
    return Dataset.from_list(
        [
            preference_row([Image.open(file.parent / row["image"])], row["question"], row["answer"], rejected)
            for row, rejected in zip(rows, wrong, strict=True)
        ]
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/dpo")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lora", action="store_true", help="train a LoRA; the reference is the model without it")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    args = DPOConfig(
        options.output,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.2],
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        max_length=None,  # else TRL cuts image tokens off
        logging_steps=1,
        report_to="none",
        bf16=False,
    )
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=read_pairs(options.data),
        processing_class=AutoProcessor.from_pretrained(options.model),
        peft_config=lora_config(model, "language_only", r=8) if options.lora else None,
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
