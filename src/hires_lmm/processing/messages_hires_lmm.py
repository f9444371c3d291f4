"""What users write, on its way through a chat template: None means absent, and text stays text.

A template writes `<image>` for an image part, and in some models `QUERY_TOKEN` for a later turn. What a user writes
must not be taken for either, so `protect_messages` puts `MARK` into it, and `drop_marks` takes its tokens out again.
"""

import re
from typing import Any


MARK = "\ufdd0"
"""A noncharacter of Unicode, which stands in no text; it is taken out of what users write."""

QUERY_TOKEN = MARK + "<query>"
"""What a template writes where the tokens of a later turn will stand; never a token of the vocabulary."""


def clean_messages(messages: Any) -> list:
    """New messages without what is None: keys, parts, texts. Columnar datasets put it for what a row lacks."""
    cleaned = []
    for message in messages:
        message = _without_none(message.model_dump() if hasattr(message, "model_dump") else message)
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message["content"] = [part for part in message["content"] if part is not None and not _is_empty(part)]
        if message is not None:
            cleaned.append(message)
    return cleaned


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(own) for key, own in value.items() if own is not None}
    return [_without_none(own) for own in value] if isinstance(value, (list, tuple)) else value


def _is_empty(part: Any) -> bool:
    return isinstance(part, dict) and (not part or (part.get("type") == "text" and "text" not in part))


def protect_messages(messages: Any, image_token: str | None) -> list:
    """Messages without what is None, with marks in the image tokens of text parts; none for a token of None."""
    protected = []
    for message in clean_messages(messages):
        if isinstance(message, dict):
            content = message.get("content")
            message = protect(message, image_token)
            if isinstance(content, str):
                message["content"] = protect(content, None)
            elif isinstance(content, list):
                message["content"] = [
                    part if _is_image(part) else own for part, own in zip(content, message["content"], strict=True)
                ]
        protected.append(message)
    return protected


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def protect(value: Any, image_token: str | None) -> Any:
    """Texts, also in lists and dicts, with a mark in every image token and nowhere else."""
    if isinstance(value, str):
        text = value.replace(MARK, "")
        return text.replace(image_token, _marked(image_token)) if image_token else text
    if isinstance(value, dict):
        return {key: protect(own, image_token) for key, own in value.items()}
    return [protect(own, image_token) for own in value] if isinstance(value, (list, tuple)) else value


def _marked(token: str) -> str:
    return token[0] + MARK + token[1:]


def drop_marks(texts: list[str], inputs: Any, image_token: str, tokenizer: Any) -> None:
    """Take the tokens of marks out of an encoding of texts, in place; padded rows keep their length. An encoding
    without offsets, of a slow tokenizer, keeps the marks."""
    marked = _marked(image_token)
    if not any(marked in text for text in texts) or not inputs.encodings:
        return
    padding = tokenizer.backend_tokenizer.padding or {"pad_id": 0, "pad_type_id": 0, "direction": None}
    fills = {
        "input_ids": padding["pad_id"],
        "attention_mask": 0,
        "token_type_ids": padding["pad_type_id"],
        "special_tokens_mask": 1,
        "offset_mapping": (0, 0),
    }
    samples = inputs.get("overflow_to_sample_mapping", range(len(texts)))
    kept = [
        _kept_places(texts[int(sample)], own, marked) for sample, own in zip(samples, inputs.encodings, strict=True)
    ]
    for name in fills.keys() & inputs.keys():
        rows = inputs[name].tolist() if hasattr(inputs[name], "tolist") else inputs[name]
        inputs[name] = []
        for row, places in zip(rows, kept, strict=True):
            own, fill = [row[place] for place in places], [fills[name]] * (len(row) - len(places))
            inputs[name].append({"left": fill + own, "right": own + fill}.get(padding["direction"], own))
    if "length" in inputs:
        inputs["length"] = [len(row) for row in inputs["input_ids"]]


def _kept_places(text: str, encoding: Any, marked: str) -> list[int]:
    """Places of the tokens that are no mark within an image token."""
    marks = {found.start() + 1 for found in re.finditer(re.escape(marked), text)}
    spans = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return [
        place
        for place, ((start, end), sequence) in enumerate(spans)
        if sequence != 0 or start not in marks or end != start + 1
    ]
