# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""On-policy distillation with TRL's trainer, unchanged: the student answers, the teacher's distribution corrects it.

    python examples/distill.py [--model CHECKPOINT] [--teacher CHECKPOINT] [--data FILE] [--output OUT] [--steps 5]

FILE is JSON, a list of {"image", "question"}; images lie beside it. Student and teacher read the same ids and views:
their vocabulary and the cutting of images are the same. By default the shipped checkpoint learns from itself, with a
router that keeps fewer visual tokens than the teacher's. Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DistillationConfig, DistillationTrainer

from hires_lmm.training import set_options


ROOT = Path(__file__).parents[1]


def read_prompts(file: Path) -> Dataset:
    """Rows for TRL: `prompt` and `images`."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "images": [Image.open(file.parent / row["image"])],
            }
            for row in rows
        ]
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--teacher", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/distill")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gamma", type=float, help="of the student's router; by default 0.5 where it is the teacher")
    options = parser.parse_args()
    student = AutoModelForImageTextToText.from_pretrained(options.model)
    if options.gamma is not None or options.model == options.teacher:
        keep = {"rule": "threshold", "gamma": options.gamma or 0.5}
        set_options(student, {"token_ops": [{"part": "router", "on": "crops", "score": "cosine", "keep": keep}]})
    args = DistillationConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_completion_length=8,
        disable_dropout=True,
        learning_rate=1e-5,
        **{"logging_steps": 1, "report_to": "none"},
        bf16=False,
    )
    trainer = DistillationTrainer(
        student,
        teacher_model=AutoModelForImageTextToText.from_pretrained(options.teacher),
        args=args,
        train_dataset=read_prompts(options.data),
        processing_class=AutoProcessor.from_pretrained(options.model, image_layout="dense"),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
