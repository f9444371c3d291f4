"""A small offline tokenizer for tests: byte-level BPE, so that any text survives encoding and decoding."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SENTENCES = [
    "A chat between a curious user and an assistant.",
    "USER: What is in the picture? ASSISTANT: A small red boat on a lake.",
    "system user assistant Describe the image. How many cats are on the table?",
]


def tiny_tokenizer(
    chat_template: str | None = "chatml", image_token: bool = True, family: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with pad token, left padding and (by name or as text) a chat template.

    Args:
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES`, a Jinja text, or `None` for no template.
        image_token (`bool`): Whether `<image>` is a special token of the tokenizer.
        family (`str`, *optional*): `"vicuna"`: without the special tokens of Llama-3 and ChatML.

    Returns:
        The tokenizer; `<image>` is id 3 where it exists.
    """
    special = [token for token in SPECIAL_TOKENS if image_token or token != "<image>"]
    special = [token for token in special if family != "vicuna" or "|" not in token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"} if image_token else {},
    )
    if chat_template is not None:
        fast.chat_template = _template_text(chat_template)
    return fast


def _template_text(name: str) -> str:
    from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES

    return CHAT_TEMPLATES.get(name, name)
