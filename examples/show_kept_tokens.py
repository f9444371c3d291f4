# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""Draw which visual tokens two questions keep.

    python examples/show_kept_tokens.py [CHECKPOINT] [FOLDER]

Writes kept_0.png and kept_1.png into FOLDER (default: the working folder) and prints the share that both keep. With
the preset slime the question decides what is kept; the random weights of the demo checkpoint choose without sense.
Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.conversion import compose_random
from hires_lmm.visualize import draw_token_map


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"
QUESTIONS = ("Which ferry is cancelled?", "How many passengers came in May?")


def main(checkpoint: str | Path, folder: Path) -> None:
    """Draw one picture a question."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
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
            processor_kwargs={"max_crops": 6},
        ).to(model.device)
        with torch.inference_mode():
            token_map = model(**inputs, output_token_map=True, logits_to_keep=1).token_map
        kept.append(token_map.kept)
        picture = folder / f"kept_{index}.png"
        draw_token_map(image, token_map, title=question).save(picture)
        print(f"{picture.name}: {int(token_map.kept.sum())} of {len(token_map.kept)} tokens kept for {question!r}")
    both = int((kept[0] & kept[1]).sum())
    print(f"{both / int((kept[0] | kept[1]).sum()):.0%} of the tokens kept for either question are kept for both")


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
    if len(sys.argv) > 1:
        main(sys.argv[1], target)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(compose_random(temporary), target)
