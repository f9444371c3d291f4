"""What preference training adds to a fine-tuned model: SFT, DPO and GRPO from one checkpoint, on the same questions.

    python -m needle.preference                    all methods and seeds that are not finished
    python -m needle.preference --methods dpo --seeds 7 --steps 5 --split validation
    python -m needle.preference --report           the table of docs/preference.md, of what is finished

All start from `checkpoints/needle-slime`, see the same questions of the kinds in `KINDS` about scenes that no other
run saw, and take as many optimizer steps at the same rate; the vision tower stays as it is. `sft` goes on with the
right answers; `dpo` prefers them to the model's own wrong ones, sampled before training; `dpo_sft` adds the language
loss; `grpo` samples while it trains and is rewarded for right answers. Each finished run is a file in
benchmarks/results/needle, and is not run again.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from hires_lmm.extras import import_extra
from hires_lmm.files import write_text
from hires_lmm.training import HiResLmmCollator

from .questions import QUESTION_KINDS
from .runs import SceneSet, evaluate_packed


ROOT = Path(__file__).parents[4]
CHECKPOINT = ROOT / "checkpoints" / "needle-slime"
KINDS = ("digit_at_place", "read_number", "read_digit")
"""Those that the checkpoint answers worst (below 85 % of validation questions, see its training_log.json)."""

METHODS = ("start", "sft", "dpo", "grpo", "dpo_sft")
"""`dpo_sft` runs only where it is named."""
SAMPLES, BATCH, GENERATIONS = 8, 8, 4
"""Answers sampled a question for DPO; questions of a step; answers sampled a question in GRPO."""

TEST_SCENES = 60
SCENE_SEED = 100
"""Training scenes have a seed of their own, above that of all other runs."""

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "logging_steps": 10,
    "save_strategy": "no",
    "disable_tqdm": True,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": BATCH,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
}


MOST_VIEWS = 1_000


class ViewsOnce:
    """The forward of a frozen tower that runs each view once: batches repeat pictures, and so do policy and reference.

    Args:
        tower (`nn.Module`): The tower.
        seen (`dict`): Hidden states of views, shared by models with the same tower; forgotten when it is full.
    """

    def __init__(self, tower: Any, seen: dict[bytes, torch.Tensor]):
        self.forward, self.seen = tower.forward, seen
        tower.requires_grad_(False)
        tower.forward = self

    def __call__(self, pixel_values: torch.Tensor, **options: Any) -> BaseModelOutput:
        """Hidden states of all layers, the last one first in the output."""
        keys = [hashlib.blake2b(view.numpy().tobytes(), digest_size=16).digest() for view in pixel_values]
        if len(self.seen) > MOST_VIEWS:
            self.seen.clear()
        new = {key: row for row, key in enumerate(keys) if key not in self.seen}
        if new:
            with torch.no_grad():
                output = self.forward(pixel_values[list(new.values())], **options)
            self.seen.update(zip(new, torch.stack(output.hidden_states, dim=1), strict=True))
        states = torch.stack([self.seen[key] for key in keys], dim=1).unbind(0)
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)


def load(seen: dict[bytes, torch.Tensor]) -> Any:
    """The checkpoint, with a frozen tower."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    ViewsOnce(model.model.vision_tower, seen)
    return model


@lru_cache(maxsize=1)
def training_rows(number: int, seed: int) -> Sequence[dict[str, Any]]:
    """Questions of the kinds that are trained, one a scene: `image`, `question`, `answer`."""
    rows: list[dict[str, Any]] = []
    scenes, index = SceneSet("train", 0, SCENE_SEED + seed), 0
    while len(rows) < number:
        kind = KINDS[len(rows) % len(KINDS)]
        for question in scenes.questions(index, (kind,), 1):
            rows.append({"image": scenes.picture(index), "question": question.text, "answer": question.answer})
        index += 1
    return rows


def prompt_of(row: dict[str, Any]) -> list[dict]:
    """The user's turn, with the picture."""
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def sample_answers(model: Any, processor: Any, rows: Sequence[dict[str, Any]], seed: int) -> list[list[str]]:
    """The model's own answers at temperature 1."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(rows), BATCH):
        inputs = processor.apply_chat_template(
            [prompt_of(row) for row in rows[start : start + BATCH]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        ids = model.generate(**inputs, do_sample=True, num_return_sequences=SAMPLES, max_new_tokens=4)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[place : place + SAMPLES] for place in range(0, len(texts), SAMPLES)]
    return found


def pairs_of(rows: Sequence[dict[str, Any]], answers: list[list[str]]) -> Any:
    """The right answer, and the wrong one that was sampled most often; without a wrong one there is no pair."""
    found = []
    for row, own in zip(rows, answers, strict=True):
        wrong = [text for text in own if text.strip() != row["answer"]]
        if wrong:
            rejected = max(sorted(set(wrong)), key=wrong.count)
            found.append((row, rejected))
    return conversational(
        [row for row, _ in found],
        chosen=[[{"role": "assistant", "content": row["answer"]}] for row, _ in found],
        rejected=[[{"role": "assistant", "content": rejected}] for _, rejected in found],
    )


def conversational(rows: Sequence[dict[str, Any]], **columns: list[Any]) -> Any:
    """A `datasets.Dataset` with `prompt`, `images` and other columns."""
    datasets = import_extra("datasets", "train")
    turns = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    types = {
        name: turns if isinstance(values[0], list) else datasets.Value("string") for name, values in columns.items()
    }
    types |= {"prompt": turns, "images": datasets.List(datasets.Image())}
    columns["prompt"] = [[{"role": "user", "content": row["question"]}] for row in rows]
    columns["images"] = [[row["image"]] for row in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def reward_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the right answer, 0 for any other."""
    return [float(found[0]["content"].strip() == right) for found, right in zip(completions, answer, strict=True)]


def train(method: str, seed: int, processor: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train the checkpoint by one method; returns the model and what is worth knowing of the run."""
    seen: dict[bytes, torch.Tensor] = {}
    model = load(seen)
    trl = import_extra("trl", "train")
    rows = training_rows(options.steps * BATCH, seed)
    common = {**COMMON, "seed": seed, "max_steps": options.steps, "learning_rate": options.rate}
    if method == "sft":
        data = [{"messages": [*prompt_of(row), {"role": "assistant", "content": row["answer"]}]} for row in rows]
        args = TrainingArguments(str(options.work), **{name: common[name] for name in common})
        trainer = Trainer(model, args, train_dataset=data, data_collator=HiResLmmCollator(processor))
        trainer.train()
        return model, {"questions": len(rows)}
    common["remove_unused_columns"] = True
    if method == "grpo":
        args = trl.GRPOConfig(
            str(options.work),
            **{**common, "per_device_train_batch_size": BATCH * GENERATIONS, "remove_unused_columns": False},
            num_generations=GENERATIONS,
            max_completion_length=4,
            temperature=1.0,
            beta=0.0,
        )
        data = conversational(rows, answer=[row["answer"] for row in rows])
        trainer = trl.GRPOTrainer(
            model, reward_funcs=reward_right, args=args, train_dataset=data, processing_class=processor
        )
    else:
        kinds = ["sigmoid", "sft"] if method == "dpo_sft" else ["sigmoid"]
        args = trl.DPOConfig(str(options.work), **common, max_length=None, beta=0.1, loss_type=kinds)
        data = pairs_of(rows, sample_answers(model.eval(), processor, rows, seed))
        trainer = trl.DPOTrainer(model, load(seen), args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    return model, {"questions": len(rows), **({} if method == "grpo" else {"pairs": len(data)})}


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: training, then exact answers on scenes of the split."""
    random.seed(seed)
    torch.manual_seed(seed)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    start = time.process_time()
    model, told = (load({}), {}) if method == "start" else train(method, seed, processor, options)
    seconds = time.process_time() - start
    del model.model.vision_tower.forward
    scores = evaluate_packed(model.eval(), processor, SceneSet(options.split, options.scenes), options.work / "cache")
    groups = {
        name: [scores[kind] for kind in QUESTION_KINDS if (kind in KINDS) == (name == "trained")]
        for name in ("trained", "other")
    }
    for name, found in groups.items():
        questions, right = (sum(kind[key] for kind in found) for key in ("questions", "right"))
        scores[name] = {"questions": questions, "right": right, "accuracy": right / questions}
    return {
        "method": method,
        "seed": seed,
        "trained_kinds": list(KINDS),
        "steps": 0 if method == "start" else options.steps,
        "rate": options.rate,
        **told,
        "scores": scores,
        "processor_seconds": round(seconds, 1),
        "split": options.split,
        "scenes": options.scenes,
        "command": "python -m needle.preference",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def report(results: Path, split: str) -> str:
    """A table of the finished runs: right answers of all questions, trained kinds and others, one number a seed."""
    lines = ["| run | trained kinds | other kinds |", "|---|---|---|"]
    for method in METHODS:
        files = sorted(results.glob(f"preference-{method}-[0-9]*-{split}.json"))
        runs = [json.loads(file.read_text(encoding="utf-8"))["scores"] for file in files]
        cells = []
        for group in ("trained", "other"):
            found = ", ".join(f"{100 * scores[group]['accuracy']:.1f} %" for scores in runs)
            cells.append(f"{found} of {runs[0][group]['questions']}" if runs else "")
        lines += [f"| `{method}` | {' | '.join(cells)} |"] if runs else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS[:4], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--scenes", type=int, default=TEST_SCENES, help="scenes that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("work/preference"), help="tower features and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "needle")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        sys.stdout.write(report(options.results, options.split))
        return
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for method in options.methods:
            file = options.results / f"preference-{method}-{seed}-{options.split}.json"
            if not file.is_file() and (method != "start" or seed == options.seeds[0]):
                write_text(file, json.dumps(run(method, seed, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
