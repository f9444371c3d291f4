# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm"]
# ///
"""First run: `make demo`. A small trained checkpoint answers five questions about large pictures.

Exports checkpoints/needle-slime with its code, loads that as a stranger would, with the code that lies beside the
weights, and prints five questions about five committed scenes of 1536 x 1536 pixels, the answers, and the right ones.
Writes the kept visual tokens, those that reached the language model, as outputs/demo/kept_tokens.png.

    python examples/demo.py [OUTPUT] [--checkpoint FOLDER]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "examples" / "images"


def say(text: str = "") -> None:
    """One line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Five questions about five large pictures.")
    parser.add_argument("output", nargs="?", type=Path, default=ROOT / "outputs" / "demo")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime")
    return parser.parse_args()


def prompt(processor, image: Image.Image, question: str) -> dict:
    """What the model takes for one question about one picture."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def main() -> None:
    """Run the demonstration."""
    start = time.perf_counter()
    options = read_options()
    if not (options.checkpoint / "config.json").is_file():
        sys.exit(f"{options.checkpoint} holds no checkpoint; clone the repository with its checkpoints, or train one.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    say(f"1. Exporting {options.checkpoint.name} with its code")
    exported = options.output / "checkpoint"
    shutil.rmtree(exported, ignore_errors=True)
    command = [sys.executable, "-m", "hires_lmm.cli", "export", str(options.checkpoint), str(exported)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    say("   Loading that with trust_remote_code=True, before hires_lmm is imported here")
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True).eval()
    say(f"   {sum(p.numel() for p in model.parameters()):,} parameters")
    say(f"   the model's code came from {type(model).__module__.split('.')[0]}")

    say("2. Five questions about five pictures")
    entries = json.loads((IMAGES / "needle_scenes.json").read_text(encoding="utf-8"))
    maps, right = [], 0
    for entry in entries:
        image = Image.open(IMAGES / entry["image"]).convert("RGB")
        inputs = prompt(processor, image, entry["question"])
        output = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, output_token_map=True, return_dict_in_generate=True
        )
        token_map = output.token_map
        answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        is_right = answer == entry["answer"]
        right += is_right
        maps.append((image, token_map, entry["question"]))
        say(f"   {entry['image']} ({image.width} x {image.height})")
        say(f"     question: {entry['question']}")
        say(f"     answer:   {answer}   {'right' if is_right else 'wrong: ' + entry['answer']}")
        say(f"     {int(token_map.kept.sum())} of {len(token_map.kept)} visual tokens kept")
    say(f"   {right} of {len(entries)} right")

    from hires_lmm.visualize import draw_token_map

    options.output.mkdir(parents=True, exist_ok=True)
    picture = (options.output / "kept_tokens.png").resolve()
    draw_token_map(maps[0][0], maps[0][1], title=maps[0][2]).save(picture)
    shown = picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture
    say(f"3. Wrote {shown}: the tokens of the first answer")
    say(f"   {time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
