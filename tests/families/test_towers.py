"""The table of docs/towers.md, and towers in two processes."""

import json

import pytest

from builders.towers import TIMM_TOWERS, TOWERS, tiny_tower
from families import towers
from launching import TESTS, run_launcher


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOWERS, *TIMM_TOWERS])
def test_every_row_of_the_table_is_what_is_found(name):
    tiny_tower(name)
    assert towers.read_rows()[name] == towers.row(name)
    assert set(towers.row(name)[4:]) == {"yes"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DINOv2 with registers", "SigLIP, SigLIP 2 (fixed size)", "ConvNeXt v2"])
def test_a_trained_tower_keeps_no_process_waiting(tmp_path, name):
    """DDP without a search for unused parameters hangs or fails where one gets no gradient."""
    stage = {"name": "all", "trainable": {"vision_tower": 1e-3, "connector": 1e-3}}
    run = {"max_steps": 3, "train_sampling_strategy": "sequential", "optim": "sgd"}
    run |= {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    settings = {"tower": name, "stage": stage, "data": "by_rank", "folder": str(tmp_path), "arguments": run}
    run_launcher("ddp.yaml", [str(TESTS / "training_run.py"), json.dumps(settings)])
    result = json.loads((tmp_path / "result-0.json").read_text())
    assert len(result["losses"]) == 3 and any(key.startswith("model.vision_tower") for key in result["sums"])
