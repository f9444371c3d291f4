# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm[train]"]
# ///
"""Two-stage curriculum (as LlamaV-o1): first to look and to plan, then all steps up to the answer, turn by turn.

    python examples/curriculum.py [--model CHECKPOINT] [--data FILE] [--output OUT] [--steps 5]

FILE is JSON, a list of {"image", "steps": [[instruction, answer], ...]}: one turn a step, the last one the answer.
Stage 1 learns the turns before the last; stage 2 learns all of them, from the weights of stage 1. In the end the first
image is asked step by step, as a conversation with beams. Tested on 2 CPU cores.
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from hires_lmm.training import HiResLmmCollator, Stage, StageCallback
from hires_lmm.training.arguments import build_arguments


ROOT = Path(__file__).parents[1]
RATES = {"connector": 1e-5, "language_model": 1e-5, "lm_head": 1e-5}
STAGES = [Stage("look_and_plan", RATES), Stage("answer", RATES, after="look_and_plan")]


def conversation(row: dict, steps: list[list[str]]) -> dict:
    """The steps as turns; the image stands before the first."""
    messages: list[dict] = []
    for number, (instruction, answer) in enumerate(steps):
        text = instruction if number else f"<image>\n{instruction}"
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"images": [row["image"]], "messages": messages}


def ask(model, processor, row: dict) -> None:
    """Each step with the model's own answers to the steps before."""
    messages: list[dict] = []
    for number, (instruction, _) in enumerate(row["steps"]):
        image = [] if number else [{"type": "image", "image": row["image"]}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": instruction}]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, num_beams=4, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(ids, skip_special_tokens=True)
        print(f"{instruction} {answer}")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def main() -> None:
    """Stage 1, stage 2, one conversation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "needle-slime"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "images" / "needle_scenes.json")
    parser.add_argument("--output", default="out/curriculum")
    parser.add_argument("--steps", type=int, default=5, help="of each stage")
    options = parser.parse_args()
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    rows = [{**row, "image": Image.open(options.data.parent / row["image"])} for row in rows]
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    for stage in STAGES:
        data = [conversation(row, row["steps"][:-1] if stage is STAGES[0] else row["steps"]) for row in rows]
        folder = f"{options.output}/{stage.name}"
        args = build_arguments(folder, max_steps=options.steps, per_device_train_batch_size=2, report_to="none")
        trainer = Trainer(
            model, args, train_dataset=data, data_collator=HiResLmmCollator(processor), processing_class=processor,
            callbacks=[StageCallback(stage)], optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(folder)
    ask(model.eval(), processor, rows[0])


if __name__ == "__main__":
    main()
