"""`compose`: a new model from a vision tower and a language model; the connector between them is untrained."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..modeling.configuration_hires_lmm import PRESETS
from ..modeling.connector_hires_lmm import HiResLmmConnector
from ..processing.processor_options_hires_lmm import choose_template
from ..processing.sequence_hires_lmm import LayoutOptions
from .configs import common_dtype
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .keys import Rename, Rule, Unused
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer
from .tensors import Entries, entry_of, folder_entries, read_json
from .towers import tower_config, tower_entries
from .writing import MAX_SHARD_BYTES, Progress


SEED = 0
VISION = "vision."
"""Put before the names of the tower, so that both models fit into one table."""

EXTRA = "extra_towers."
"""The same for the extra towers, with the name of each behind it."""

MARKS = {13: ("<0x0A>", "Ċ", "\n"), 1919: ("▁,", ","), 29892: (",",)}
"""The ids of Llama 2 that presets put between views, and what vocabularies call these tokens."""

RULES: list[Rule] = [
    Unused("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Rename("model.**", "model.language_model.**"),
    Rename("lm_head.weight", "lm_head.weight"),
    Rename(f"{VISION}**", "model.vision_tower.**"),
    Rename(f"{EXTRA}**", "model.extra_towers.**"),
]


def compose(
    vision: str | Path,
    text: str | Path,
    preset: str,
    destination: str | Path,
    dtype: str | torch.dtype | None = None,
    chat_template: str | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_towers: dict[str, str] | None = None,
    **changes: Any,
) -> dict:
    """Make an untrained model from two pretrained ones, ready for its first stage of training.

    Args:
        vision (`str` or `Path`): Folder or Hub repository of a CLIP or SigLIP model, or of its tower alone.
        text (`str` or `Path`): Folder or Hub repository of a causal language model.
        preset (`str`): A name in `hires_lmm.PRESETS`.
        destination, dtype, progress, max_shard_bytes: As in `convert`; the dtype is by default the language model's.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; by default the tokenizer's own
            if it reads images, else the one its special tokens belong to.
        extra_towers (`dict[str, str]`, *optional*): Name -> folder or Hub repository of further towers (CLIP, SigLIP,
            ConvNeXt). The tokens of one enter the sequence behind the others, unless `changes` has a `layout` or
            `map_ops` in `connector_config`.
        changes: Fields of `HiResLmmConfig` that replace those of the preset.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If the two are not what they should be or do not fit the preset.
    """
    towers = {name: str(source) for name, source in (extra_towers or {}).items()}
    read = partial(read_pair, str(vision), str(text), preset, chat_template, changes, towers)
    return convert(read, destination, dtype, progress, max_shard_bytes)


def read_pair(
    vision: str, text: str, preset: str, chat_template: str | None, changes: dict, extra_towers: dict[str, str]
) -> Source:
    """Read vision towers and a language model."""
    asked = changes.get("extra_towers") or PRESETS.get(preset, {}).get("extra_towers", {})
    if missing := [name for name in asked if name not in extra_towers]:
        raise ConversionError(
            f"The preset {preset!r} has the extra tower {missing[0]!r}, which is missing: give its folder or Hub id "
            f"as extra_towers={{{missing[0]!r}: REPO}}, on the command line as --extra-tower {missing[0]}=REPO."
        )
    tower, language = resolve_folder(vision, "The vision tower"), resolve_folder(text, "The language model")
    extra = {name: resolve_folder(source, f"The extra tower {name!r}") for name, source in extra_towers.items()}
    vision_config = tower_config(read_json(tower / "config.json"), tower.name)
    with readable("The language model"):
        text_config = AutoConfig.from_pretrained(language, trust_remote_code=False)
    if text_config.get_text_config() is not text_config:
        raise ConversionError(f"{language.name} is no plain language model, but a {text_config.model_type}.")
    tokenizer = load_tokenizer(language)
    if tokenizer is None:
        raise ConversionError(f"{language.name} has no tokenizer; a new model needs one.")
    words = folder_entries(language)
    seen = {VISION + key: entry for key, entry in tower_entries(tower).items()}
    for name, folder in extra.items():
        seen |= {f"{EXTRA}{name}.{key}": entry for key, entry in tower_entries(folder).items()}
    configs = {name: tower_config(read_json(folder / "config.json"), folder.name) for name, folder in extra.items()}
    settings = with_extra_towers(changes, configs, preset)
    if "layout" not in (changes.get("connector_config") or {}):
        settings = with_own_marks(settings, preset, tokenizer.get_vocab())
    is_tied = text_config.tie_word_embeddings or changes.get("tie_word_embeddings", False)
    return Source(
        format="compose",
        name=f"{tower.name} + {language.name}",
        summary=f"An untrained model of the preset `{preset}`: a pretrained vision tower and a pretrained language "
        "model with a new connector between them, ready for the first stage of training.",
        entries={**words, **seen},
        rules=[Unused("lm_head.weight"), *RULES] if is_tied else RULES,
        vision_config=vision_config,
        text_config=text_config,
        settings=settings,
        preset=preset,
        dtype=common_dtype(words, text_config.dtype),
        one_dtype=True,
        tokenizer=tokenizer,
        chat_template=chat_template if chat_template is not None else choose_template(tokenizer),
        image_stats=image_stats_of(tower),
        generation=language,
        new_tensors=new_connector,
        bases=[
            {"part": part, "name": name}
            for part, name in (
                ("vision tower", vision),
                *((f"extra tower {name}", source) for name, source in extra_towers.items()),
                ("language model", text),
            )
            if is_repository(name)
        ],
        report={"preset": preset},
    )


def with_extra_towers(changes: dict, configs: dict[str, Any], preset: str) -> dict:
    """The changes of a preset with extra towers, whose tokens enter where nothing else is said."""
    connector = changes.get("connector_config") or {}
    others = [name for name in configs if name not in PRESETS.get(preset, {}).get("extra_towers", {})]
    if not configs:
        return changes
    if others and not {"layout", "map_ops"} & set(connector):
        layout = PRESETS.get(preset, {}).get("connector_config", {}).get("layout", {})
        order = layout.get("order", LayoutOptions().order)
        connector = {**connector, "layout": {**layout, "order": [*order, "detail"]}}
    adapters = {**{name: {"part": "mlp"} for name in others}, **(connector.get("tower_adapters") or {})}
    towers = {name: config.to_dict() for name, config in configs.items()}
    return {**changes, "extra_towers": towers, "connector_config": {**connector, "tower_adapters": adapters}}


def with_own_marks(settings: dict, preset: str, vocabulary: dict[str, int]) -> dict:
    """The settings of a preset, the tokens that it puts between views being those of the language model."""
    connector = settings.get("connector_config") or {}
    layout = connector.get("layout") or PRESETS.get(preset, {}).get("connector_config", {}).get("layout", {})
    separators = {}
    for name, each in layout.get("separators", {}).items():
        names = [MARKS[token] for token in each.get("value", [])]
        found = [[vocabulary[word] for word in words if word in vocabulary] for words in names]
        if not all(found):
            raise ConversionError(
                f"The tokenizer has no token for the separator {name!r} of the preset {preset!r} (one of {names}); "
                "pass connector_config with a layout whose separators have ids of yours, or none."
            )
        separators[name] = {**each, "value": [ids[0] for ids in found]} if found else each
    if separators == layout.get("separators", {}):
        return settings
    return {**settings, "connector_config": {**connector, "layout": {**layout, "separators": separators}}}


def new_connector(config: Any) -> Entries:
    """A freshly initialised connector, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        connector = HiResLmmConnector(config.connector_config, config.part_context())
    tensors, note = connector.state_dict(), f"initialised with seed {SEED}"
    return {f"model.connector.{name}": entry_of(tensor, note=note) for name, tensor in tensors.items()}
