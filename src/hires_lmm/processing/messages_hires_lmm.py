"""What users write, on its way through a chat template: None means absent, and text stays text.

A template writes `<image>` for an image part, `<video>` for a video part, and in some models `QUERY_TOKEN` for a later
turn. What a user writes must not be taken for any of them, so `protect_messages` puts `MARK` into it, and `drop_marks`
takes its tokens out again.
"""

import re
from typing import Any

from .video_input_hires_lmm import Video


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


VIDEO_KEYS = ("video", "url", "path")
"""Where a video part holds its video."""


def _videos(messages: Any) -> list[dict]:
    contents = [message.get("content") for message in clean_messages(messages) if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "video"]


def holds_video(messages: Any) -> bool:
    """Whether a conversation has a video part."""
    return bool(_videos(messages))


def lacks_video(messages: Any) -> bool:
    """Whether one of its video parts holds no video."""
    return any(not set(VIDEO_KEYS) & set(part) for part in _videos(messages))


def show_as_images(messages: list) -> list:
    """Messages with video parts as image parts, for a template that knows no other."""

    def change(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "video":
            return part
        found = next((part[key] for key in VIDEO_KEYS if key in part), None)
        return {"type": "image"} if found is None else {"type": "image", "image": Video(found)}

    return [
        {**message, "content": [change(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def protect_messages(messages: Any, tokens: tuple[str, ...]) -> list:
    """Messages without what is None, with marks in such tokens of text parts."""
    protected = []
    for message in clean_messages(messages):
        if isinstance(message, dict):
            content = message.get("content")
            own = protect({key: value for key, value in message.items() if key != "content"}, tokens)
            if isinstance(content, list):
                own["content"] = [part if _is_source(part) else protect(part, tokens) for part in content]
            elif "content" in message:
                own["content"] = protect(content, () if isinstance(content, str) else tokens)
            message = own
        protected.append(message)
    return protected


def _is_source(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url", "video")


def protect(value: Any, tokens: tuple[str, ...]) -> Any:
    """Texts, also in lists and dicts, with a mark in every such token and nowhere else."""
    if isinstance(value, str):
        text = value.replace(MARK, "")
        for token in tokens:
            text = text.replace(token, _marked(token))
        return text
    if isinstance(value, dict):
        return {key: protect(own, tokens) for key, own in value.items()}
    return [protect(own, tokens) for own in value] if isinstance(value, (list, tuple)) else value


def _marked(token: str) -> str:
    return token[0] + MARK + token[1:]


def drop_marks(texts: list[str], inputs: Any, tokens: tuple[str, ...], tokenizer: Any) -> None:
    """Take the tokens of marks within such tokens out of an encoding of texts, in place; padded rows keep their
    length. An encoding without offsets, of a slow tokenizer, keeps the marks."""
    marked = [_marked(token) for token in tokens]
    if not any(each in text for each in marked for text in texts) or not inputs.encodings:
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


def _kept_places(text: str, encoding: Any, marked: list[str]) -> list[int]:
    """Places of the tokens that are no mark within one of such tokens."""
    marks = {found.start() + 1 for each in marked for found in re.finditer(re.escape(each), text)}
    spans = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return [
        place
        for place, ((start, end), sequence) in enumerate(spans)
        if sequence != 0 or start not in marks or end != start + 1
    ]
