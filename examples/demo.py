# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""First run: `make demo`. Builds a small checkpoint, loads it as a stranger would, asks, and draws what was kept.

Prints the answer and the account of tokens; writes outputs/demo/kept_tokens.png.
Tested on 2 CPU cores, no GPU.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


ROOT = Path(__file__).parents[1]
OUTPUT = (Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs" / "demo").resolve()
IMAGE = ROOT / "examples" / "images" / "harbour_board.png"
QUESTION = "Which ferry is cancelled?"
BUDGET, MAX_CROPS = 1200, 6


def say(text: str = "") -> None:
    """One line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the demonstration."""
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = OUTPUT / "checkpoint"
    say(f"1. Building a small checkpoint with random weights (preset llava_hd) in {OUTPUT.name}/checkpoint")
    subprocess.run(
        [sys.executable, "-m", "hires_lmm.demo", str(checkpoint), "--preset", "llava_hd"],
        check=True,
        stderr=subprocess.DEVNULL,
    )

    say("2. Loading it through the Auto classes with trust_remote_code=True, before hires_lmm is imported here")
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    say(f"   the model's code came from {type(model).__module__.split('.')[0]}")

    image = Image.open(IMAGE).convert("RGB")
    say(f"3. Asking about {IMAGE.name}: {image.width} x {image.height} pixels, max_crops={MAX_CROPS}")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    options = {"max_crops": MAX_CROPS, "max_image_tokens": BUDGET}
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24)
        token_map = model(**inputs, output_token_map=True, logits_to_keep=1).token_map
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    say(f"   question: {QUESTION}")
    say(f"   answer:   {answer}")
    say("   The weights are random, so this text is meaningless until a trained checkpoint ships.")

    full = processor.image_tokens(image.height, image.width, max_crops=MAX_CROPS)
    say(f"4. Tokens: {len(inputs['pixel_values'])} views, {full} visual tokens, budget {BUDGET}")
    say(f"   reached the language model: {int(token_map.kept.sum())}")

    from hires_lmm.visualize import draw_token_map

    picture = OUTPUT / "kept_tokens.png"
    draw_token_map(image, token_map, title=QUESTION).save(picture)
    say(f"5. Wrote {picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture}")
    say("   Tokens were chosen by saliency, which reads no question and needs no training.")
    say(f"   {time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
