# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""Ask a question about one image.

    python examples/quickstart.py [CHECKPOINT IMAGE QUESTION]

Prints the answer; without arguments that of the small trained checkpoint of this repository, which finds coloured
objects on large pictures. Tested on 2 CPU cores, no GPU.
"""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import hires_lmm  # noqa: F401  # the classes, for checkpoints that do not bring their code


ROOT = Path(__file__).parents[1]
DEFAULTS = (
    str(ROOT / "checkpoints" / "needle-slime"),
    str(ROOT / "examples" / "images" / "needle_1.jpg"),
    "Which digit is blue?",
)


def main(checkpoint: str, image: str, question: str) -> None:
    """Load, ask, print."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()

    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*(sys.argv[1:] or DEFAULTS))
