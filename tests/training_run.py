"""One training run in a process of its own: `python training_run.py <json>`, alone or under a launcher.

Settings: folder, stage (fields), data ("images", "text", "mixed", "by_rank"), resume, kill_at (a step), connector,
reconstruct (a VLSA model with that objective, its noise fixed), tower (a name of `builders.towers`), and `arguments`
for TrainingArguments. Writes losses and sums of the trained weights to `<folder>/result-<rank>.json`.
"""

import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback, set_seed

from builders.objectives import fixed_reconstruction, objective_trainer, vlsa_parts
from builders.tiny import random_image, tiny_processor
from builders.training import conversation, losses, make_trainer, slime_parts
from families.towers import tower_model
from hires_lmm.training import Stage


class KillAt(TrainerCallback):
    """Ends the process without warning before an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def large(number: int) -> dict:
    """A question on one large image."""
    example = conversation(number)
    return {**example, "images": [random_image(230 + number, 250, number)]}


def text(number: int) -> dict:
    """A conversation without images."""
    return {
        "messages": [
            {"role": "user", "content": f"Is {number} a number?"},
            {"role": "assistant", "content": f"Yes, {number} is a number."},
        ]
    }


def make_data(kind: str, count: int, width: int) -> list[dict]:
    """Data in the order of a sequential sampler; "by_rank" gives every second batch of `width` samples to text."""
    if kind == "by_rank":
        return [large(n) if n // width % 2 == 0 else text(n) for n in range(count)]
    return [text(n) if kind == "text" or (kind == "mixed" and n % 2) else conversation(n) for n in range(count)]


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU: it knows FSDP for accelerators only, though PyTorch shards anywhere."""
    original = PartialState.__init__

    def start(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start


def main(settings: dict) -> None:
    """Train and write the result."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    set_seed(0)
    stage = Stage.from_dict(settings["stage"])
    if settings.get("reconstruct"):
        model, processor = vlsa_parts()
        objectives = {"reconstruction": fixed_reconstruction(model)}
    elif settings.get("tower"):
        model, objectives = tower_model(settings["tower"]).train(), {}
        processor = tiny_processor(model.config, "chatml")
    else:
        model, processor = slime_parts(**settings.get("connector", {}))
        objectives = {}
    arguments = settings.get("arguments", {})
    data = make_data(settings.get("data", "images"), settings.get("count", 8), settings.get("width", 1))
    callbacks = [KillAt(settings["kill_at"])] if "kill_at" in settings else []
    folder = Path(settings["folder"])
    if objectives:
        trainer = objective_trainer(model, processor, stage, objectives, data, folder, callbacks, **arguments)
    else:
        trainer = make_trainer(model, processor, stage, data, folder, callbacks=callbacks, **arguments)
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model)
    names = [name for name in state if stage.pattern_of(name) is not None] if state else []
    kind = type(next(trainer.model_wrapped.parameters())).__name__ + " in " + type(trainer.model_wrapped).__name__
    result = {
        "kind": kind,
        "losses": losses(trainer),
        "sums": {name: float(state[name].double().abs().sum()) for name in names},
    }
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # what is asked for is written; threads of gloo may abort a process that ends as usual
