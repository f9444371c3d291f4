"""Small runs of TRL's trainers: models on disk, rows of prompts and of preferences, and quiet arguments."""

from builders.reload import CHANGES
from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


MOST_CROPS = {"max_crops": 4}
ONLINE_PRESETS = ("slime", "llava_next", "fusion", "vlsa")


def trl_parts(preset: str, seed: int = 0, **image_options):
    """A tiny model of a preset, noise and all, and its processor."""
    config = tiny_config(preset, **CHANGES.get(preset, {}))
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    most = {} if config.planner["name"] == "frames" else MOST_CROPS  # pictures that are videos of one frame
    for name, value in {**most, **image_options}.items():
        setattr(processor.image_processor, name, value)
    return tiny_model(config, seed), processor


def saved_parts(preset: str, folder, seed: int = 0, **image_options):
    """The same, loaded from a folder, which some trainers load once more."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = trl_parts(preset, seed, **image_options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder, **image_options)


def pictures(number: int, count: int = 1) -> list:
    """Pictures of different sizes."""
    return [random_image(60 + 30 * (number % 3), 80 + 40 * index, 7 * number + index) for index in range(count)]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def prompts(count: int, images: int = 1) -> list[dict]:
    """Questions about pictures of different sizes."""
    return [{"prompt": user(f"what is on table {row}"), "images": pictures(row, images)} for row in range(count)]


def preferences(images: list[int]) -> list[dict]:
    """Questions, about so many pictures each, with a better and a worse answer of different lengths."""
    answers = {"chosen": assistant("a dog"), "rejected": assistant("a cat or so")}
    return [
        {"prompt": user(f"what is on table {row}"), **answers, "images": pictures(row, n)}
        for row, n in enumerate(images)
    ]


def as_dataset(rows: list[dict]):
    """A data set of such rows, as from a file."""
    import datasets

    datasets.disable_progress_bars()
    turns = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    kinds = {
        "images": datasets.List(datasets.Image()),
        "label": datasets.Value("bool"),
        "answer": datasets.Value("string"),
    }
    features = datasets.Features({name: kinds.get(name, turns) for name in rows[0]})
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)


def trl_arguments(config_class, folder, **changes):
    """Arguments of a short quiet run on the CPU."""
    values = {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
    }
    return config_class(str(folder), **{**values, **changes})


def logged(trainer, name: str = "loss") -> list[float]:
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
