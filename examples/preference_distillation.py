# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""Preference distillation with TRL's DPOTrainer, unchanged: the reference is a larger model, the teacher.

    python examples/preference_distillation.py [--model STUDENT] [--teacher TEACHER] [--data FILE] [--output OUT]

FILE is JSON, a list of {"image", "question", "answer", "wrong"}; images lie beside it. Without `wrong` the answer of
the next row is taken. The teacher reads the student's batch: both have one tokenizer, cut images alike and count their
tokens alike. By default the shipped checkpoint is the teacher, and the student is the same with a stricter router. The
first loss is not ln 2, since the reference is another model. Rate and β are those of LLaVA-MoD. Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from hires_lmm.training import get_plan, set_options
from hires_lmm.training.preference import preference_row


ROOT = Path(__file__).parents[1]
RATE = next(iter(get_plan("llava_mod")[3].trainable.values()))


def read_pairs(file: Path) -> Dataset:
    """Rows for TRL: `images`, `prompt`, `chosen`, `rejected`."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    wrong = [row.get("wrong", rows[(index + 1) % len(rows)]["answer"]) for index, row in enumerate(rows)]
    pictures = [Image.open(file.parent / row["image"]) for row in rows]
    pairs = zip(pictures, rows, wrong, strict=True)
    return Dataset.from_list([preference_row([own], row["question"], row["answer"], bad) for own, row, bad in pairs])


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--teacher", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/preference_distillation")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args()
    student = AutoModelForImageTextToText.from_pretrained(options.model)
    if options.model == options.teacher:
        keep = {"rule": "threshold", "gamma": 0.2}
        set_options(student, {"token_ops": [{"part": "router", "on": "crops", "score": "cosine", "keep": keep}]})
    args = DPOConfig(
        options.output,
        beta=0.1,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=options.rate,
        max_length=None,  # else TRL cuts image tokens off
        logging_steps=1,
        report_to="none",
        bf16=False,
    )
    trainer = DPOTrainer(
        student,
        ref_model=AutoModelForImageTextToText.from_pretrained(options.teacher),
        args=args,
        train_dataset=read_pairs(options.data),
        processing_class=AutoProcessor.from_pretrained(options.model),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
