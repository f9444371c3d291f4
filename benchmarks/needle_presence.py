"""Is an object there? Yes/no questions as POPE asks them, about needle scenes: plain decoding, M3ID and DAMRO.

    python benchmarks/needle_presence.py --work OUT            about 12 minutes on one core; run again, it goes on

The shipped checkpoint never learnt to say yes or no, so it is trained on such questions first (training scenes, all
tokens kept). Half of the questions asked are about objects that are not there: `colour`, of a colour that no object
has; `kind`, of a colour that is there on an object of another kind. The setting of each method that answers most
validation questions is reported on test scenes, beside the published one. Answers are one token, so both contexts are
read once a question and every setting is applied to the same scores. Writes benchmarks/results/needle/presence.json.
"""

import argparse
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import RESULTS, surroundings
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from transformers.utils import logging

from hires_lmm.decoding import ContrastiveDecoding, contrast, most_attended, raise_images, without_images
from hires_lmm.files import write_text
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback, cache_vision_features
from hires_lmm.training.arguments import build_arguments
from hires_lmm.training.checkpoints import last_checkpoint
from hires_lmm.training.settings import set_options
from needle import Scene, needle_scene
from needle.dataset import draw
from needle.scenes import COLOURS
from needle.sprites import KINDS


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "needle-slime"
STAGE = Stage("presence", {"connector": 2e-4, "language_model": 4e-4, "lm_head": 4e-4}, noise=False)
STEPS, BATCH, SCENES, TRAINING_SCENES = 1500, 8, (60, 100), 600
QUESTIONS, ANSWERS = ("colour", "kind"), ("yes", "no")
CONTEXTS: dict[str, Any] = {"m3id": without_images, "damro": most_attended}
RULES: dict[str, Any] = {"m3id": raise_images, "damro": contrast}
PUBLISHED = {"m3id": {"rate": 0.02}, "damro": {"alpha": 2.0, "beta": 0.1}}
TRIED: dict[str, list[dict]] = {
    "m3id": [{"rate": rate} for rate in (0.02, 0.1, 0.3, 0.7, 1.0, 2.0)],
    "damro": [{"alpha": alpha, "beta": beta} for alpha in (0.25, 0.5, 1.0, 2.0) for beta in (0.1, 0.25)],
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


@cache
def picture(index: int) -> Image.Image:
    """The picture of a training scene."""
    return draw(needle_scene(index, "train"))


class Presence(Dataset):
    """Rows of training scenes with four turns; each answer is drawn by itself, or the last would be known."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        number, rng, messages = index % TRAINING_SCENES, random.Random(index), []
        scene = needle_scene(number, "train")
        for turn in range(4):
            answer = rng.choice(ANSWERS)
            text = {"type": "text", "text": ask(scene, rng.choice(QUESTIONS), answer, rng)}
            user = {"role": "user", "content": [text] if turn else [{"type": "image"}, text]}
            messages += [user, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [picture(number)]}


def trained(work: Path, steps: int) -> tuple[Any, Any]:
    """The model that answers yes and no, and its processor; trained where it is not yet."""
    folder = work / f"model-{steps}"
    if not (folder / "config.json").is_file():
        model, processor = load(CHECKPOINT)
        set_options(model, {"token_ops": []})  # all tokens stay
        processor.image_processor.token_layout = model.config.token_layout()
        count = min(TRAINING_SCENES, steps * BATCH)
        store = cache_vision_features(model, processor, map(picture, range(count)), work / "features")
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
            data_collator=HiResLmmCollator(processor, features=store),
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


def look(model: Any, processor: Any, scene: Scene, rng: random.Random) -> tuple[list, dict[str, list]]:
    """Kind and right answer of the questions about a scene, and by method the scores of their first tokens, twice."""
    pairs, image = [(kind, answer) for kind in QUESTIONS for answer in ANSWERS], draw(scene)
    talks = []
    for kind, answer in pairs:
        text = {"type": "text", "text": ask(scene, kind, answer, rng)}
        talks.append([{"role": "user", "content": [{"type": "image", "image": image}, text]}])
    inputs = processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    images = {name: inputs[name] for name in ("pixel_values", "view_positions", "view_spans")}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    features, seen = {"image": model.get_image_features(**images, return_dict=True)}, {}
    for method, context in CONTEXTS.items():
        scores = seen.setdefault(method, [])
        spy = ContrastiveDecoding(
            model, inputs, context, lambda own, other, _, to=scores: to.extend((own, other)) or own
        )
        model.generate(**text, mm_encoder_outputs=features, max_new_tokens=1, do_sample=False, logits_processor=[spy])
    return pairs, seen


@torch.no_grad()
def measure(model: Any, processor: Any, split: str, scenes: int) -> list[dict]:
    """Rows of all settings: accuracy, F1 and share of yes, by kind and over all."""
    settings = [("plain", {}), *((method, options) for method, tried in TRIED.items() for options in tried)]
    counts: list[dict[str, Counter]] = [{} for _ in settings]
    for index in range(scenes):
        rng = random.Random(f"{split}/{index}")
        pairs, seen = look(model, processor, needle_scene(index, split), rng)
        for (method, options), own_counts in zip(settings, counts, strict=True):
            own, other = seen["m3id" if method == "plain" else method]
            scores = own if method == "plain" else RULES[method](own, other, 1, **options)
            said = [processor.tokenizer.decode(token) for token in scores.argmax(dim=-1)]
            for (kind, answer), text in zip(pairs, said, strict=True):
                for name in (kind, "all"):
                    own_counts.setdefault(name, Counter())[answer, text.strip()] += 1
    return [
        {"method": method, "options": options, "scores": {name: summary(own) for name, own in found.items()}}
        for (method, options), found in zip(settings, counts, strict=True)
    ]


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
    """Train where need be, then ask on validation scenes and, of what is best there, on test scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained model, not committed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scenes", type=int, nargs=2, default=SCENES, help="of validation and of test")
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model, processor = trained(options.work, options.steps)
    kept = options.work / f"validation-{options.steps}-{options.scenes[0]}.json"
    if not kept.is_file():
        write_text(kept, json.dumps(measure(model, processor, "validation", options.scenes[0])))
    validation = json.loads(kept.read_text())
    test = measure(model, processor, "test", options.scenes[1])
    chosen = [("plain", {}), *PUBLISHED.items(), *(best(validation, name) for name in TRIED)]
    shown = [row for row in test if (row["method"], row["options"]) in chosen]
    file = RESULTS / "needle" / "presence.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **surroundings(),
        "steps": options.steps,
        "scenes": options.scenes,
        "test": shown,
        "validation": validation,
    }
    write_text(file, json.dumps(record, indent=1) + "\n")


def best(rows: list[dict], method: str) -> tuple[str, dict]:
    """The setting of a method with most right answers, of equal ones the mildest."""
    own = [row for row in rows if row["method"] == method]
    return method, max(own, key=lambda row: row["scores"]["all"]["accuracy"])["options"]


if __name__ == "__main__":
    main()
