# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""VLSA: 576 tokens for an image of any size, and what the crops add to them.

    python examples/vlsa_tokens.py [CHECKPOINT]

Prints, for images of several sizes, how many crops are read and how many tokens reach the language model; then how
far the tokens of one picture move when the perceiver may read more crops (mean cosine to those of one crop), and the
answer. Without a checkpoint a small random one of the preset `vlsa` is built. Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.conversion import compose_random


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"
QUESTION = "Which ferry is cancelled?"
SIZES = ((100, 100), (336, 336), (1080, 1920), (2048, 3072), (400, 6000))


def image_tokens(model, processor, image: Image.Image, max_crops: int) -> torch.Tensor:
    """What the language model gets of an image `(tokens, width)`."""
    views = processor.image_processor(image, max_crops=max_crops, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        features = model.get_image_features(**views)
    return torch.cat(list(features.pooler_output))


def main(checkpoint: str | Path) -> None:
    """Count, compare, answer."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    for height, width in SIZES:
        (tokens,), (views,) = processor.image_processor.count_images([(height, width)])
        print(f"{height} x {width} pixels: {views - 1} crops, {tokens} tokens")

    image = Image.open(IMAGE).convert("RGB")
    fewest = image_tokens(model, processor, image, max_crops=1)
    for max_crops in (1, 4, 9):
        found = image_tokens(model, processor, image, max_crops)
        cosine = torch.cosine_similarity(found.float(), fewest.float(), dim=-1).mean().item()
        print(f"at most {max_crops} crops: {len(found)} tokens, cosine to those of one crop {cosine:.3f}")

    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"max_crops": 6},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print("answer:", processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder, preset="vlsa"))
