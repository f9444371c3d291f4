"""ConvNeXt towers of open_clip: their keys by the names of transformers, and their sizes, which the weights tell.

Source: github.com/mlfoundations/open_clip and timm's ConvNeXt, as MG-LLaVA loads them
(PhoenixZ810/MG-LLaVA at 27c269e, mg_llava/module/openclip_encoder.py).
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .errors import ConversionError, problem_table
from .keys import Rename, Rule
from .mapping import map_forward
from .tensors import Entries, entry_of, file_entries, read_json
from .towers import CONVOLUTIONAL, tower_config, tower_entries


FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRUNK = "visual.trunk."
_BLOCK, _LAYER = "stages.{}.blocks.{}.", "encoder.stages.{}.layers.{}."
RULES: list[Rule] = [
    Rename("stem.0.{}", "embeddings.patch_embeddings.{}"),
    Rename("stem.1.{}", "embeddings.layernorm.{}"),
    Rename("stages.{}.downsample.{}.{}", "encoder.stages.{}.downsampling_layer.{}.{}"),
    Rename(f"{_BLOCK}gamma", f"{_LAYER}layer_scale_parameter"),
    Rename(f"{_BLOCK}conv_dw.{{}}", f"{_LAYER}dwconv.{{}}"),
    Rename(f"{_BLOCK}norm.{{}}", f"{_LAYER}layernorm.{{}}"),
    Rename(f"{_BLOCK}mlp.fc1.{{}}", f"{_LAYER}pwconv1.{{}}"),
    Rename(f"{_BLOCK}mlp.fc2.{{}}", f"{_LAYER}pwconv2.{{}}"),
    Rename("head.norm.{}", "layernorm.{}"),
]


def read_convnext(folder: Path, side: int) -> tuple[Any, Entries]:
    """The configuration and the weights of a ConvNeXt in the format of open_clip or of transformers.

    Args:
        folder (`Path`): The folder.
        side (`int`): Side of the images it will see, pixels.

    Raises:
        ConversionError: If the folder holds no ConvNeXt, or one with other layers.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        config = tower_config(read_json(folder / "config.json"), folder.name)
        if config.model_type not in CONVOLUTIONAL:
            raise ConversionError(f"{folder.name} is a {config.model_type}, no ConvNeXt; pass one as extra_tower.")
        config.image_size = side
        return config, tower_entries(folder)
    trunk = {key.removeprefix(TRUNK): e for key, e in file_entries(path).items() if key.startswith(TRUNK)}
    if "stem.0.weight" not in trunk:
        raise ConversionError(f"{path.name} of {folder.name} holds no ConvNeXt: it has no {TRUNK}stem.0.weight.")
    mapped = map_forward(RULES, trunk)
    if mapped.problems:
        raise ConversionError(problem_table(f"{path.name} of {folder.name} is no plain ConvNeXt:", mapped.problems))
    found = [re.match(r"stages\.(\d+)\.blocks\.(\d+)\.gamma\Z", key) for key in trunk]
    places = sorted((int(each[1]), int(each[2])) for each in found if each)
    depths = [1 + max(block for stage, block in places if stage == number) for number in sorted(dict(places))]
    widths = [trunk[f"stages.{number}.blocks.0.gamma"].shape[0] for number in range(len(depths))]
    sizes = {"depths": depths, "hidden_sizes": widths, "num_stages": len(depths), "image_size": side}
    config = AutoConfig.for_model("convnext", **sizes)
    note = "only its pooled output would pass it; it is not used"
    norm = {"layernorm.weight": torch.ones(widths[-1]), "layernorm.bias": torch.zeros(widths[-1])}
    kind = trunk["stem.0.weight"].dtype
    absent = {key: entry_of(value.to(kind), note=note) for key, value in norm.items() if key not in mapped.entries}
    return config, {**mapped.entries, **absent}
