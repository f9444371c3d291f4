# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""Iterative DPO (as Insight-V trains its reasoner): sample, pair, train, and again from the model that came out.

    python examples/iterative_dpo.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--rounds 2] [--steps 5]

FILE is JSON, a list of {"image", "question", "answer"}. Each round samples answers from the model of the round before,
which is its reference as well, and prefers the right answer to a wrong one of the model's own. A round without a wrong
answer ends the run. Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from hires_lmm.inference import prepare
from hires_lmm.training.preference import preference_pairs, preference_row, rank_answers


ROOT = Path(__file__).parents[1]


def sample_pairs(folder: str, rows: list[dict], temperature: float) -> list[dict]:
    """Right answers beside the model's own wrong ones."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    found = []
    for row in rows:
        inputs = prepare(processor, [row["image"]], row["question"]).inputs
        options = {"do_sample": True, "temperature": temperature, "num_return_sequences": 8, "max_new_tokens": 8}
        ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        answers = [row["answer"], *(text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True))]
        ranked = rank_answers(answers, [{"right": float(answer == row["answer"])} for answer in answers])
        found += [preference_row([row["image"]], row["question"], *pair) for pair in preference_pairs(ranked)]
    return found


def main() -> None:
    """Round after round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/iterative_dpo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of each round")
    parser.add_argument("--temperature", type=float, default=2.0)
    options = parser.parse_args()
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    rows = [{**row, "image": Image.open(options.data.parent / row["image"])} for row in rows]
    folder = options.model
    for number in range(1, options.rounds + 1):
        pairs = sample_pairs(folder, rows, options.temperature)
        print(f"round {number}: {len(pairs)} pairs")
        if not pairs:
            break
        args = DPOConfig(
            f"{options.output}/{number}", max_steps=options.steps, per_device_train_batch_size=2, learning_rate=1e-5,
            max_length=None, logging_steps=1, report_to="none", bf16=False,
        )  # fmt: skip
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        data = Dataset.from_list(pairs)
        trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=processor)
        trainer.train()
        folder = f"{options.output}/{number}"
        trainer.save_model(folder)


if __name__ == "__main__":
    main()
