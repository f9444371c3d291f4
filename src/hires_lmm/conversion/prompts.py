"""What a converted model is spoken to with: tokenizer, image token, chat template, generation defaults."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

from ..processing.chat_templates_hires_lmm import answer_prefix_ids, find_template, question_prefix_ids
from .errors import readable
from .tensors import read_if_present, read_json, read_text


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
STATS = ("image_mean", "image_std", "resample")
LLAMA3_HEADER, LLAMA3_END = "<|start_header_id|>", "<|eot_id|>"
FALLBACK_PAD_TOKENS = ("<|end_of_text|>", "<|endoftext|>")


@dataclass
class PromptAssets:
    """What belongs to a model besides its weights: tokenizer, numbers of the towers, generation defaults."""

    tokenizer: Any | None = None
    image_stats: dict | None = None
    generation: dict | None = None
    extra_stats: dict[str, dict] | None = None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint, with a pad token; None where the folder has none."""
    if not has_tokenizer(folder):
        return None
    known = str(read_if_present(folder / "config.json").get("model_type")) in CONFIG_MAPPING
    with readable(f"The tokenizer in {folder.name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=None if known else PreTrainedConfig(), trust_remote_code=False
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # what is saved later names nobody's code
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = next((token for token in FALLBACK_PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.unk_token or spare
    return tokenizer


def released_template(tokenizer: Any) -> str:
    """Name of the template a released SliME model was trained with: Llama-3 has header tokens, Vicuna has not."""
    return "llama3" if LLAMA3_HEADER in tokenizer.get_vocab() else "vicuna"


def source_template(folder: Path) -> str | None:
    """The chat template that a Hugging Face checkpoint brings."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_if_present(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def prompt_settings(tokenizer: Any | None, chat_template: str | None) -> dict[str, Any]:
    """Set the chat template, and read `answer_prefix_ids` and `question_prefix_ids` from it where it shows them."""
    if tokenizer is None:
        return {}
    if chat_template is not None:
        tokenizer.chat_template = find_template(chat_template)
    if not isinstance(tokenizer.chat_template, str):
        return {}
    found = {find.__name__: _prefix_ids(find, tokenizer) for find in (answer_prefix_ids, question_prefix_ids)}
    return {name: value for name, value in found.items() if value}


def _prefix_ids(find: Callable[[Any], list[int]], tokenizer: Any) -> list[int] | None:
    """Try chats whose messages are lists of parts, then such of plain text."""
    for speaker in (_ReadsParts(tokenizer), tokenizer):
        try:
            return find(speaker)
        except Exception as error:  # a template may raise anything
            logger.debug("%s: %s", find.__name__, error)
    return None


class _ReadsParts:
    """A tokenizer whose chat template gets every text as a list of parts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = self
        self.chat_template = tokenizer.chat_template
        self._inner = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def apply_chat_template(self, messages: list[dict], **kwargs: Any) -> Any:
        parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        return self._inner.apply_chat_template(parts, **kwargs)


def generation_defaults(folder: Path | None, config: Any, tokenizer: Any | None, chat_template: str | None) -> dict:
    """Fields of `GenerationConfig`: those of a folder; the image token is suppressed, Llama-3's turns end answers."""
    values = read_if_present(folder / "generation_config.json") if folder is not None else {}
    left_out = {"_from_model_config", "transformers_version", *(() if values.get("do_sample") else SAMPLING_OPTIONS)}
    values = {name: value for name, value in values.items() if name not in left_out}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values.get(name) is None:
            values[name] = getattr(config.text_config, name)
    if tokenizer is not None:
        ends = as_list(values["eos_token_id"]) or as_list(tokenizer.eos_token_id)
        template = find_template(chat_template) if chat_template else ""
        if LLAMA3_HEADER in template and LLAMA3_END in tokenizer.get_vocab():
            ends += [tokenizer.convert_tokens_to_ids(LLAMA3_END)]
        ends = sorted(set(ends))
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        if values["pad_token_id"] is None:
            values["pad_token_id"] = tokenizer.pad_token_id
    values["suppress_tokens"] = sorted({*as_list(values.get("suppress_tokens")), config.image_token_id})
    return {name: value for name, value in values.items() if value is not None}


def as_list(value: int | list[int] | None) -> list[int]:
    """One token id or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def image_stats_of(folder: Path | None) -> dict[str, Any] | None:
    """Mean, standard deviation and filter that a folder's image processor names; None where it names none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_if_present(folder / name) if folder is not None else {}
        values = values.get("image_processor") or values
        if all(values.get(key) is not None for key in STATS):
            return {key: values[key] for key in STATS}
    return None


def without_image_token(folder: Path) -> None:
    """Take the image token out of saved tokenizer files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        values = read_json(path)
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = read_json(path)
        if isinstance(values.get("extra_special_tokens"), list):
            values["extra_special_tokens"] = [
                token for token in values["extra_special_tokens"] if token != IMAGE_TOKEN
            ]
        kept = {name: value for name, value in values.items() if name not in ("processor_class", "chat_template")}
        path.write_text(json.dumps(kept, ensure_ascii=False, indent=2), encoding="utf-8")
