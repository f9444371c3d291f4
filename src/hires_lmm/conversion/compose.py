"""`compose`: a new model from a vision tower and a language model; the connector between them is untrained."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..modeling.configuration_hires_lmm import HiResLmmConfig
from ..modeling.connector_hires_lmm import HiResLmmConnector
from .checkpoint import (
    Speech,
    build_config,
    common_dtype,
    model_shapes,
    parse_dtype,
    stamped,
    write_checkpoint,
)
from .convert_slime import grown
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .keys import Aside, Rename, Rule
from .mapping import Mapped, cast, check_complete, map_forward
from .prompts import (
    choose_template,
    generation_defaults,
    image_stats_of,
    load_tokenizer,
    place_image_token,
    prompt_settings,
)
from .tensors import Entries, entry_of, folder_entries, read_json, release
from .towers import tower_config, tower_entries
from .writing import MAX_SHARD_BYTES, Progress, new_folder


SEED = 0
VISION = "vision."
"""Put before the names of the tower, so that both halves fit into one table."""

RULES: list[Rule] = [
    Aside("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Rename("model.**", "model.language_model.**"),
    Rename("lm_head.weight", "lm_head.weight"),
    Rename(f"{VISION}**", "model.vision_tower.**"),
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
    **changes: Any,
) -> dict:
    """Make an untrained model from two pretrained halves, ready for its first stage of training.

    Args:
        vision (`str` or `Path`): Folder or Hub repository of a CLIP or SigLIP model, or of its tower alone.
        text (`str` or `Path`): Folder or Hub repository of a causal language model.
        preset (`str`): A name in `hires_lmm.PRESETS`.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of all weights; by default the language model's.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; by default the tokenizer's own
            if it reads images, else the one its special tokens belong to.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.
        changes: Fields of `HiResLmmConfig` that replace those of the preset.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If the halves are not what they should be or do not fit the preset.
    """
    wanted = parse_dtype(dtype)
    with new_folder(destination) as work:
        try:
            halves = _Halves(str(vision), str(text))
            return _compose(
                halves, preset, work, wanted, chat_template, progress, max_shard_bytes, changes, destination
            )
        finally:
            release()


class _Halves:
    """The two sources: folders, configurations, tensors."""

    def __init__(self, vision: str, text: str):
        self.vision_name, self.text_name = vision, text
        self.vision = resolve_folder(vision, "The vision tower")
        self.text = resolve_folder(text, "The language model")
        self.vision_config = tower_config(read_json(self.vision / "config.json"), self.vision.name)
        self.text_config = build_config(
            AutoConfig.from_pretrained,
            "The language model",
            pretrained_model_name_or_path=self.text,
            trust_remote_code=False,
        )
        if self.text_config.get_text_config() is not self.text_config:
            raise ConversionError(f"{self.text.name} is no plain language model, but a {self.text_config.model_type}.")
        self.entries: Entries = folder_entries(self.text)
        self.dtype = common_dtype(self.entries, self.text_config.dtype)
        tower = {VISION + key: entry for key, entry in tower_entries(self.vision).items()}
        self.entries = {**self.entries, **tower}

    def bases(self) -> list[dict]:
        """Rows for the model card."""
        named = (("vision tower", self.vision_name), ("language model", self.text_name))
        return [
            {"part": part, "name": name} for part, name in named if is_repository(name) and not Path(name).is_dir()
        ]


def _compose(
    halves: _Halves,
    preset: str,
    work: Path,
    dtype: torch.dtype | None,
    chat_template: str | None,
    progress: Progress | None,
    max_shard_bytes: int,
    changes: dict,
    destination: str | Path,
) -> dict:
    tokenizer = load_tokenizer(halves.text)
    if tokenizer is None:
        raise ConversionError(f"{halves.text.name} has no tokenizer; a new model needs one.")
    text_config = halves.text_config
    rows = text_config.vocab_size
    image_token_id, text_config.vocab_size = place_image_token(tokenizer, rows)
    template = chat_template if chat_template is not None else choose_template(tokenizer)
    preset_config = build_config(
        HiResLmmConfig.from_preset,
        f"The preset {preset!r}",
        name=preset,
        vision_config=halves.vision_config,
        text_config=text_config,
        **{"image_token_id": image_token_id, **prompt_settings(tokenizer, template), **changes},
    )
    kept = dtype or halves.dtype
    ours = stamped(preset_config, kept)
    shapes = model_shapes(ours)
    entries = {key: entry for key, entry in halves.entries.items() if not _is_unused_head(key, shapes)}
    rules = [Aside("lm_head.weight"), *RULES] if ours.tie_word_embeddings else RULES
    mapped = grown(map_forward(rules, entries), text_config.vocab_size - rows)
    mapped.aside.clear()
    add_connector(mapped, ours)
    check_complete(mapped, shapes, rules, "the two halves")
    speech = Speech(tokenizer, image_stats_of(halves.vision), None)
    speech.generation = generation_defaults(halves.text, ours, tokenizer, template)
    report = {
        "conversion": "compose",
        "vision": halves.vision.name,
        "text": halves.text.name,
        "preset": preset,
        "image_token_id": image_token_id,
        "added_rows": text_config.vocab_size - rows,
    }
    card = {
        "title": Path(destination).name,
        "summary": f"An untrained model of the preset `{preset}`: a pretrained vision tower and a pretrained language "
        "model with a new connector between them, ready for the first stage of training.",
        "bases": halves.bases(),
    }
    return write_checkpoint(
        work, ours, mapped, cast(mapped.entries, kept), speech, report, card, max_shard_bytes, progress
    )


def _is_unused_head(key: str, shapes: dict) -> bool:
    """Whether a tensor belongs to a pooling head that the tower is configured without."""
    return key.startswith(f"{VISION}head.") and f"model.vision_tower.{key.removeprefix(VISION)}" not in shapes


def add_connector(mapped: Mapped, config: Any) -> None:
    """Add a freshly initialised connector, the same every time.

    Args:
        mapped (`Mapped`): The tensors; changed in place.
        config (`HiResLmmConfig`): The configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        connector = HiResLmmConnector(config.connector_config, config.part_context())
    for name, tensor in connector.state_dict().items():
        key = f"model.connector.{name}"
        mapped.entries[key] = entry_of(tensor, "")
        mapped.records.append(
            {
                "source": None,
                "file": "",
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "targets": [key],
                "transformation": f"initialised with seed {SEED}",
            }
        )
