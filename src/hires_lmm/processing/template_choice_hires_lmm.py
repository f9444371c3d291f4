"""The chat template for a language model that gets images: its tokenizer's own, as far as that goes."""

import json
from typing import Any, NamedTuple

from .chat_templates_hires_lmm import _CONTENT, CHAT_TEMPLATES, marks_answers


TEMPLATE_BY_TOKEN = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}
LOOP = "{%- for message in messages -%}"

_FLATTEN = (
    _CONTENT
    + """
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or not message['content'] -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set flat.messages = flat.messages + [dict(message, content=render(message['content']))] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
).strip()
"""Put before a template of texts: it then gets every message as one text, images as their tokens."""

_USER, _ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
_RULE = {"role": "system", "content": "Be kind."}
PROBES: tuple[tuple[list[dict], bool], ...] = (
    ([_USER], False),
    ([_USER], True),
    ([_USER, _ANSWER, _USER], True),
    ([_RULE, _USER], True),
)
"""Conversations by which templates are compared, and whether an answer is opened at their end."""


class TemplateChoice(NamedTuple):
    """A name in `CHAT_TEMPLATES` or a Jinja text; in words, what became of the tokenizer's own; whether it changed."""

    template: str
    note: str
    is_changed: bool = False


def choose_template(tokenizer: Any, needs_queries: bool = False) -> TemplateChoice:
    """The chat template for a text model.

    Its own, if that reads images. Else one of `CHAT_TEMPLATES`, with the tokenizer's own system text, if it writes the
    same of texts: it marks what the assistant says as well. Else its own behind a head that turns images into tokens.

    Args:
        needs_queries (`bool`): Whether it has to write query tokens into later turns, as `CHAT_TEMPLATES` can.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own  # of several by name, the one for plain chats
    if isinstance(own, str) and shows_images(tokenizer, own):
        return TemplateChoice(own, "the tokenizer's own, which reads images")
    vocabulary = tokenizer.get_vocab()
    likely = next((name for token, name in TEMPLATE_BY_TOKEN.items() if token in vocabulary), "plain")
    if not isinstance(own, str):
        return TemplateChoice(likely, f"the tokenizer has none, so {likely} was taken by its special tokens")
    for name in dict.fromkeys((likely, *CHAT_TEMPLATES)):
        opening = own_opening(tokenizer, CHAT_TEMPLATES[name])
        if opening is None:
            continue
        tools = "; tools, which the tokenizer's own reads, are left out" if "tools" in own else ""
        if not opening:
            return TemplateChoice(name, f"{name}, which writes what the tokenizer's own writes{tools}")
        note = f"{name} with what the tokenizer's own writes first, {opening!r}; of texts both write the same{tools}"
        return TemplateChoice(with_opening(CHAT_TEMPLATES[name], opening), note)
    if needs_queries:
        note = f"REPLACED by {likely}: the tokenizer's own has no place for the query tokens of later turns"
        return TemplateChoice(likely, note, is_changed=True)
    note = "the tokenizer's own, WIDENED to images"
    if not marks_answers(own):
        note += "; it does not mark answers, so training needs another: pass chat_template"
    return TemplateChoice(_FLATTEN + own, note, is_changed=True)


def shows_images(tokenizer: Any, template: str) -> bool:
    """Whether a template writes the image token for an image part."""
    token = tokenizer.image_token if hasattr(tokenizer, "image_token") else "<image>"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    return token in (_render(tokenizer, template, chat, False) or "")


def with_opening(template: str, opening: str) -> str:
    """A template of ours that opens chats without a system message with a text."""
    quoted = json.dumps(opening, ensure_ascii=False)
    head = f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {quoted} -}}}}{{%- endif -%}}"
    return template.replace(LOOP, f"{head}\n{LOOP}", 1)


def own_opening(tokenizer: Any, template: str) -> str | None:
    """What the tokenizer's template writes before chats without a system message; None where the rest differs too."""
    rest, whole = _render(tokenizer, template, *PROBES[0]), _render(tokenizer, None, *PROBES[0])
    if whole is None or rest is None:
        return None
    bos = tokenizer.bos_token or ""
    bos = bos if bos and whole.startswith(bos) and rest.startswith(bos) else ""
    if not whole.endswith(rest[len(bos) :]):
        return None
    opening = whole[len(bos) : len(whole) - len(rest) + len(bos)]
    opened = with_opening(template, opening) if opening else template
    if all(_render(tokenizer, opened, *probe) == _render(tokenizer, None, *probe) for probe in PROBES):
        return opening
    return None


def _render(tokenizer: Any, template: str | None, messages: list[dict], opens: bool) -> str | None:
    """What a template, by default the tokenizer's own, writes; None where it refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=opens, tokenize=False
        )
    except Exception:  # a template may raise anything
        return None
