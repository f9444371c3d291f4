"""Chat templates of released models that differ from `CHAT_TEMPLATES` in their system text or line breaks."""

from ..processing.chat_templates_hires_lmm import CHAT_TEMPLATES, VICUNA_SYSTEM
from .errors import ConversionError
from .prompts import LLAMA3_HEADER


MINI_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA31_DATES = "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n"
"""What the chat template of Llama-3.1 writes before every system text."""


def llama3_with_system(text: str) -> str:
    """Llama-3's template with a system text of its own where a conversation brings none."""
    header = "'<|start_header_id|>system<|end_header_id|>\\n\\n'"
    system = f"{{{{- {header} ~ \"{text}\" ~ '<|eot_id|>' -}}}}"
    opening = f"{{{{- bos_token -}}}}\n{{%- if messages[0]['role'] != 'system' -%}}{system}{{%- endif -%}}"
    return CHAT_TEMPLATES["llama3"].replace("{{- bos_token -}}", opening, 1)


LLAMA3_VICUNA = llama3_with_system(VICUNA_SYSTEM)
"""`llama3` of INF-LLaVA."""

LLAMA31_MINI = llama3_with_system(LLAMA31_DATES + MINI_SYSTEM)
"""`llava_llama_3_1` of LLaVA-Mini."""

_SYSTEM = CHAT_TEMPLATES["vicuna"].partition("{%- for message in messages -%}")[0].partition("{{- bos_token -}}")[2]
XTUNER_VICUNA = (
    CHAT_TEMPLATES["vicuna"]
    .replace(_SYSTEM, "\n")
    .replace("loop.previtem['role'] == 'user' -%}{{- ' ' -}}", "loop.previtem['role'] == 'assistant' -%}{{- '\\n' -}}")
)
"""`PROMPT_TEMPLATE.vicuna` of xtuner: no system text unless one is given, a line break behind each answer."""

RELEASED_TEMPLATES = {
    LLAMA3_VICUNA: "`llama3` with the system text of INF-LLaVA",
    LLAMA31_MINI: "`llama3` with the system text of LLaVA-Mini",
    XTUNER_VICUNA: "`vicuna` as xtuner writes it, without a system text",
}
"""Template -> what the card says."""


def template_of_xtuner(tokenizer: object) -> str:
    """The template that xtuner has for a tokenizer's family.

    Raises:
        ConversionError: If it is none of Llama-3, ChatML (Yi) and Vicuna.
    """
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    if LLAMA3_HEADER in vocabulary or "<|im_start|>" in vocabulary:
        return "llama3" if LLAMA3_HEADER in vocabulary else "chatml"
    if "<|user|>" in vocabulary or "<|assistant|>" in vocabulary:
        raise ConversionError(
            "The language model is none of Llama-3, Yi and Vicuna, whose prompts are known; pass chat_template."
        )
    return XTUNER_VICUNA
