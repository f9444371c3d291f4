"""`convert mg-llava` and `to-mg-llava`: MG-LLaVA's weights, one `.pth` of xtuner beside the models it builds on.

Source: github.com/PhoenixZ810/MG-LLaVA at 3237152, mg_llava/module/fuse_model.py (DualPathFuseModule) and the
configurations below mg_llava/config.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..processing.tower_table_hires_lmm import known_stats
from .checkpoint import REPORT_NAME
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .keys import Rename, Rule, Unsqueeze, Unused
from .llava_keys import OURS, mlp_rules, renames
from .llava_templates import template_of_xtuner
from .open_clip import read_convnext
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer
from .tensors import Entries, file_entries, folder_entries, read_if_present, read_json, weight_files
from .to_llava import added_rows, back_report, map_back, read_own_config, write_json
from .towers import tower_config, tower_entries
from .writing import Progress, new_folder


TOWER = "hires"
SECOND_SIDE = 768
CLIP = "openai/clip-vit-large-patch14-336"
CONVNEXT = "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
WEIGHTS = "mg_llava.pth"
_GATE = f"{OURS}view_ops.1."

RULES: list[Rule] = [
    Unused("llm.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Unused("visual_encoder.vision_model.embeddings.position_ids"),
    Rename("llm.model.**", "model.language_model.**"),
    Rename("llm.lm_head.weight", "lm_head.weight"),
    *mlp_rules("projector.model.", f"{OURS}adapter.mlp."),
    *mlp_rules("bbox_projector.model.", f"{OURS}tower_adapters.objects.mlp."),
    *renames(
        "fuse_module.",
        _GATE,
        {
            "slow_conv.{}": "other_conv.{}",
            "slow_proj.{}": "other_proj.{}",
            "fast_conv.{}": "main_conv.{}",
            "fast_proj.{}": "main_proj.{}",
            "gate.0.bias": "gate_1.bias",
            "gate.2.bias": "gate_2.bias",
        },
    ),
    Unsqueeze("fuse_module.gate.0.weight", f"{_GATE}gate_1.weight", axes=2),
    Unsqueeze("fuse_module.gate.2.weight", f"{_GATE}gate_2.weight", axes=2),
    Rename("visual_encoder.vision_model.**", "model.vision_tower.**"),
    Rename(f"visual_encoder_aux.{TOWER}.**", f"model.extra_towers.{TOWER}.**"),
]
"""The last rule's foreign names are ours alone: the released file never holds the second tower."""


def convert_mg_llava(
    source: str | Path,
    destination: str | Path,
    base: str | Path | None = None,
    vision_config: str | Path | None = None,
    extra_tower: str | Path | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> dict:
    """Convert a released MG-LLaVA checkpoint.

    Args:
        source (`str` or `Path`): The `.pth` file, or a folder with one or with safetensors of the same keys.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        base (`str` or `Path`): Folder or repository of the language model; it gives configuration and tokenizer, and
            the weights of a stage that did not train it.
        vision_config (`str` or `Path`, *optional*): Folder or repository of the CLIP; the published one by default.
        extra_tower (`str` or `Path`, *optional*): The same of the ConvNeXt, as open_clip or transformers saves it.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; by default that of xtuner.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If anything is unknown, absent or does not fit; the destination is not made then.
    """
    names = {"language model": base, "vision tower": vision_config or CLIP, "second tower": extra_tower or CONVNEXT}
    return convert(partial(read_mg_llava, source, names, chat_template), destination, **options)


def read_mg_llava(source: str | Path, names: dict[str, Any], chat_template: str | None) -> Source:
    """Read a released checkpoint and the models beside it, by what they are."""
    if names["language model"] is None:
        raise ConversionError("The released file does not name the language model it was trained on; pass base.")
    path, entries = _read_weights(source)
    released = sorted(entries)
    language, tower, second = (resolve_folder(name, f"The {what}") for what, name in names.items())
    with readable("The language model"):
        text_config = AutoConfig.from_pretrained(language, trust_remote_code=False)
    if not any(key.startswith("llm.") for key in entries):
        entries = {**{f"llm.{key}": entry for key, entry in folder_entries(language).items()}, **entries}
    if not any(key.startswith("visual_encoder.") for key in entries):
        seen = {f"visual_encoder.vision_model.{key}": entry for key, entry in tower_entries(tower).items()}
        entries = {**entries, **seen}
    convnext, second_entries = read_convnext(second, SECOND_SIDE)
    entries |= {f"visual_encoder_aux.{TOWER}.{key}": entry for key, entry in second_entries.items()}
    tokenizer = load_tokenizer(language)
    if tokenizer is None:
        raise ConversionError(f"{language.name} has no tokenizer; pass the whole language model as base.")
    vision_config = tower_config(read_json(tower / "config.json"), tower.name)
    stats = image_stats_of(tower) or known_stats(vision_config) or {}
    return Source(
        format="mg-llava",
        name=path.name,
        summary="An MG-LLaVA model in the format of hires_lmm, converted from the released format.",
        entries=entries,
        rules=RULES,
        vision_config=vision_config,
        text_config=text_config,
        settings={"planner": {"square": "pad"}, "extra_towers": {TOWER: convnext.to_dict()}},
        preset="mg_llava",
        tokenizer=tokenizer,
        chat_template=chat_template or template_of_xtuner(tokenizer),
        image_stats=stats,
        extra_stats={TOWER: {key: list(stats[key]) for key in ("image_mean", "image_std")}},
        generation=language,
        keeps_unused=True,
        bases=[{"part": part, "name": name} for part, name in names.items() if is_repository(name)],
        report={
            "keys_from": "PhoenixZ810/MG-LLaVA at 3237152, mg_llava/module/fuse_model.py",
            "released_keys": released,
        },
    )


def _read_weights(source: str | Path) -> tuple[Path, Entries]:
    """The released file, or folder, and its tensors."""
    path = Path(source).expanduser()
    if not path.is_file():
        path = resolve_folder(source, "The source")
        files = sorted(path.glob("*.pth"))
        if len(files) > 1:
            raise ConversionError(
                f"{path.name} has the files {', '.join(file.name for file in files)}; pass one of them as the source."
            )
        if not files and not weight_files(path)[0]:
            raise ConversionError(f"{path.name} has no *.pth nor model*.safetensors; download the file and pass it.")
        path = files[0] if files else path
    entries = file_entries(path) if path.is_file() else folder_entries(path)
    if not any(key.startswith("fuse_module.") for key in entries):
        raise ConversionError(
            f"{path.name} is no MG-LLaVA checkpoint: it has no fuse_module. A folder that xtuner converted to Hugging "
            "Face format holds the language model alone."
        )
    return path, entries


def convert_to_mg_llava(
    source: str | Path, destination: str | Path, progress: Progress | None = None, max_shard_bytes: int | None = None
) -> dict:
    """Convert a checkpoint of ours to the released format; after `convert_mg_llava` every tensor is as it was.

    The file is written in one piece, so all its tensors are in memory at once. Towers are not in it unless they were:
    the released code reads them from their own folders.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make, with `mg_llava.pth`.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`, *optional*): Has no effect.

    Raises:
        ConversionError: If the model has parts that the released code does not have.
    """
    with new_folder(destination) as work:
        folder = resolve_folder(source, "The source")
        config, earlier = read_own_config(folder), read_if_present(folder / REPORT_NAME)
        _check_parts(config)
        rows = config.text_config.vocab_size - added_rows(config, earlier)
        mapped = map_back(folder_entries(folder), RULES, config, rows, folder)
        released = earlier.get("released_keys") or [key for key in mapped.entries if not key.startswith("visual_")]
        mapped.records = [record for record in mapped.records if record["source"] in released]
        mapped.entries = {key: entry for key, entry in mapped.entries.items() if key in released}
        tensors = {}
        for number, (key, entry) in enumerate(mapped.entries.items()):
            tensors[key] = entry.read().contiguous()
            if progress is not None:
                progress(number + 1, len(mapped.entries), key)
        torch.save({"state_dict": tensors}, work / WEIGHTS)
        report = back_report("to-mg-llava", folder, mapped)
        write_json(work / REPORT_NAME, report)
    return report


def _check_parts(config: Any) -> None:
    """Refuse a model with other parts than the released one."""
    connector = config.connector_config
    found = {
        "square of the planner": config.planner.get("square"),
        "vision_feature_layer": config.vision_feature_layer,
        "extra towers": list(config.extra_towers or {}),
        "view_ops": [op["part"] for op in connector.view_ops],
        "adapter": connector.adapter["part"],
        **{name: getattr(connector, name) for name in ("map_ops", "token_ops", "layer_ops", "position_plan", "heads")},
    }
    wanted = {"square of the planner": "pad", "vision_feature_layer": -2, "extra towers": [TOWER]}
    wanted |= {"view_ops": ["object_tokens", "conv_gate"], "adapter": "mlp"}
    for name, value in found.items():
        if (value or None) != wanted.get(name):
            raise ConversionError(
                f"The released MG-LLaVA code cannot express {name}={value!r} of this model; there it is "
                f"{wanted.get(name)!r}."
            )
