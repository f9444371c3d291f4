# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""One batch of images of different sizes, with a row that has no image and a row that has two.

    python examples/batch_mixed_sizes.py [CHECKPOINT]

Prints the tokens of each image and the answer of each row. No image is padded to the size of another.
Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.conversion import compose_random


BOARD = Path(__file__).parent / "images" / "harbour_board.png"


def user_turn(question: str, *images: Image.Image) -> list[dict]:
    """A conversation of one question."""
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def main(checkpoint: str | Path) -> None:
    """Build the batch, count, answer."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()

    board = Image.open(BOARD).convert("RGB")
    timetable, scene, small = (
        board.crop((90, 330, 1830, 1230)),
        board.crop((90, 1330, 1330, 1950)),
        board.resize((300, 200)),
    )
    conversations = [
        user_turn("When does the first ferry leave?", timetable),
        user_turn("What is a ferry?"),
        user_turn("Which of the two shows a boat?", scene, small),
        user_turn("What is in the picture?", scene),
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"max_crops": 6, "padding": True},
    )
    positions = inputs["view_positions"]
    for name, image in (("timetable", timetable), ("scene", scene), ("small", small)):
        tokens = processor.image_tokens(image.height, image.width, max_crops=6)
        print(f"{name}: {image.width} x {image.height} pixels, {tokens} tokens")
    print(f"{len(conversations)} rows, {int(positions[:, 8].sum())} images, {len(positions)} views")

    output = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, answer in enumerate(answers):
        print(f"row {row}: {answer}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder))
