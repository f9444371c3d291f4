"""Checkpoints with the parts of `docs/adding-a-part.md`, read from the page, and a process that loads them."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from builders.docs import ROOT, TITLE, read_blocks
from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor


WORKER = ROOT / "tests" / "hub" / "own_parts_worker.py"
PAGE = read_blocks((ROOT / "docs" / "adding-a-part.md").read_text(encoding="utf-8"))
PARTS = next(block.text for block in PAGE if TITLE.fullmatch(block.info))
SLOTS = {
    "planner": {"planner": {"name": "my_parts.Strips", "strips": 3}},
    "view_op": {"connector_config": {"view_ops": [{"part": "my_parts.AveragePool"}]}},
    "adapter": {"connector_config": {"adapter": {"part": "my_parts.Bottleneck", "rank": 8}}},
    "token_op": {"connector_config": {"token_ops": [{"part": "my_parts.MarkCrops"}]}},
    "layer_op": {"connector_config": {"layer_ops": [{"part": "my_parts.ScaleVisual", "layers": 0}]}},
}
CONNECTORS = [settings["connector_config"] for settings in SLOTS.values() if "connector_config" in settings]
ALL = {**SLOTS["planner"], "connector_config": {key: value for each in CONNECTORS for key, value in each.items()}}
CASES = {**SLOTS, "all": ALL}


def own_config(case: str):
    """A tiny configuration with the parts of a case; `my_parts` is imported."""
    return tiny_config("llava_next", **copy.deepcopy(CASES[case]))


def save_cases(root: Path) -> None:
    """Checkpoints, one a slot and one with all, trained for a step; beside them batches and logits."""
    image = random_image(100, 180)
    image.save(root / "image.png")
    for case in CASES:
        config = own_config(case)
        model, processor = tiny_model(config, seed=3), tiny_processor(config, "chatml")
        batch = make_batch(processor, [("USER: <image>\nA boat? ASSISTANT: No.", [image])])
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        model.eval().save_pretrained(root / case)
        processor.save_pretrained(root / case)
        with torch.no_grad():
            logits = model(**batch).logits
        tokens = processor.image_tokens(100, 180)
        torch.save({"batch": dict(batch), "logits": logits, "image_tokens": tokens}, root / f"{case}.pt")
    shutil.copytree(root / "view_op", root / "other" / "view_op")
    file = root / "other" / "view_op" / "my_parts.py"
    file.write_text(file.read_text().replace("* self.gain", "* self.gain * 2"))


def run_worker(root: Path, source: str, *others: str) -> dict:
    """What a fresh process finds; `source` is `-` for one that cannot import the package."""
    out = root / ("without" if source == "-" else "with")
    out.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {**kept, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(WORKER), source, str(root), str(out), *others]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())
