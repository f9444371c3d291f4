"""Is an object there? Yes/no questions as POPE asks them, about needle scenes: plain decoding, M3ID and DAMRO.

    python benchmarks/needle_presence.py --work OUT            about 12 minutes on one core; run again, it goes on
    python benchmarks/needle_presence.py --work OUT --split test

The shipped checkpoint never learnt to say yes or no, so it is trained on such questions first (half of the answers are
yes; training scenes). Settings are tried on validation scenes; test scenes are for the published settings, and for the
best of each method on validation. Half of the questions are about objects that are not there: `colour`, of a colour
that no object has; `kind`, of a colour that is there on an object of another kind. Results stand in
benchmarks/results/needle/presence-SPLIT.json.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, surroundings
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers.utils import logging

from hires_lmm.decoding import DAMRO, M3ID
from hires_lmm.files import write_text
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback
from hires_lmm.training.arguments import build_arguments
from hires_lmm.training.checkpoints import last_checkpoint
from hires_lmm.training.settings import set_options
from needle import Scene, needle_scene
from needle.dataset import draw
from needle.scenes import COLOURS
from needle.sprites import KINDS


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "needle-slime"
STAGE = Stage("presence", {"connector": 2e-4, "language_model": 4e-4, "lm_head": 4e-4}, noise=False)
STEPS, BATCH, SCENES = 250, 8, 120
QUESTIONS, ANSWERS = ("colour", "kind"), ("yes", "no")
METHODS: dict[str, Any] = {"m3id": M3ID, "damro": DAMRO}
PUBLISHED: dict[str, dict] = {"plain": {}, "m3id": {}, "damro": {}}
TRIED: dict[str, list[dict]] = {
    "m3id": [{"rate": rate, "beta": 0.1} for rate in (0.1, 0.3, 1.0)],
    "damro": [{"alpha": alpha, "k": k} for alpha in (0.5, 1.0) for k in (4, 10)],
}


def ask(scene: Scene, kind: str, answer: str, rng: random.Random) -> str:
    """A question of a kind with that answer."""
    there = {item.colour: item for item in scene.objects}
    if kind == "colour":
        colours = [colour for colour in COLOURS if (colour in there) == (answer == "yes")]
        return f"is there a {rng.choice(colours)} object ?"
    item = there[rng.choice(sorted(there))]
    kinds = [each for each in KINDS if (each == item.kind) == (answer == "yes")]
    return f"is there a {item.colour} {rng.choice(kinds)} ?"


class Presence(Dataset):
    """Rows of training scenes with four turns; each answer is drawn by itself, or the last would be known."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        scene, rng, messages = needle_scene(index, "train"), random.Random(index), []
        for turn in range(4):
            answer = rng.choice(ANSWERS)
            text = {"type": "text", "text": ask(scene, rng.choice(QUESTIONS), answer, rng)}
            user = {"role": "user", "content": [text] if turn else [{"type": "image"}, text]}
            messages += [user, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [draw(scene)]}


def trained(work: Path, steps: int) -> tuple[Any, Any]:
    """The model that answers yes and no, and its processor; trained where it is not yet."""
    folder = work / f"model-{steps}"
    if not (folder / "config.json").is_file():
        model, processor = load(CHECKPOINT)
        set_options(model, {"token_ops": []})  # all tokens stay
        processor.image_processor.token_layout = model.config.token_layout()
        arguments = build_arguments(
            work / f"run-{steps}",
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            save_steps=100,
            save_total_limit=1,
            logging_steps=20,
            lr_scheduler_type="cosine",
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(
            model.train(),
            arguments,
            train_dataset=Presence(steps * BATCH),
            data_collator=HiResLmmCollator(processor),
            callbacks=[StageCallback(STAGE, show_table=False)],
            optimizer_cls_and_kwargs=STAGE.optimizer_cls_and_kwargs(arguments),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(work / f"run-{steps}"))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return load(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor of a folder."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def questions(split: str, scenes: int) -> Iterator[tuple[list, list]]:
    """Questions and conversations of a scene, scene after scene."""
    for index in range(scenes):
        scene, rng = needle_scene(index, split), random.Random(f"{split}/{index}")
        pairs = [(kind, answer) for kind in QUESTIONS for answer in ANSWERS]
        asked, image = [(kind, ask(scene, kind, answer, rng), answer) for kind, answer in pairs], draw(scene)
        yield (
            asked,
            [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
                for _, text, _ in asked
            ],
        )


@torch.no_grad()
def score(model: Any, processor: Any, split: str, scenes: int, method: str, options: dict) -> dict:
    """Answers to all questions: accuracy, F1 of yes and share of yes, by kind and over all."""
    counts: dict[str, Counter] = {}
    for asked, conversations in questions(split, scenes):
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        twice = [METHODS[method](model, inputs, **options)] if method in METHODS else []
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=twice)
        said = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (kind, _, answer), text in zip(asked, said, strict=True):
            for name in (kind, "all"):
                counts.setdefault(name, Counter())[answer, text.strip()] += 1
    return {name: summary(own) for name, own in counts.items()}


def summary(counts: Counter) -> dict:
    """What POPE reports, from counts of (right answer, answer)."""
    total, hits = counts.total(), counts["yes", "yes"]
    said = sum(number for (_, text), number in counts.items() if text == "yes")
    asked = sum(number for (answer, _), number in counts.items() if answer == "yes")
    return {
        "questions": total,
        "accuracy": (hits + counts["no", "no"]) / total,
        "f1": 2 * hits / max(said + asked, 1),
        "yes": said / total,
        "false_yes": counts["no", "yes"],
        "missed": asked - hits,
    }


def main() -> None:
    """Train where need be, then answer with every setting that is not done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained model, not committed")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model, processor = trained(options.work, options.steps)
    settings = [*PUBLISHED.items(), *((name, own) for name, tried in TRIED.items() for own in tried)]
    if options.split == "test":
        rows = json.loads(file_of("validation").read_text())["rows"]
        settings = [*PUBLISHED.items(), *(best(rows, name) for name in TRIED)]
    file = file_of(options.split)
    given = {"steps": options.steps, "scenes": options.scenes}
    record = json.loads(file.read_text()) if file.is_file() else {}
    done = record.get("rows", []) if record.get("given") == given else []
    for method, chosen in settings:
        if any(row["method"] == method and row["options"] == chosen for row in done):
            continue
        result = score(model, processor, options.split, options.scenes, method, chosen)
        done.append({"method": method, "options": chosen, "scores": result})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**surroundings(), "given": given, "rows": done}, indent=1) + "\n")


def file_of(split: str) -> Path:
    """Where results of a split are kept."""
    return RESULTS / "needle" / f"presence-{split}.json"


def best(rows: list[dict], method: str) -> tuple[str, dict]:
    """The setting of a method with most right answers."""
    own = [row for row in rows if row["method"] == method]
    return method, max(own, key=lambda row: row["scores"]["all"]["accuracy"])["options"]


if __name__ == "__main__":
    main()
