# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm[train]", "pyyaml"]
# ///
"""Train one stage or a whole plan with the stock Trainer.

One process:      python examples/train.py --recipe examples/recipes/slime_vicuna_7b.yaml --model MODEL --output OUT
Eight GPUs:       accelerate launch --config_file examples/configs/zero2.yaml examples/train.py ... --stage slime/I-a
Two processes on a CPU (run by the tests):
                  accelerate launch --config_file examples/configs/ddp.yaml --num_processes 2 --mixed_precision no
                  examples/train.py --recipe RECIPE --model MODEL --output OUT --set use_cpu=true --set bf16=false

MODEL is a checkpoint of this package. Each stage writes OUT/<stage>/final, from which the next one starts; finished
stages are skipped, so a plan goes on where it stopped (`--resume` also goes on inside a stage). Under FSDP and
DeepSpeed start one launch a stage with `--stage`.
"""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from hires_lmm.training import (
    HiResLmmCollator,
    Stage,
    StageCallback,
    VisionFeatureStore,
    cache_vision_features,
    get_plan,
    last_checkpoint,
    put_first,
    set_options,
)
from hires_lmm.training.arguments import build_arguments
from hires_lmm.training.collator import find_image, read_messages
from hires_lmm.training.data.cognition import build_cognition, with_cognition
from hires_lmm.training.data.conversations import load_conversations
from hires_lmm.training.lora import lora_config
from hires_lmm.training.objectives import OBJECTIVES, Objective, load_objectives
from hires_lmm.training.objectives.files import find_folder


logger = logging.getLogger("train")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file, see examples/recipes")
    parser.add_argument("--model", required=True, help="checkpoint that the first stage starts from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", help="run only this stage of the plan")
    parser.add_argument("--data", help="conversations for all stages, instead of those of the recipe")
    parser.add_argument("--image_folder", help="folder of the images of a LLaVA file")
    parser.add_argument("--features", type=Path, help="cache tower features here for stages with a frozen tower")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of TrainingArguments")
    return parser.parse_args()


def read_stages(recipe: dict) -> list[Stage]:
    """The stages of a recipe: a plan by name, or a list of stages."""
    if "plan" in recipe:
        return get_plan(recipe["plan"], recipe.get("column"), recipe.get("tower_rate"))
    return [Stage.from_dict(values) for values in recipe["stages"]]


def make_arguments(stage: Stage, recipe: dict, folder: Path, overrides: dict) -> TrainingArguments:
    """Arguments of one stage; gradient accumulation makes up the batch of Table 7."""
    values = {**recipe.get("arguments", {}), **recipe.get("stage_arguments", {}).get(stage.name, {}), **overrides}
    size = values.get("per_device_train_batch_size", 8) * PartialState().num_processes
    if stage.batch_size is not None and "gradient_accumulation_steps" not in values:
        values["gradient_accumulation_steps"] = max(1, stage.batch_size // size)
    return build_arguments(folder, **values)


def load_model(path: str, stage: Stage, folder: Path, recipe: dict) -> Any:
    """The model of the stage before; with LoRA around it where the stage says so."""
    model = AutoModelForImageTextToText.from_pretrained(path, **recipe.get("model", {}))
    if stage.lora is None:
        return model
    from peft import get_peft_model

    set_options(model, stage.settings)  # an adapter folder cannot hold them, so the base must
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            model.save_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", **recipe.get("model", {}))
    return get_peft_model(model, lora_config(model, stage.lora, **recipe.get("lora", {})))


def read_features(folder: Path | None, stage: Stage, model: Any, processor: Any, data: Any) -> Any:
    """Cached tower features of all images, written first where they are missing."""
    if folder is None or any("vision_tower" in pattern for pattern in stage.trainable):
        return None
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            parts = (p for row in data for message in read_messages(row) for p in message["content"])
            images = (image for image in map(find_image, parts) if image is not None)
            cache_vision_features(model, processor, images, folder)
    return VisionFeatureStore(folder)


def make_objectives(stage: Stage, start: str, model: Any, recipe: dict) -> dict[str, Objective]:
    """The objectives that a stage weighs and the recipe describes, as the stage before left them."""
    options = recipe.get("objectives", {})
    names = [name for name in stage.loss_weights if name in options]
    folder = find_folder(start)
    learned = load_objectives(folder) if names and folder is not None else {}
    return {name: learned.get(name) or OBJECTIVES[name].from_recipe(model, **options[name]) for name in names}


def train_stage(stage: Stage, start: str, recipe: dict, options: argparse.Namespace) -> str:
    """Run one stage; returns the folder that the next one starts from."""
    folder = options.output / stage.name
    final = folder / "final"
    if (final / "config.json").is_file() or (final / "adapter_config.json").is_file():
        logger.warning("stage %s is finished", stage.name)
        return str(final)
    overrides = yaml.safe_load("\n".join(entry.replace("=", ": ", 1) for entry in options.set)) or {}
    args = make_arguments(stage, recipe, folder, overrides)
    processor = AutoProcessor.from_pretrained(start)
    model = load_model(start, stage, folder, recipe)
    source = options.data or recipe.get("stage_data", {}).get(stage.name) or recipe["data"]
    objectives = make_objectives(stage, start, model, recipe)
    data = load_conversations(source, image_folder=options.image_folder, streaming=recipe.get("streaming", False))
    collator = HiResLmmCollator(
        processor,
        views=stage.views,
        max_image_tokens=stage.max_image_tokens,
        features=read_features(options.features, stage, model, processor, data),
        columns=[column for objective in objectives.values() for column in objective.columns()],
        **recipe.get("collator", {}),
    )
    if stage.cognition is not None:
        data = with_cognition(data, build_cognition(recipe.get("cognition", {}), processor, stage.cognition))
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        data_collator=collator,
        processing_class=processor,
        callbacks=[StageCallback(stage, objectives=objectives)],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
    put_first(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if options.resume else None)
    save_whole(trainer, final)
    return str(final)


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save beside the folder, then move: what a killed run leaves there never looks like a finished stage."""
    partial = folder.with_name(f"{folder.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        partial.replace(folder)
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    """Run the stages in order."""
    options = read_options()
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    start, finished = options.model, {}
    for stage in read_stages(recipe):
        if options.stage is None or stage.name == options.stage:
            start = finished[stage.name] = train_stage(stage, finished.get(stage.after, start), recipe, options)
    PartialState().destroy_process_group()  # else a process may abort while it ends


if __name__ == "__main__":
    main()
