# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""Ask a question about one image.

    python examples/quickstart.py [CHECKPOINT]

Prints the answer. Without a checkpoint a small random one is built, whose answers mean nothing.
Tested on 2 CPU cores, no GPU.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.conversion import compose_random


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"
QUESTION = "Which ferry is cancelled?"


def main(checkpoint: str | Path) -> None:
    """Load, ask, print."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()

    content = [{"type": "image", "path": str(IMAGE)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"max_crops": 6},
    )
    output = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder))
