# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""KTO with TRL's trainer, unchanged: answers that are right or wrong by themselves, without pairs.

    python examples/kto.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5]

FILE is JSON, a list of {"image", "question", "answer", "wrong"}; images lie beside it. Without `wrong` the answer of
the next row is taken. By default the shipped checkpoint learns from needle scenes. The first loss is one half. Tested
on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import KTOConfig, KTOTrainer

import hires_lmm  # noqa: F401  registers the classes


ROOT = Path(__file__).parents[1]


def read_answers(file: Path) -> Dataset:
    """Rows for TRL: `prompt`, `completion`, `label`, `images`; one right and one wrong answer a question."""
    found, rows = [], json.loads(file.read_text(encoding="utf-8"))
    for index, row in enumerate(rows):
        wrong = row.get("wrong", rows[(index + 1) % len(rows)]["answer"])
        for answer, label in ((row["answer"], True), (wrong, False)):
            found.append(
                {
                    "prompt": [{"role": "user", "content": row["question"]}],
                    "completion": [{"role": "assistant", "content": answer}],
                    "label": label,
                    "images": [Image.open(file.parent / row["image"])],
                }
            )
    return Dataset.from_list(found)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/kto")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    args = KTOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=None,  # else TRL cuts image tokens off
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
        bf16=False,
    )
    trainer = KTOTrainer(
        AutoModelForImageTextToText.from_pretrained(options.model),
        args=args,
        train_dataset=read_answers(options.data),
        processing_class=AutoProcessor.from_pretrained(options.model),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
