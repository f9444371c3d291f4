# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""One image, several questions: n tokens that have read the question, and a cache that remembers the conversation.

    python examples/fusion_turns.py [CHECKPOINT]

Prints how many tokens each turn puts into the prompt for several n, and how many positions the fusion transformer
reads in each turn: the image and its question first, afterwards the new question only. Without a checkpoint a small
random one of the preset `fusion` is built. Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from hires_lmm.conversion import compose_random
from hires_lmm.modeling.compat_hires_lmm import CACHE  # "cache"; before transformers 5.24 "past_key_values"


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"
QUESTIONS = ("Which ferry is cancelled?", "When does the next one leave?", "From which pier?")
VIEWS = ("pixel_values", "view_positions", "view_spans", "view_boxes")
MAX_CROPS = 4


def encode(processor, messages: list[dict], tokens: int):
    """Tensors of a conversation with n tokens for the image."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"max_image_tokens": tokens, "max_crops": MAX_CROPS},
    )


def turn(role: str, text: str, *parts: dict) -> dict:
    """A message."""
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def main(checkpoint: str | Path) -> None:
    """Count, then talk."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    first = turn("user", QUESTIONS[0], {"type": "image", "path": str(IMAGE)})
    for tokens in (1, 8, 64, 256):
        chat = [first, turn("assistant", "The last one."), turn("user", QUESTIONS[1])]
        counts = [
            int((encode(processor, chat[:n], tokens)["input_ids"] == processor.image_token_id).sum()) for n in (1, 3)
        ]
        print(f"n = {tokens}: {counts[0]} tokens for the image, {counts[1] - counts[0]} for the second question")

    read: list[int] = []
    fusion = model.model.connector.token_ops[0].model
    fusion.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    chat, features, cache, length = [first], None, DynamicCache(config=model.config.get_text_config()), 0
    for number, question in enumerate(QUESTIONS):
        if number:
            chat.append(turn("user", question))
        inputs = encode(processor, chat, 64)
        views = {name: inputs.pop(name) for name in VIEWS}
        if features is None:
            features = model.get_image_features(**views, return_dict=True)
        if number:  # the answer is read again: its text may be cut into other ids
            cache.crop(length - 1 - cache.get_seq_length())
        output = model.generate(
            **inputs, mm_encoder_outputs={"image": features}, max_new_tokens=8, do_sample=False, **{CACHE: cache}
        )
        length = inputs["input_ids"].shape[1]
        answer = processor.decode(output[0, length:], skip_special_tokens=True)
        print(f"turn {number + 1}: the fusion transformer read {sum(read)} positions; answer: {answer!r}")
        read.clear()
        chat.append(turn("assistant", answer))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder, preset="fusion"))
