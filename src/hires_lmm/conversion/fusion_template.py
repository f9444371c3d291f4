"""The prompt of the released fusion models, as a chat template."""

from ..processing.chat_templates_hires_lmm import QUERY_IN_TEMPLATES


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

LLAMA2_VISION = (
    """
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content if part and part['type'] == 'text' -%}
            {{- part['text'] | default('', true) -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro images(content) -%}
    {%- if content and content is not string -%}
        {%- for part in content if part and part['type'] == 'image' -%}
            {{- image_token | default('<image>') -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ask = namespace(first=true, image=false, system="SYSTEM_PROMPT") -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ask.system = words(message['content']) -%}
    {%- elif message['role'] == 'user' -%}
        {{- bos_token ~ '[INST]' -}}
        {%- if ask.first -%}{{- ' <<SYS>>\\n' ~ ask.system ~ '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
        {%- set ask.first = false -%}
        {{- images(message['content']) or ('QUERY_TOKEN' if ask.image else '') -}}
        {%- if images(message['content']) -%}{%- set ask.image = true -%}{%- endif -%}
        {{- ' ' ~ words(message['content']) | trim ~ ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' ~ words(message['content']) | trim ~ ' ' ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('Roles must be system, user or assistant, not ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
{%- endfor -%}
""".strip()
    .replace("SYSTEM_PROMPT", SYSTEM)
    .replace("QUERY_TOKEN", QUERY_IN_TEMPLATES)
)
"""`llama-2-vision` of the released code: placeholders directly before the question, the system text in the first turn.

The released code tokenises piece by piece and this template the text as a whole, so spaces at the seams may fall into
other tokens.
"""
