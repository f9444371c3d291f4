# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""The same question under smaller and smaller budgets of visual tokens.

    python examples/token_budget.py [CHECKPOINT]

Prints, for each budget, the tokens that the language model reads, how far the first prediction moves (total variation
distance between the two distributions, 0 to 1), and the answer. A budget that is too small is an error that names the
smallest. Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.conversion import compose_random


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"
QUESTION = "Which ferry is cancelled?"
MAX_CROPS = 6
SIZE = (2048, 3072)


def main(checkpoint: str | Path) -> None:
    """Ask once per budget."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    content = [{"type": "image", "path": str(IMAGE)}, {"type": "text", "text": QUESTION}]

    full = processor.image_tokens(*SIZE, max_crops=MAX_CROPS)
    reference = None
    for budget in (full, full * 3 // 4, full // 2, 10):
        try:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"max_crops": MAX_CROPS, "max_image_tokens": budget},
            ).to(model.device)
        except ValueError as error:
            print(f"budget {budget}: {error}")
            continue
        with torch.inference_mode():
            prediction = model(**inputs, logits_to_keep=1).logits[0, -1].float().softmax(dim=-1)
        reference = prediction if reference is None else reference
        distance = 0.5 * (prediction - reference).abs().sum().item()
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
        print(f"budget {budget}: {placeholders} tokens, first prediction moved by {distance:.3f}, answer: {answer}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder, preset="llava_hd"))
