"""`compose`: a new model from a vision tower and a language model; the connector between them is untrained."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig
from ..modeling.connector_hires_lmm import HiResLmmConnector
from ..processing.sequence_hires_lmm import LayoutOptions
from ..processing.template_choice_hires_lmm import choose_template
from ..processing.tower_table_hires_lmm import tower_family
from .configs import common_dtype, language_rules
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
        vision (`str` or `Path`): Folder or Hub repository of a vision tower, alone or in a model of image and text;
            docs/towers.md lists the families.
        text (`str` or `Path`): Folder or Hub repository of a causal language model.
        preset (`str`): A name in `hires_lmm.PRESETS`.
        destination, dtype, progress, max_shard_bytes: As in `convert`; the dtype is by default the language model's.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; by default the tokenizer's own,
            widened to images where it reads texts alone, see `choose_template`.
        extra_towers (`dict[str, str]`, *optional*): Name -> folder or Hub repository of further towers. The tokens of
            one enter the sequence behind the others, unless `changes` has a `layout` or `map_ops` in
            `connector_config`.
        changes: Fields of `HiResLmmConfig` that replace those of the preset.

    Returns:
        The report, which is also saved as `conversion_report.json`; its `choices` say what was decided and changed.

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
    choices = []
    if not tower_family(vision_config).has_layers and "vision_feature_layer" not in changes:
        changes = {**changes, "vision_feature_layer": -1}
        choices.append(f"vision_feature_layer=-1: a {vision_config.model_type} gives its last features alone")
    if note := without_quantization(text_config, words, language.name):
        choices.append(note)
    settings = with_extra_towers(changes, configs, preset)
    if "layout" not in (changes.get("connector_config") or {}):
        settings = with_own_marks(settings, preset, tokenizer.get_vocab())
    if chat_template is None:
        with readable("The configuration"):
            layout = HiResLmmConfig.from_preset(preset, vision_config, text_config, **settings).token_layout()
        chat_template, note, _ = choose_template(tokenizer, layout["later_tokens"] is not None)
        choices.append(f"chat template: {note}")
    rules = [*RULES, *language_rules(text_config)]
    is_tied = text_config.tie_word_embeddings or changes.get("tie_word_embeddings", False)
    return Source(
        format="compose",
        name=f"{tower.name} + {language.name}",
        summary=f"An untrained model of the preset `{preset}`: a pretrained vision tower and a pretrained language "
        "model with a new connector between them, ready for the first stage of training.",
        entries={**words, **seen},
        rules=[Unused(rules[-1].source), *rules] if is_tied else rules,
        vision_config=vision_config,
        text_config=text_config,
        settings=settings,
        preset=preset,
        dtype=common_dtype(words, text_config.dtype),
        one_dtype=True,
        tokenizer=tokenizer,
        chat_template=chat_template,
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
        report={"preset": preset, "choices": choices},
    )


def read_settings(preset: str, pairs: list[str]) -> dict[str, Any]:
    """Changes of a preset from texts such as `vision_feature_layer=-1` and `connector.view_ops.0.num_queries=64`.

    Args:
        pairs (`list[str]`): A field of `HiResLmmConfig`, or a path into it, and its value as JSON; else it is a text.

    Raises:
        ConversionError: If there is no such field or place.
    """
    values, changes = deepcopy(PRESETS[preset]), {}
    for pair in pairs:
        path, _, text = pair.partition("=")
        field, *steps = path.split(".")
        field = {"connector": "connector_config"}.get(field, field)
        if field in ("vision_config", "text_config"):
            raise ConversionError(f"{pair!r} changes a half, which stays as it is; set fields of the whole alone.")
        if field not in HiResLmmConfig.__dataclass_fields__ or not text:
            raise ConversionError(f"{pair!r} sets no field of HiResLmmConfig; write FIELD=VALUE.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        place: Any = values
        for key, step in zip([field, *steps], [*steps, None], strict=True):
            at: Any = int(key) if isinstance(place, list) and key.isdigit() else key
            if isinstance(place, list) and (at is key or at >= len(place)):
                raise ConversionError(f"{path}: the preset {preset!r} has {len(place)} there, counted from 0.")
            if step is None:
                place[at] = value
            else:
                place = place[at] if isinstance(place, list) else place.setdefault(at, {})
        changes[field] = values[field]
    return changes


def without_quantization(text_config: Any, words: Entries, name: str) -> str | None:
    """Take out what a quantised language model left in its configuration though its weights are whole again (GGUF)."""
    left = getattr(text_config, "quantization_config", None)
    if left is None:
        return None
    if packed := next((key for key, entry in words.items() if not entry.dtype.is_floating_point), None):
        raise ConversionError(
            f"{name} is quantised: {packed} is {words[packed].dtype}. Take the model before quantisation, or load it "
            "with dequantize=True and save it."
        )
    del text_config.quantization_config
    return f"quantization_config of the language model was DROPPED, as its weights are not quantised: {left}"


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
