"""What a converted model is spoken to with: tokenizer, image token, chat template, generation defaults."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer

from ..processing.chat_templates_hires_lmm import CHAT_TEMPLATES, answer_prefix_ids, question_prefix_ids
from ..processing.processing_hires_lmm import TEMPLATE_BY_TOKEN
from .errors import ConversionError, is_panic
from .fusion_template import LLAMA2_VISION
from .rendering import foreign_template
from .tensors import check_texts, read_json, read_object, read_text, safe_path, shown


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
LLAMA3_HEADER, LLAMA3_END = "<|start_header_id|>", "<|eot_id|>"
OWN_TEMPLATES = (*CHAT_TEMPLATES.values(), LLAMA2_VISION)
IDS_LIMIT = 2**24
FALLBACK_PAD_TOKENS = ("<|end_of_text|>", "<|endoftext|>")


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        The tokenizer, with a pad token; None if the folder has none.

    Raises:
        ConversionError: If there is one that cannot be loaded.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    check_texts(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    try:
        if str(config.get("model_type")) in CONFIG_MAPPING:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = _load_alone(folder)
    except BaseException as error:  # tokenizers and their dependencies raise many types
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        text = str(error).strip().partition("\n")[0]
        raise ConversionError(f"The tokenizer in {folder.name} cannot be loaded: {text}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # what is saved later names nobody's code
    check_vocabulary(tokenizer, folder.name)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = next((token for token in FALLBACK_PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.unk_token or spare
    return tokenizer


def check_vocabulary(tokenizer: Any, name: str) -> None:
    """Refuse ids that no vocabulary has: saving a tokenizer takes memory for every id up to the highest.

    Args:
        tokenizer: The tokenizer.
        name (`str`): Where it comes from, for the message.

    Raises:
        ConversionError: If an id is above the limit.
    """
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest > IDS_LIMIT:
        raise ConversionError(f"The tokenizer in {name} has the id {highest}; ids can be at most {IDS_LIMIT}.")


def _load_alone(folder: Path) -> Any:
    """Load a tokenizer without the model's configuration beside it, whose type the library does not know."""
    with tempfile.TemporaryDirectory() as alone:
        for pattern in ("*token*", "vocab*", "merges.txt", "chat_template*"):
            for path in folder.glob(pattern):
                if path.is_file():
                    shutil.copyfile(safe_path(folder, path.name), Path(alone) / path.name)
        return AutoTokenizer.from_pretrained(alone, trust_remote_code=False)


def place_image_token(tokenizer: Any | None, rows: int) -> tuple[int, int]:
    """Find an id for the image token.

    Args:
        tokenizer (*optional*): The tokenizer; the token is added to it where it is missing.
        rows (`int`): Rows of the table of embeddings.

    Returns:
        The id, and the rows the table needs: as many as it has if one is spare, else one more.
    """
    if tokenizer is None:
        return rows, rows + 1
    token = tokenizer.image_token if hasattr(tokenizer, "image_token") else IMAGE_TOKEN
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    number = tokenizer.convert_tokens_to_ids(token)
    return number, max(rows, number + 1)


def released_template(tokenizer: Any) -> str:
    """The chat template a released SliME model was trained with.

    Args:
        tokenizer: Its tokenizer; Llama-3's has header tokens, Vicuna's has not.

    Returns:
        A name in `CHAT_TEMPLATES`.
    """
    return "llama3" if LLAMA3_HEADER in tokenizer.get_vocab() else "vicuna"


class _Speaker:
    """A tokenizer with the chat template of a checkpoint, which may run elsewhere and may read lists of parts only."""

    def __init__(self, tokenizer: Any, render: Callable[..., str], as_parts: bool):
        self.tokenizer = self
        self.chat_template = tokenizer.chat_template
        self._tokenizer, self._render, self._as_parts = tokenizer, render, as_parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, **_: Any) -> str:
        if self._as_parts:
            messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        return self._render(messages, add_generation_prompt=add_generation_prompt)


@contextmanager
def _renderer(tokenizer: Any) -> Iterator[Callable[..., str]]:
    """A function that renders chats: templates of unknown origin run in a process of their own."""
    template = tokenizer.chat_template
    if template in OWN_TEMPLATES:
        yield partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        return
    with foreign_template(template, tokenizer.special_tokens_map) as foreign:
        yield foreign.render


def _ids(find: Callable[[Any], list[int]], tokenizer: Any, render: Callable[..., str]) -> list[int] | None:
    for as_parts in (True, False):
        try:
            return find(_Speaker(tokenizer, render, as_parts)) or None
        except ConversionError:
            raise
        except Exception as error:  # a template may raise anything
            logger.debug("%s: %s", find.__name__, error)
    return None


def prompt_settings(tokenizer: Any | None, chat_template: str | None) -> dict[str, Any]:
    """Set the chat template and read from it what opens answers and questions.

    Args:
        tokenizer (*optional*): The tokenizer; it is changed.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text.

    Returns:
        The fields `answer_prefix_ids` and `question_prefix_ids` of the configuration, as far as they can be told.

    Raises:
        ConversionError: If a template of unknown origin wants more time or memory than a chat template may have.
    """
    if tokenizer is None:
        return {}
    if chat_template is not None:
        tokenizer.chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
    if not isinstance(tokenizer.chat_template, str):
        return {}
    with _renderer(tokenizer) as render:
        found = {
            "answer_prefix_ids": _ids(answer_prefix_ids, tokenizer, render),
            "question_prefix_ids": _ids(question_prefix_ids, tokenizer, render),
        }
    return {name: value for name, value in found.items() if value is not None}


def source_template(folder: Path) -> str | None:
    """The chat template a Hugging Face checkpoint brings.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        Jinja text, or None.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, str):
            return template
    return None


def generation_defaults(folder: Path | None, config: Any, tokenizer: Any | None, chat_template: str | None) -> dict:
    """The generation configuration of a converted model.

    Args:
        folder (`Path`, *optional*): A checkpoint whose `generation_config.json` is taken over.
        config (`HiResLmmConfig`): The configuration.
        tokenizer (*optional*): The tokenizer.
        chat_template (`str`, *optional*): Name of the template.

    Returns:
        Fields of `GenerationConfig`; the image token is suppressed, and Llama-3 turns end the answer.
    """
    path = folder / "generation_config.json" if folder is not None else None
    values = read_json(path) if path is not None and path.is_file() else {}
    for name in ("_from_model_config", "transformers_version"):
        values.pop(name, None)
    if not values.get("do_sample", False):
        values = {name: value for name, value in values.items() if name not in SAMPLING_OPTIONS}
    text = config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values.get(name) is None:
            values[name] = getattr(text, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
        check_ids(name, values.get(name))
    if tokenizer is not None:
        ends = as_list(values["eos_token_id"]) or as_list(tokenizer.eos_token_id)
        if chat_template == "llama3" and LLAMA3_END in tokenizer.get_vocab():
            ends += [tokenizer.convert_tokens_to_ids(LLAMA3_END)]
        ends = sorted(set(ends))
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        if values["pad_token_id"] is None:
            values["pad_token_id"] = tokenizer.pad_token_id
    suppressed = [*as_list(values.get("suppress_tokens")), config.image_token_id]
    values["suppress_tokens"] = sorted(set(suppressed))
    return {name: value for name, value in values.items() if value is not None}


def check_ids(name: str, value: Any) -> None:
    """Refuse what are no token ids.

    Args:
        name (`str`): Name of the option.
        value: An id, a list of ids, or None.

    Raises:
        ConversionError: If it is anything else.
    """
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise ConversionError(f"{name}={shown(value)} of generation_config.json or config.json must be token ids.")


def as_list(value: int | list[int] | None) -> list[int]:
    """One id or several as a list.

    Args:
        value: An id, a list of ids, or None.
    """
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def image_stats_of(folder: Path | None) -> dict[str, Any] | None:
    """Mean, standard deviation and filter that a folder's image processor names.

    Args:
        folder (`Path`, *optional*): A checkpoint or a vision tower.

    Returns:
        `image_mean`, `image_std`, `resample`; None where the folder has no such file.
    """
    if folder is None:
        return None
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        values = read_object(values, "image_processor", name) or values
        if all(values.get(key) is not None for key in ("image_mean", "image_std", "resample")):
            return {key: values[key] for key in ("image_mean", "image_std", "resample")}
    return None


def without_image_token(folder: Path) -> None:
    """Take the image token out of saved tokenizer files.

    Args:
        folder (`Path`): A folder with `tokenizer.json` and `tokenizer_config.json`.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        values = read_json(path)
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != IMAGE_TOKEN]
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = read_json(path)
        extra = values.get("extra_special_tokens")
        if isinstance(extra, list):
            values["extra_special_tokens"] = [token for token in extra if token != IMAGE_TOKEN]
        added = values.get("added_tokens_decoder", {})
        for number in [number for number, token in added.items() if token.get("content") == IMAGE_TOKEN]:
            del added[number]
        for name in ("auto_map", "processor_class", "chat_template"):
            values.pop(name, None)
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")


def choose_template(tokenizer: Any) -> str:
    """The chat template for a tokenizer that comes from a text model.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Its own template if that reads images, else the name of the one its special tokens belong to, else `"plain"`.
    """
    own = tokenizer.chat_template
    if isinstance(own, str) and "'image'" in own.replace('"', "'"):
        return own
    vocabulary = tokenizer.get_vocab()
    return next((name for token, name in TEMPLATE_BY_TOKEN.items() if token in vocabulary), "plain")
