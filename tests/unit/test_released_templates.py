"""Chat templates of released models by the tokenizer; what they write is in `convert/test_released.py`."""

import pytest

from builders.text import tiny_tokenizer
from hires_lmm.conversion import ConversionError
from hires_lmm.conversion.llava_templates import XTUNER_VICUNA, template_of_xtuner


class Words:
    """A tokenizer with only these words."""

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def test_xtuner_has_a_template_for_each_family():
    assert template_of_xtuner(tiny_tokenizer(None)) == "llama3"
    assert template_of_xtuner(Words("<|im_start|>")) == "chatml"
    assert template_of_xtuner(tiny_tokenizer(None, family="vicuna")) == XTUNER_VICUNA
    with pytest.raises(ConversionError, match="none of Llama-3, Yi and Vicuna, whose prompts are known; pass chat_te"):
        template_of_xtuner(Words("<|user|>", "<|end|>"))


def test_a_system_text_that_is_given_is_written_and_none_else():
    tokenizer = tiny_tokenizer(None, family="vicuna")
    tokenizer.chat_template = XTUNER_VICUNA
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert written == "<s>Be brief. USER: Why? ASSISTANT:"
    written = tokenizer.apply_chat_template(chat[1:], tokenize=False, add_generation_prompt=True)
    assert written == "<s>USER: Why? ASSISTANT:"
