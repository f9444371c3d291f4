"""Model cards of the folders that a Trainer saves: the whole model, or an adapter for one."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..conversion.cards import write_card
from ..files import write_text
from ..modeling.configuration_hires_lmm import HiResLmmConfig


MARK = "<!-- Written when the trained model was saved. A card without this line is left as it is. -->"
BLANK = "[More Information Needed]"
"""Stands in the empty card that PEFT writes."""

ORIGIN = re.compile("Trained from `(.+?)`")
ADAPTER_FIELDS = ("peft_type", "r", "lora_alpha", "num_virtual_tokens", "target_modules", "modules_to_save")

LOAD = {
    "model": """from transformers import AutoModelForImageTextToText

folder = "."  # this folder, or its name on the Hub
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

folder = "."  # this folder, or its name on the Hub
base = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, folder)""",
}


def describe_model(model: Any, folder: str | Path) -> None:
    """Write the card of a trained model, as far as the model knows; its `save_pretrained` calls this."""
    folder, text = Path(folder), _read(Path(folder))
    was_trained = model.config.training_stage is not None or getattr(model, "_is_accelerate_prepared", False)
    if was_trained and (not text or MARK in text) and (folder / "config.json").is_file():
        base = None if model.name_or_path in ("", "None", str(folder)) else model.name_or_path
        _write_short(folder, LOAD["model"], "transformers", base, _training(model.config, base))


def describe_folder(processor: Any, folder: str | Path) -> None:
    """Complete the card beside which a processor was saved; its `save_pretrained` calls this."""
    folder, text = Path(folder), _read(Path(folder))
    if (folder / "adapter_config.json").is_file() and (not text or MARK in text or BLANK in text):
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path") or "the base model"
        fields = [f"* {name}: `{adapter[name]}`" for name in ADAPTER_FIELDS if adapter.get(name)]
        training = "\n".join([f"An adapter for `{base}`.", "", *fields])
        _write_short(folder, LOAD["adapter"].format(base=base), "peft", base, training)
    elif MARK in text:
        config = HiResLmmConfig.from_pretrained(folder)
        told = ORIGIN.search(text)
        base = told[1] if told else None
        facts = {
            "title": folder.resolve().name,
            "repository": ".",
            "bases": [{"part": "all", "name": base}] if _is_on_hub(base) else [],
            "training": _training(config, base),
            "versions": _versions(),
        }
        write_card(folder, config, processor.image_processor, facts)
        write_text(folder / "README.md", f"{_read(folder).rstrip()}\n\n{MARK}\n")


def _read(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _is_on_hub(base: str | None) -> bool:
    """Whether a name is that of a repository; the Hub takes no other as base model."""
    return base is not None and base.count("/") == 1 and not Path(base).exists()


def _training(config: Any, base: str | None) -> str:
    """What is known of the training, in sentences."""
    origin = [f"Trained from `{base}`."] if base else []
    return " ".join(origin + ([f"Weights of the stage `{config.training_stage}`."] if config.training_stage else []))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("hires_lmm", "transformers", "torch")}


def _write_short(folder: Path, code: str, library: str, base: str | None, training: str) -> None:
    """Write a card that needs no image processor."""
    data = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=["hires_lmm"],
    )
    if (folder / "processor_config.json").is_file():
        code = f"{code}\nprocessor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)"
        code = code.replace("AutoModelForImageTextToText\n", "AutoModelForImageTextToText, AutoProcessor\n", 1)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.resolve().name}",
        "A high-resolution multimodal model for transformers.",
        f"## Use\n\n```python\n{code}\n```",
        f"## Training\n\n{training}" if training else "",
        "## Versions\n\n" + "\n".join(f"* {name} {number}" for name, number in _versions().items()),
        MARK,
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
