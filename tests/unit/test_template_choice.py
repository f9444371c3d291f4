"""Which chat template a language model gets: its own goes on writing what it wrote."""

import jinja2
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from builders.text import tiny_tokenizer
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES, find_template
from hires_lmm.processing.template_choice_hires_lmm import choose_template


SYSTEM = '<|im_start|>system\nYou are a "tidy" helper, ü.<|im_end|>\n'
WITH_SYSTEM = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system
You are a "tidy" helper, ü.<|im_end|>
' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '
' + message.content + '<|im_end|>
' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant
' }}{%- endif %}"""
ODD = WITH_SYSTEM.replace("im_end", "eot_id")
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
CHATS = [
    [{"role": "user", "content": "Who?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}],
    [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "And she?"},
    ],
]


def render(tokenizer, template: str, messages: list[dict], **options) -> str:
    template = CHAT_TEMPLATES.get(template, template)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("own", [WITH_SYSTEM, ODD, CHAT_TEMPLATES["chatml"].replace("'image'", "'picture'")])
@pytest.mark.parametrize("opens", [False, True])
def test_a_text_keeps_every_character_of_the_tokenizers_own_template(own, opens):
    """A system prompt that a tokenizer writes by itself was lost once, as chatml took the place of its template."""
    tokenizer = tiny_tokenizer(own)
    choice = choose_template(tokenizer)
    for chat in CHATS:
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens)
        assert render(tokenizer, choice.template, chat, add_generation_prompt=opens) == wanted
    assert "<image>\nWho?" in render(tokenizer, choice.template, QUESTION)


def test_what_was_done_is_said():
    choice = choose_template(tiny_tokenizer(WITH_SYSTEM))
    assert not choice.is_changed and repr(SYSTEM) in choice.note and choice.note.startswith("chatml with")
    assert "{%- generation -%}" in choice.template
    assert (
        "tools, which the tokenizer's own reads, are left out"
        in choose_template(tiny_tokenizer(WITH_SYSTEM + "{% if tools %}{% endif %}")).note
    )
    choice = choose_template(tiny_tokenizer(ODD))
    assert choice.is_changed and choice.template.endswith(ODD)
    assert "WIDENED to images; it does not mark answers" in choice.note
    marked = ODD + "{%- if false -%}{% generation %}{% endgeneration %}{%- endif -%}"
    assert choose_template(tiny_tokenizer(marked)).note.endswith("WIDENED to images")
    choice = choose_template(tiny_tokenizer(ODD), needs_queries=True)
    assert choice.is_changed and choice.template in CHAT_TEMPLATES and "REPLACED by" in choice.note
    choice = choose_template(tiny_tokenizer(None))
    assert choice.template == "llama3" and "the tokenizer has none" in choice.note
    own = "{% for part in messages[0]['content'] if part.type == 'image' %}<image>{% endfor %}"
    assert choose_template(tiny_tokenizer(own)).template == own


def test_a_template_that_is_one_of_ours_is_named():
    for name in CHAT_TEMPLATES:
        own = CHAT_TEMPLATES[name].replace("'image'", "'picture'")
        assert choose_template(tiny_tokenizer(own)).template == name


def test_an_engine_sees_that_a_widened_template_takes_parts():
    """vLLM looks for a loop over a macro's own parameter, and else gives messages as one string."""
    template = choose_template(tiny_tokenizer(ODD)).template
    tree = _compile_jinja_template(template).environment.parse(template)
    loops = [loop for macro in tree.find_all(jinja2.nodes.Macro) for loop in macro.find_all(jinja2.nodes.For)]
    assert "content" in [loop.iter.name for loop in loops if isinstance(loop.iter, jinja2.nodes.Name)]


def test_a_template_that_writes_another_mark_for_images_is_not_taken_as_it_is():
    other = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    choice = choose_template(tiny_tokenizer(other))
    assert choice.template != other and choice.is_changed
    named = tiny_tokenizer(None)
    named.chat_template = {"default": other, "tool_use": "x"}
    assert "none" not in choose_template(named).note


def test_a_name_that_is_no_template_is_refused():
    with pytest.raises(ValueError, match="chat_template='llama-3' is no Jinja text and no known name"):
        find_template("llama-3")
