# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""OPA-DPO in two stages: SFT of a LoRA on right and revised answers, then DPO of the same LoRA with a masked image.

    python examples/opa_dpo.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5]

FILE is JSON, a list of {"image", "question", "answer", "revised", "own"}: the right answer, the model's own one, and
the own one as an expert has revised it. Without these two, the next row's answer and the right one stand for them.
Published: rank 256, alpha 512, rate 1e-6 in stage 2, beta 0.1; the anchor pushes revised answers down. Tested on 2
CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.arguments import build_arguments
from hires_lmm.training.lora import lora_config
from hires_lmm.training.preference import preference_row
from hires_lmm.training.preference.image_masked import ImageMaskedDPOConfig, ImageMaskedDPOTrainer


ROOT = Path(__file__).parents[1]


def read_rows(file: Path) -> list[dict]:
    """One row a pair: (right, own) and (revised, own)."""
    found, rows = [], json.loads(file.read_text(encoding="utf-8"))
    for index, row in enumerate(rows):
        own = row.get("own", rows[(index + 1) % len(rows)]["answer"])
        for chosen, revised in ((row["answer"], False), (row.get("revised", row["answer"]), True)):
            image = Image.open(file.parent / row["image"])
            found.append(preference_row([image], row["question"], chosen, own, revised=revised))
    return found


def main() -> None:
    """Stage 1, stage 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/opa_dpo")
    parser.add_argument("--steps", type=int, default=5, help="of each stage")
    options = parser.parse_args()
    rows, processor = read_rows(options.data), AutoProcessor.from_pretrained(options.model)
    base = AutoModelForImageTextToText.from_pretrained(options.model)
    model = get_peft_model(base, lora_config(base, "language_only", r=16, alpha=32))
    common = {"max_steps": options.steps, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}

    asked = [f"<image>\n{row['prompt'][0]['content']}" for row in rows]
    data = [
        {"images": row["images"], "messages": [{"role": "user", "content": question}, *row["chosen"]]}
        for row, question in zip(rows, asked, strict=True)
    ]
    args = build_arguments(options.output + "/sft", learning_rate=2e-5, **common)
    Trainer(model, args, train_dataset=data, data_collator=HiResLmmCollator(processor)).train()

    masked = {"level": "token", "image_weight": 0.2, "anchor_weight": 2.0, "anchor_revised": "down", "beta": 0.1}
    args = ImageMaskedDPOConfig(options.output, learning_rate=1e-6, max_length=None, bf16=False, **common, **masked)
    pairs = Dataset.from_list(rows)
    trainer = ImageMaskedDPOTrainer(model, args=args, train_dataset=pairs, processing_class=processor)
    trainer.train()  # the reference is a copy of the LoRA as stage 1 left it
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
