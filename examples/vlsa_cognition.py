# /// script
# requires-python = ">=3.10"
# dependencies = ["hires-lmm[train]"]
# ///
"""Cognition alignment: train any preset to say which codes and colours it sees.

    python examples/vlsa_cognition.py [CHECKPOINT]

Puts questions about a codebook and about colours into two conversations, shows one, trains a few steps with the stock
Trainer, and scores two answers that need no model: the right one, and middle grey. The codebook here is a palette of
eight colours; `load_quantiser("folder")` takes a VQModel of diffusers instead. Without a checkpoint a small random one
of the preset `llava_next` is built: the transform changes data only, so any preset will do. Tested on 2 CPU cores, no
GPU: half a minute.
"""

import sys
import tempfile
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from hires_lmm.conversion import compose_random
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback
from hires_lmm.training.data.cognition import CodebookTask, CognitionTransform, PixelTask, with_cognition


IMAGE = Path(__file__).parent / "images" / "harbour_board.png"


class Palette:
    """A quantiser: the corner of the colour cube that is nearest to the mean colour of a cell."""

    num_codes = 8
    grid = (6, 6)

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Codes (n, 6, 6): bit 0 is red, bit 1 green, bit 2 blue."""
        cells = np.stack([np.asarray(image.resize(self.grid[::-1], Image.Resampling.BOX)) for image in images])
        return (cells > 127).astype(int) @ np.array([1, 2, 4])


def conversation(image: Image.Image, question: str, answer: str) -> dict:
    """A row of training data."""
    messages = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


def main(checkpoint: str | Path) -> None:
    """Insert, train, score."""
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    board = Image.open(IMAGE).convert("RGB")
    rows = [
        conversation(board.crop((90, 330, 1830, 1230)).resize((435, 225)), "What is listed?", "Ferries."),
        conversation(board.crop((90, 1330, 1330, 1950)).resize((310, 155)), "What is drawn?", "A harbour."),
    ]
    pixels, codes = PixelTask(grid=(2, 2)), CodebookTask(Palette(), block=(2, 3))
    transform = CognitionTransform({pixels: 1.0, codes: 0.5}, seed=0, processor=processor)
    for message in transform(rows[0])["messages"]:
        print(f"{message['role']}: {message['content']}")

    stage = Stage("cognition", {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3})
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output,
            max_steps=4,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=with_cognition(rows, transform),
            data_collator=HiResLmmCollator(processor, images_kwargs={"max_crops": 2}),
            callbacks=[StageCallback(stage, show_table=False)],
            optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
        )
        print(f"loss of {args.max_steps} steps: {trainer.train().training_loss:.2f}")

    queries = [pixels.ask(row["images"][0], Random(seed)) for seed in range(4) for row in rows]
    for name, answers in (
        ("right", [query.answer for query in queries]),
        ("grey", ["128,128,128 " * 4] * len(queries)),
    ):
        print(f"{name} answers score", pixels.score(answers, queries))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(compose_random(folder, preset="llava_next"))
