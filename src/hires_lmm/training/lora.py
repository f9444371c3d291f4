"""LoRA presets for PEFT: which layers get adapters, which parts are trained and saved whole, and merging."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from .parameters import CONNECTOR_PARTS, find_base


_LANGUAGE = (
    r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"
)
_VISION = r"(.*\.)?(vision_tower|extra_towers\.\w+)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2|pwconv1|pwconv2)"
_CONNECTOR = r"(.*\.)?connector\..*\.(q_proj|k_proj|v_proj|o_proj|linear|linear_1|linear_2)"

LORA_TARGETS: dict[str, str] = {
    "language_only": _LANGUAGE,
    "language_and_vision": f"({_LANGUAGE})|({_VISION})",
    "adapters": _CONNECTOR,
}
"""Preset -> regular expression over module names: the language model (not the tower, which `q_proj` alone would also
hit), language model and all towers, or the linear layers of the connector."""


def connector_modules(model: nn.Module) -> list[str]:
    """Names of the parts of the connector that hold weights, such as `connector.adapter`, for `modules_to_save`."""
    connector = find_base(model).connector
    names = []
    for slot in CONNECTOR_PARTS:
        part = getattr(connector, slot)
        is_many = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        names += [f"{slot}.{name}" for name, _ in part.named_children()] if is_many else [slot] if part else []
    held = [name for name in names if next(connector.get_submodule(name).parameters(), None) is not None]
    return [f"connector.{name}" for name in held]


def lora_config(
    model: nn.Module, preset: str = "language_only", r: int = 128, alpha: int = 256, **options: Any
) -> Any:
    """Build a `peft.LoraConfig`.

    Args:
        model (`nn.Module`): A model of this package, not yet wrapped.
        preset (`str`): A key of `LORA_TARGETS`. The connector is trained and saved whole, except under `"adapters"`.
        r (`int`): Rank; SliME's released scripts use 128.
        alpha (`int`): Scale; SliME's released scripts use 256.
        options: More fields of `LoraConfig`; `modules_to_save` adds to the connector.

    Returns:
        The configuration, for `peft.get_peft_model(model, config)`.

    Raises:
        ValueError: If the preset is unknown.
    """
    from peft import LoraConfig

    if preset not in LORA_TARGETS:
        raise ValueError(f"Unknown LoRA preset {preset!r}; known presets: {', '.join(LORA_TARGETS)}.")
    whole = [] if preset == "adapters" else connector_modules(model)
    whole += [name for name in options.pop("modules_to_save", None) or [] if name not in whole]
    return LoraConfig(
        r=r, lora_alpha=alpha, target_modules=LORA_TARGETS[preset], modules_to_save=whole or None, **options
    )


def merge_lora(adapter_folder: str | Path, output_folder: str | Path, **options: Any) -> nn.Module:
    """Write a whole checkpoint from an adapter folder: weights with LoRA added, processor, code.

    Args:
        adapter_folder (`str`): Where PEFT or the Trainer saved the adapter; its configuration names the base model.
        output_folder (`str`): Where to write.
        options: For `from_pretrained` of the base model, such as `dtype`, `device_map`, `trust_remote_code`.

    Raises:
        ValueError: If the folder holds no adapter.
    """
    from peft import PeftConfig, PeftModel

    folder = Path(adapter_folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(adapter_folder)!r} holds no adapter_config.json; pass the folder of a LoRA checkpoint."
        )
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model = AutoModelForImageTextToText.from_pretrained(base, **options)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    merged.save_pretrained(output_folder)
    source = str(folder) if (folder / "processor_config.json").is_file() else base
    if source != base or (Path(base) / "processor_config.json").is_file():
        remote = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
        AutoProcessor.from_pretrained(source, **remote).save_pretrained(output_folder)
    return merged
