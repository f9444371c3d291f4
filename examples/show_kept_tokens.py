# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""Draw which visual tokens two questions keep.

    python examples/show_kept_tokens.py [FOLDER]

Writes kept_0.png and kept_1.png into FOLDER (default: the working folder) and prints the share that both keep, of the
small trained checkpoint of this repository. Its router is that of the preset slime: the question decides what is kept.
Tested on 2 CPU cores, no GPU.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.visualize import count_kept, draw_token_map


ROOT = Path(__file__).parents[1]
CHECKPOINT, IMAGE = ROOT / "checkpoints" / "needle-slime", ROOT / "examples" / "images" / "needle_1.jpg"
QUESTIONS = ("Which digit is blue?", "Which shape is yellow?")


def main(folder: Path) -> None:
    """Draw one picture a question."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    image = Image.open(IMAGE)
    kept = []
    for index, question in enumerate(QUESTIONS):
        content = [{"type": "image", "path": str(IMAGE)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            token_map = model(**inputs, output_token_map=True, logits_to_keep=1).token_map
        kept.append(token_map.kept)
        picture = folder / f"kept_{index}.png"
        draw_token_map(image, token_map, title=question).save(picture)
        number, total = count_kept(token_map)
        print(f"{picture.name}: {number} of {total} visual tokens kept for {question!r}")
    both = int((kept[0] & kept[1]).sum())
    print(f"{both / int((kept[0] | kept[1]).sum()):.0%} of the tokens kept for either question are kept for both")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
