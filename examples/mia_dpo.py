# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""MIA-DPO: questions about one of several pictures, made of single-image data; wrong looks are rejected answers.

    python examples/mia_dpo.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5] [--loose]

FILE is JSON, a list of {"image", "question", "answer"}. The model answers each question about a row, a grid or a
picture in a picture; its answer is rejected if it is wrong, was in doubt, and paid the asked picture too little
attention. What was kept is written to OUT/data and trained on. `--loose` keeps every wrong answer. Tested on 2 CPU
cores.
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from hires_lmm.training.data.mia import KINDS, Filters, answer_with_attention, build_pairs, write_pairs


ROOT = Path(__file__).parents[1]
LOOSE = Filters(shares={kind: {1: 1.01} for kind in KINDS}, perplexity=0.0)


def main() -> None:
    """Build the data, train on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/mia_dpo")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--loose", action="store_true")
    options = parser.parse_args()
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    rows = [{**row, "image": Image.open(options.data.parent / row["image"]).convert("RGB")} for row in rows]
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model)

    counts: Counter = Counter()
    answer = partial(answer_with_attention, model.eval(), processor, max_new_tokens=16)
    pairs = build_pairs(rows, answer, pictures=2, filters=LOOSE if options.loose else Filters(), counts=counts)
    data = write_pairs(pairs, Path(options.output) / "data")
    print(f"answers: {dict(counts)}")
    for row in data:
        print(f"{row['kind']}: {row['rejected'][0]['content'][0]['text']!r}, share {row['share']:.2f}")

    args = DPOConfig(
        options.output,
        beta=0.1,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        max_length=None,
        logging_steps=1,
        report_to="none",
        bf16=False,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
