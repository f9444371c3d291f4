"""The word-level tokenizer of the halves: every word, number and mark of the needle task is one token."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES

from ..backgrounds import BACKGROUNDS
from ..scenes import COLOURS
from ..sprites import BARS, DIGITS, KINDS, NUMBERS, SHAPES, WORDS


SPECIAL_TOKENS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>")
FUNCTION_WORDS = """
system user assistant which what where how many is are there the a an of at in on or and object objects digit number
word shape bar chart larger smaller tallest color colour background top bottom left right answer question using single
phrase with option letter from given choices directly s b c d yes no not this image picture scene it
""".split()  # noqa: SIM905 - a list of strings would be unreadable
MARKS = tuple(".,?!:;'()")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Returns:
        Lower-cased words, ChatML marks and template; line breaks are white space; unknown words become `<unk>`.
    """
    words = [*FUNCTION_WORDS, *KINDS, *DIGITS, *NUMBERS, *WORDS, *SHAPES, *BARS, *COLOURS, *BACKGROUNDS, *MARKS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATES["chatml"]
    return fast
