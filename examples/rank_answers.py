# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""Several answers a question, scored on axes, in three ways: the best as SFT, the ends as DPO, scores as attributes.

    python examples/rank_answers.py best|pairs|attributes [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5]

Answers are sampled from the model. The score here is for questions with a known answer: correctness (0 or 1) and
brevity (1 / (1 + words)); put a judge's scores in its place. `best`: rejection sampling. `pairs`: multi-modal
preference alignment. `attributes`: as SteerLM, answers are learnt behind their scores; ask with those you want.
Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from trl import DPOConfig, DPOTrainer

from hires_lmm.inference import prepare
from hires_lmm.training import HiResLmmCollator, preference
from hires_lmm.training.arguments import build_arguments


ROOT = Path(__file__).parents[1]


def rank(model, processor, row: dict) -> list:
    """Answers of the model and the right one, best first."""
    inputs = prepare(processor, [row["image"]], row["question"]).inputs
    ids = model.generate(**inputs, do_sample=True, temperature=2.0, num_return_sequences=4, max_new_tokens=4)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [row["answer"], *(answer.strip() for answer in answers)]
    scores = [{"correctness": float(a == row["answer"]), "brevity": 1 / (1 + len(a.split()))} for a in answers]
    return preference.rank_answers(answers, scores, {"correctness": 3, "brevity": 1})


def turns(question: str, answer: str) -> list[dict]:
    """A conversation with a place for the image."""
    return [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Sample, rank, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("best", "pairs", "attributes"))
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/rank_answers")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    entries = json.loads(options.data.read_text(encoding="utf-8"))
    rows = [{**entry, "image": Image.open(options.data.parent / entry["image"])} for entry in entries]
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    ranked = [(row, rank(model, processor, row)) for row in rows]
    common = {"max_steps": options.steps, "logging_steps": 1, "report_to": "none", "per_device_train_batch_size": 2}
    if options.method == "pairs":
        pairs = [(row, *pair) for row, answers in ranked for pair in preference.preference_pairs(answers, min_gap=0.1)]
        data = [preference.preference_row([row["image"]], row["question"], *pair) for row, *pair in pairs]
        args = DPOConfig(options.output, max_length=None, bf16=False, beta=0.1, learning_rate=1e-5, **common)
        trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=processor)
    else:
        asked = [(row, row["question"], text) for row, answers in ranked for text in preference.best_answers(answers)]
        if options.method == "attributes":
            put = preference.attribute_prompt
            asked = [(row, put(a.scores, row["question"]), a.text) for row, answers in ranked for a in answers]
        data = [{"images": [row["image"]], "messages": turns(*text)} for row, *text in asked]
        args, collator = build_arguments(options.output, learning_rate=1e-5, **common), HiResLmmCollator(processor)
        trainer = Trainer(model, args, train_dataset=data, data_collator=collator, processing_class=processor)
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
