"""A short run of one of TRL's trainers, also in several processes: `python trl_run.py '{settings as JSON}'`.

Settings: `trainer`, `folder`, `arguments`, `images` a row. Each process writes the losses and the sums of its weights
into `result-RANK.json`.
"""

import json
import sys
from pathlib import Path

import trl
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.trl import as_dataset, logged, preferences, prompts, trl_arguments


def reward(completion_ids, **columns) -> list[float]:
    """One that differs from answer to answer."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def main(settings: dict) -> None:
    """Train and write what came out."""
    folder, name = Path(settings["folder"]), settings["trainer"]
    images = settings["images"]
    rows = preferences(images) if name == "DPO" else prompts(len(images), images[0])
    trainer = getattr(trl, f"{name}Trainer")(
        AutoModelForImageTextToText.from_pretrained(settings["model"]),
        args=trl_arguments(getattr(trl, f"{name}Config"), folder / "out", **settings["arguments"]),
        train_dataset=as_dataset(rows),
        processing_class=AutoProcessor.from_pretrained(settings["model"], image_layout="dense"),
        **({} if name == "DPO" else {"reward_funcs": reward}),
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = {
        "losses": logged(trainer),
        "rewards": logged(trainer, "reward"),
        "world": trainer.args.world_size,
        "sums": {name: own.double().abs().sum().item() for name, own in model.named_parameters() if own.numel() > 8},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
