"""LoRA presets for PEFT: which layers get adapters, which parts are trained and saved whole; merging and scaling."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..files import write_text
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


TRAINER_STATE = (
    *("checkpoint-*", "global_step*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"),
    *("trainer_state.json", "training_args.bin"),
)


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


def scale_adapter(adapter: Any, factor: float, output_folder: str | Path | None = None) -> Any:
    """Weigh what LoRA learnt after training: W = W_base + factor · (alpha / r) · B A.

    Alpha is changed, no weight: the change is exact, and saving, merging and reloading keep it. What an adapter saved
    whole (`modules_to_save`, such as the connector) stays as it was trained.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model, changed in place, or the folder of a saved adapter.
        factor (`float`): 0 gives the base model back, 1 changes nothing; PLLaVA takes 4 / 32.
        output_folder (`str` or `Path`, *optional*): For a folder: a new one, which gets all of it but the state of a
            Trainer.

    Returns:
        The model, or the new folder.

    Raises:
        ValueError: If the factor is no number of at least 0, or if there is no LoRA adapter that can be scaled.
        FileExistsError: If there is an `output_folder` already.

    Source: PLLaVA, huggingface.co/papers/2404.16994, section 3.4.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise ValueError(f"factor={factor!r} must be a number of at least 0, such as 0.125.")
    if isinstance(adapter, (str, Path)):
        return _scale_folder(Path(adapter), factor, output_folder)
    from peft.tuners.lora import LoraLayer

    modules = adapter.modules() if isinstance(adapter, nn.Module) else []
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"{type(adapter).__name__} holds no LoRA adapter; wrap it with peft.get_peft_model.")
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into the weights; call unmerge_adapter() before scale_adapter.")
    for config in adapter.peft_config.values():
        _check_lora(vars(config))
    for config in adapter.peft_config.values():
        _scale_alpha(vars(config), factor)
    for layer in layers:
        for alphas in (layer.lora_alpha, layer.scaling):
            alphas.update({name: value * factor for name, value in alphas.items()})
    return adapter


def _scale_folder(folder: Path, factor: float, output_folder: str | Path | None) -> Path:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no adapter_config.json; pass the folder of a LoRA checkpoint.")
    if output_folder is None:
        raise ValueError(f"output_folder=None: name a new folder for the scaled copy of {str(folder)!r}.")
    config = json.loads(file.read_text(encoding="utf-8"))
    _check_lora(config)
    _scale_alpha(config, factor)
    copied = Path(shutil.copytree(folder, output_folder, ignore=shutil.ignore_patterns(*TRAINER_STATE)))
    write_text(copied / file.name, json.dumps(config, indent=2) + "\n")
    return copied


def _check_lora(config: dict[str, Any]) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA" or config.get("use_dora"):
        named = "DoRA, which also scales the base" if kind == "LORA" else repr(kind)
        raise ValueError(f"The adapter is {named}; only what LoRA adds can be scaled.")


def _scale_alpha(config: dict[str, Any], factor: float) -> None:
    """Change the alphas of a configuration in place."""
    config["lora_alpha"] = _scaled(config["lora_alpha"], factor)
    config["alpha_pattern"] = {
        name: _scaled(alpha, factor) for name, alpha in (config.get("alpha_pattern") or {}).items()
    }


def _scaled(alpha: float, factor: float) -> float:
    """An alpha; whole numbers stay so, as PEFT writes them."""
    value = alpha * factor
    return int(value) if value == int(value) else value
