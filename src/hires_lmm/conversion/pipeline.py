"""The one way into our format: a format reads its checkpoint into a `Source`, `convert` writes it as one of ours."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..modeling.configuration_hires_lmm import HiResLmmConfig
from ..processing.processor_options_hires_lmm import place_image_token
from .cards import write_card
from .checkpoint import REPORT_NAME, UNUSED_STEM, finish_report, save_assets, save_code, versions
from .configs import common_dtype, model_shapes, parse_dtype, with_dtype
from .errors import ConversionError, readable
from .keys import Rule
from .mapping import Mapped, cast, check_complete, grow_rows, map_forward, record
from .prompts import PromptAssets, generation_defaults, prompt_settings
from .tensors import Entries
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Source:
    """A foreign checkpoint, read.

    Args:
        format (`str`): Name of the format, for the report.
        name (`str`): Name of the folder, for messages.
        summary (`str`): What the model is, for its card.
        entries (`Entries`): Its tensors.
        rules (`list[Rule]`): Its key table.
        vision_config, text_config: The configurations of tower and language model; the latter is changed.
        settings (`dict`): The other fields of `HiResLmmConfig`.
        preset (`str`, *optional*): The preset that `settings` change.
        dtype (`str` or `torch.dtype`, *optional*): What its configuration names; else the most frequent one counts.
        one_dtype (`bool`): Whether all tensors get that dtype where the caller names none.
        tokenizer (*optional*): The tokenizer; it is changed.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text for it.
        image_token_id (`int`, *optional*): The id of the image token that its configuration names.
        image_stats (`dict`, *optional*): Mean, standard deviation and filter of the vision tower.
        extra_stats (`dict`, *optional*): Name of an extra tower -> its mean and standard deviation, where they are not
            those of its family.
        generation (`Path`, *optional*): Folder whose generation configuration is taken over.
        new_tensors (`Callable`, *optional*): Gives, for our configuration, tensors that the source does not have.
        keeps_unused (`bool`): Whether a side file keeps what our model does not use, for the way back.
        tokenizers (`dict`): Further tokenizers, by the folder they are saved in.
        bases (`list[dict]`): `part` and `name` of the models it was made from, for the card.
        report (`dict`): What else the report says.
    """

    format: str
    name: str
    summary: str
    entries: Entries
    rules: list[Rule]
    vision_config: Any
    text_config: Any
    settings: dict
    preset: str | None = None
    dtype: Any = None
    one_dtype: bool = False
    tokenizer: Any | None = None
    chat_template: str | None = None
    image_token_id: int | None = None
    image_stats: dict | None = None
    extra_stats: dict[str, dict] | None = None
    generation: Path | None = None
    new_tensors: Callable[[Any], Entries] | None = None
    keeps_unused: bool = False
    tokenizers: dict[str, Any] = field(default_factory=dict)
    bases: list[dict] = field(default_factory=list)
    report: dict = field(default_factory=dict)


def convert(
    read: Callable[[], Source],
    destination: str | Path,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Write a foreign checkpoint as one of ours: weights, code, processor, card and report.

    Args:
        read (`Callable`): Reads the source; called once the destination is known to be free.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of all weights; by default every tensor keeps its own.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file; a file is held in memory while it is written.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If the source cannot be read, is not whole, or does not fit; the destination is not made then.
    """
    wanted = parse_dtype(dtype)
    with new_folder(destination) as work:
        with readable("The source"):
            source = read()
        added = _place_image_token(source)
        config = _build_config(source, wanted)
        mapped = map_forward(source.rules, source.entries)
        grow_embeddings(mapped, added)
        if source.new_tensors is not None:
            add_tensors(mapped, source.new_tensors(config))
        check_complete(mapped, model_shapes(config), source.rules, f"the source {source.name}")
        entries = cast(mapped.entries, config.dtype if source.one_dtype else wanted)
        write_tensors(work, entries, max_shard_bytes, progress)
        if mapped.unused and source.keeps_unused:
            write_tensors(work, mapped.unused, stem=UNUSED_STEM)
        for folder, tokenizer in source.tokenizers.items():
            tokenizer.save_pretrained(work / folder)
        generation = generation_defaults(source.generation, config, source.tokenizer, source.chat_template)
        assets = PromptAssets(source.tokenizer, source.image_stats, generation, source.extra_stats)
        image_processor = save_assets(work, config, assets)
        save_code(work, config)
        card = {"title": Path(destination).name, "summary": source.summary, "bases": source.bases}
        has_chat = source.tokenizer is not None
        write_card(work, config, image_processor, {**card, "chat": has_chat, "versions": versions()})
        facts = {"image_token_id": source.image_token_id, "added_rows": added, **source.report}
        report = finish_report({"conversion": source.format, "source": source.name, **facts}, mapped, entries)
        (work / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def grow_embeddings(mapped: Mapped, added: int) -> None:
    """Give the tables of embeddings their new rows."""
    for name in EMBEDDINGS:
        if name in mapped.entries and mapped.entries[name].shape:
            mapped.entries[name] = grow_rows(mapped.entries[name], mapped.entries[name].shape[0] + added)


def add_tensors(mapped: Mapped, entries: Entries) -> None:
    """Add tensors that no tensor of the source becomes."""
    mapped.entries.update(entries)
    mapped.records += [record(None, entry, (name,), "") for name, entry in entries.items()]


def _place_image_token(source: Source) -> int:
    """Settle the id of the image token: a spare row of the embeddings, else a new one. Returns the rows to add."""
    rows, named = source.text_config.vocab_size, source.image_token_id
    number = place_image_token(source.tokenizer)[1] if source.tokenizer is not None else named
    if number is not None and named not in (None, number):
        raise ConversionError(
            f"The tokenizer has the image token as id {number}, but image_token_index={named}; one of the two belongs "
            "to another checkpoint."
        )
    source.image_token_id = rows if number is None else number
    source.text_config.vocab_size = max(rows, source.image_token_id + 1)
    return source.text_config.vocab_size - rows


def _build_config(source: Source, dtype: torch.dtype | None) -> HiResLmmConfig:
    kind = dtype or common_dtype(source.entries, source.dtype)
    prompts = prompt_settings(source.tokenizer, source.chat_template)
    build = HiResLmmConfig if source.preset is None else partial(HiResLmmConfig.from_preset, source.preset)
    with readable("The configuration"):
        config = build(
            vision_config=source.vision_config,
            text_config=source.text_config,
            **{"image_token_id": source.image_token_id, **prompts, **source.settings},
        )
    return with_dtype(config, kind)
