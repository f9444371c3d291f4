"""Chat templates for multimodal conversations, and the token ids that open a question and an answer.

Every template takes message contents as plain strings or as lists of parts. An image part becomes the image token, a
video part the video token, with a line break before whatever follows, as LLaVA-like models were trained. What the
assistant says, with the token that ends it, stands between generation marks, so `return_assistant_tokens_mask` finds
it.
"""

import re
from typing import Any

from .messages_hires_lmm import QUERY_TOKEN


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_CONTENT = """
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content if part and not (part['type'] == 'text' and part['text'] is none) -%}
            {%- if part['type'] in ['image', 'video'] -%}
                {%- if part['type'] == 'image' -%}
                    {{- image_token | default('<image>') -}}
                {%- else -%}
                    {{- video_token | default('<video>') -}}
                {%- endif -%}
                {%- if not loop.last and not (loop.nextitem['text'] | default('', true)).startswith('\\n') -%}
                    {{- '\\n' -}}
                {%- endif -%}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('Content parts must be text, image or video, not ' ~ part['type'] ~ '.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

_ROLES = """
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('Roles must be system, user or assistant, not ' ~ message['role'] ~ '.') -}}
{%- endif -%}
"""

_LLAMA3 = (
    _CONTENT
    + """
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ROLES
    + """
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message['content']) | trim -}}{{- '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {#- queries -#}{{- render(message['content']) | trim -}}{{- '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
)

_CHATML = (
    _CONTENT
    + """
{%- for message in messages -%}
"""
    + _ROLES
    + """
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message['content']) -}}{{- '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {#- queries -#}{{- render(message['content']) -}}{{- '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)

_VICUNA = (
    _CONTENT
    + """
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- "SYSTEM_PROMPT " -}}
{%- endif -%}
{%- for message in messages -%}
""".replace("SYSTEM_PROMPT", VICUNA_SYSTEM)
    + _ROLES
    + """
    {%- if message['role'] == 'assistant' -%}
        {{- ' ASSISTANT:' -}}
        {%- generation -%}{{- ' ' -}}{{- render(message['content']) | trim -}}{{- eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] == 'system' -%}
        {%- if render(message['content']) -%}{{- render(message['content']) ~ ' ' -}}{%- endif -%}
    {%- else -%}
        {%- if loop.previtem is defined and loop.previtem['role'] == 'user' -%}{{- ' ' -}}{%- endif -%}
        {{- 'USER: ' -}}{#- queries -#}{{- render(message['content']) | trim -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ASSISTANT:' -}}
{%- endif -%}
"""
)

_PLAIN = (
    _CONTENT
    + """
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ROLES
    + """
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message['content']) -}}{{- eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {#- queries -#}{{- render(message['content']) -}}
        {%- set own = render(message['content']) -%}
        {%- set image, video = image_token | default('<image>'), video_token | default('<video>') -%}
        {%- if not (own.endswith(image) or own.endswith(video)) -%}{{- '\\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
"""
)

CHAT_TEMPLATES: dict[str, str] = {
    "llama3": _LLAMA3.strip(),
    "vicuna": _VICUNA.strip(),
    "chatml": _CHATML.strip(),
    "plain": _PLAIN.strip(),
}
"""Name -> Jinja template: Llama-3's own format, Vicuna v1 as LLaVA and SliME use it, ChatML (Qwen and others), and
plain text without roles (an answer follows the image, or a line break after text, and ends with the end token)."""

QUERY_IN_TEMPLATES = "\\ufdd0<query>"
"""`QUERY_TOKEN` as a template writes it, within quotes."""

_LATER_TURN = "{#- queries -#}"
_QUERIES = """
{%- set turns = namespace(has_image=false) -%}
{%- macro query(message) -%}
    {%- if message['role'] == 'user' -%}
        {%- set own = namespace(has_image=false) -%}
        {%- if message['content'] is string -%}
            {%- set own.has_image = (image_token | default('<image>')) in message['content']
                or (video_token | default('<video>')) in message['content'] -%}
        {%- else -%}
            {%- for part in message['content'] | default([], true) if part and part['type'] in ['image', 'video'] -%}
                {%- set own.has_image = true -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if own.has_image -%}
            {%- set turns.has_image = true -%}
        {%- elif turns.has_image -%}
            {{- 'QUERY_TOKEN' -}}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}
""".replace("QUERY_TOKEN", QUERY_IN_TEMPLATES)


def marks_answers(template: str | dict | None) -> bool:
    """Whether a template puts what the assistant says between generation marks."""
    return re.search(r"{%-?\s*generation", str(template)) is not None


def find_template(template: str) -> str:
    """A template by its name, or the Jinja text itself."""
    if template not in CHAT_TEMPLATES and "{" not in template:
        known = ", ".join(CHAT_TEMPLATES)
        raise ValueError(f"chat_template={template!r} is no Jinja text and no known name; the names are {known}.")
    return CHAT_TEMPLATES.get(template, template)


def add_queries(template: str) -> str:
    """Let a template write `QUERY_TOKEN` at the start of each user turn that follows an image and has none."""
    if QUERY_TOKEN in template or QUERY_IN_TEMPLATES in template:
        return template
    if _LATER_TURN not in template:
        raise ValueError(
            f"This chat template does not write '{QUERY_IN_TEMPLATES}' at the start of user turns without an image, "
            f"which this model needs; pass chat_template={' or '.join(map(repr, CHAT_TEMPLATES))}, or write it into "
            "your own."
        )
    return _QUERIES.strip() + template.replace(_LATER_TURN, "{{- query(message) -}}")


_CONTINUATIONS = ("", "A", " a", "\n", "7")
"""Ways a text may go on; tokens that change with it are no part of an opening."""


def answer_prefix_ids(processor: Any) -> list[int]:
    """The token ids that open an answer, as the chat template writes them.

    Returns:
        The ids; closing white space that a tokenizer may merge with the answer is left out. Empty where a template
        opens answers with nothing (`plain`).

    Raises:
        ValueError: If there is no chat template, or its openings cannot be told from the text around them.
    """
    openings = []
    for question in ("x", "Is it?"):
        messages = [{"role": "user", "content": question}]
        before = _render_chat(processor, messages)
        opened = _render_chat(processor, messages, add_generation_prompt=True)
        openings.append((before, _added_text(before, opened)))
    return _stable_ids(processor, openings, "answer_prefix_ids")


def question_prefix_ids(processor: Any) -> list[int]:
    """The token ids that open a user's turn behind an answer; processor and errors as in `answer_prefix_ids`.

    In templates without special tokens around roles (`vicuna`) the first turn of a conversation may be written with
    other ids, because a space stands before it. Empty where a template opens turns with nothing.
    """
    marker, openings = "QQQ", []
    for answer in ("y", "No."):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        before = _render_chat(processor, messages)
        added = _added_text(before, _render_chat(processor, [*messages, {"role": "user", "content": marker}]))
        openings.append((before, added[: added.index(marker)]))
    return _stable_ids(processor, openings, "question_prefix_ids")


def _tokenizer_of(processor: Any) -> Any:
    return processor.tokenizer if hasattr(processor, "tokenizer") else processor


def _render_chat(processor: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    if processor.chat_template is None:
        raise ValueError(f"{type(processor).__name__} has no chat template; set one of {', '.join(CHAT_TEMPLATES)}.")
    return _tokenizer_of(processor).apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )


def _added_text(before: str, after: str) -> str:
    if not after.startswith(before):
        raise ValueError(f"The chat template rewrites earlier turns: {after!r} does not continue {before!r}.")
    return after[len(before) :]


def _stable_ids(processor: Any, openings: list[tuple[str, str]], name: str) -> list[int]:
    """The ids of an opening that depend neither on the text before it nor on the text behind it."""
    tokenizer, runs = _tokenizer_of(processor), []
    for before, opening in openings:
        base = tokenizer(before, add_special_tokens=False)["input_ids"]
        tails = []
        for continuation in _CONTINUATIONS:
            ids = tokenizer(before + opening + continuation, add_special_tokens=False)["input_ids"]
            tails.append(ids[len(_common_prefix([base, ids])) :])
        runs.append(_common_prefix(tails))
    stable = _common_prefix([run[::-1] for run in runs])[::-1]
    if not stable and any(opening for _, opening in openings):
        raise ValueError(f"The tokenizer merges {openings[0][1]!r} with the text around it; set {name} by hand.")
    return stable


def _common_prefix(runs: list[list[int]]) -> list[int]:
    length = 0
    while all(len(run) > length and run[length] == runs[0][length] for run in runs):
        length += 1
    return runs[0][:length]
