"""One VLSA run with all objectives in a process of its own: `python vlsa_run.py <json>`, alone or under a launcher.

Settings: folder, steps, and text_rank: every second sample is text, so that of two processes the second sees no image.
Saves checkpoints and the final model to the folder and writes losses and sums of what was trained to
`<folder>/result-<rank>.json`.
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from transformers import set_seed

from builders.objectives import objective_trainer, reconstruction, vlsa_parts
from builders.training import losses
from hires_lmm.training import Stage
from hires_lmm.training.data.cognition import CodebookTask, CognitionTransform, PixelTask, with_cognition
from training_run import large, text


PARTS = ("vision_tower", "connector", "language_model", "lm_head")
OBJECTIVE = "objectives.reconstruction"
STAGE = Stage(
    "vlsa/III",
    {**dict.fromkeys(PARTS, 1e-2), f"{OBJECTIVE}.epigone": 1e-2, f"{OBJECTIVE}.denoiser": 1e-2},
    loss_weights={"reconstruction": 1.0},
)


class Brightness:
    """A codebook of four grey levels on 2 x 2 cells."""

    num_codes, grid = 4, (2, 2)

    def __call__(self, images):
        return np.stack([np.asarray(image.convert("L").resize((2, 2)), dtype=np.int64) // 64 for image in images])


def make_data(count: int, text_rank: bool):
    """Conversations with cognition questions; every second one without an image where a rank is to see none."""
    rows = [text(n) if text_rank and n % 2 else large(n) for n in range(count)]
    tasks = {PixelTask((1, 2)): 1.0, CodebookTask(Brightness(), (1, 2)): 1.0}
    return with_cognition(rows, CognitionTransform(tasks))


def run(folder: Path, steps: int = 3, text_rank: bool = False, **arguments):
    """Train a tiny model with perceiver, reconstruction and cognition; returns the trainer."""
    set_seed(0)
    model, processor = vlsa_parts()
    objectives = {"reconstruction": reconstruction(model)}
    values = {
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        **arguments,
    }
    data = make_data(2 * steps, text_rank)
    trainer = objective_trainer(model, processor, STAGE, objectives, data, folder, **values)
    trainer.train()
    return trainer


def main(settings: dict) -> None:
    """Train, save and write the result."""
    torch.set_num_threads(1)
    folder = Path(settings.pop("folder"))
    trainer = run(folder, **settings)
    trainer.save_model(str(folder / "final"))
    named = trainer.model.named_parameters()
    result = {
        "kind": type(trainer.model_wrapped).__name__,
        "losses": losses(trainer),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "sums": {name: float(p.detach().double().abs().sum()) for name, p in named if p.requires_grad},
    }
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # what is asked for is written; threads of gloo may abort a process that ends as usual
