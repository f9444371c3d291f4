# /// script
# requires-python = ">=3.11"
# dependencies = ["hires-lmm[train]"]
# ///
"""RLOO with TRL's trainer, unchanged: answers are sampled, scored by functions, and the better ones reinforced.

    python examples/rloo.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5] [--reward CHECKPOINT]

FILE is JSON, a list of {"image", "question", "answer"}, and "facts" for a reward model; images lie beside it. By
default the shipped checkpoint answers needle questions, and the right answer is rewarded. `--reward` adds the score of
a reward model, see reward.py. Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor
from trl import RLOOConfig, RLOOTrainer

from hires_lmm.training.rewards import length_penalty, model_reward, right_answer


ROOT = Path(__file__).parents[1]


def read_prompts(file: Path) -> Dataset:
    """Rows for TRL: `prompt` and `images`; the rewards read the other columns."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "images": [Image.open(file.parent / row["image"])],
                **{"answer": row["answer"], "facts": row.get("facts", [])},
            }
            for row in rows
        ]
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/rloo")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--reward", help="folder of a reward model")
    options = parser.parse_args()
    rewards = [right_answer, length_penalty(8, weight=0.1)]
    if options.reward:
        judge = AutoModelForSequenceClassification.from_pretrained(options.reward)
        rewards.append(model_reward(judge, AutoProcessor.from_pretrained(options.reward)))
    args = RLOOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        disable_dropout=True,  # and the noise of gates and routers: sampler and learner are the same model
        learning_rate=1e-5,
        **{"logging_steps": 1, "report_to": "none"},
        bf16=False,
    )
    trainer = RLOOTrainer(
        AutoModelForImageTextToText.from_pretrained(options.model),
        args=args,
        reward_funcs=rewards,
        train_dataset=read_prompts(options.data),
        processing_class=AutoProcessor.from_pretrained(options.model, image_layout="dense"),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
