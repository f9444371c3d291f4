"""Two processes on the CPU, one with large images and one with text only, against one process on the union."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import training_run
from builders.tiny import random_image
from builders.training import slime_parts
from hires_lmm.training import Stage
from hires_lmm.training.objectives import load_objectives
from hires_lmm.training.parameters import part_name
from hires_lmm.training.plans import FORCED_EXPERT
from launching import TESTS, run_launcher


CONNECTOR = Stage("connector", {"connector": 1e-3}, settings={FORCED_EXPERT: "mlp"})
GLOBAL = Stage("global", {"connector.adapter": 1e-3}, views="global", settings={FORCED_EXPERT: "mlp"})
LOCAL = Stage("local", {"connector.view_ops": 1e-3}, views="crops")
ALL = Stage(
    "all",
    {"vision_tower": 1e-3, "connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3},
    settings={FORCED_EXPERT: "mlp"},
)
ROUTED = [{"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.75}}]
# SGD: Adam blows up gradients that are zero but for rounding, such as those of key biases
RUN = {"max_steps": 3, "train_sampling_strategy": "sequential", "optim": "sgd"}


KINDS = {
    "ddp.yaml": "Parameter in DistributedDataParallel",
    "fsdp2.yaml": "DTensor in FSDPHiResLmmForConditionalGeneration",
}


def launch(config: str, settings: dict) -> None:
    """Run the training script of the tests in two processes."""
    run_launcher(config, [str(TESTS / "training_run.py"), json.dumps(settings)])


def compare(
    tmp_path: Path, config: str, stage: Stage, extra: dict | None = None, settings: dict | None = None
) -> None:
    """Two processes with a batch of one each, against one process with a batch of two."""
    settings = {"stage": stage.to_dict(), "data": "by_rank", **(settings or {})}
    one = {**RUN, **(extra or {}), "per_device_train_batch_size": 2}
    two = {**RUN, **(extra or {}), "per_device_train_batch_size": 1}
    launch(config, {**settings, "folder": str(tmp_path / "two"), "arguments": two})
    training_run.main({**settings, "folder": str(tmp_path / "one"), "arguments": one})
    expected = json.loads((tmp_path / "one" / "result-0.json").read_text())
    found = json.loads((tmp_path / "two" / "result-0.json").read_text())
    assert found["kind"] == KINDS[config]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-5)
    assert found["sums"]


def test_ddp_with_a_text_only_rank_equals_one_process(tmp_path):
    compare(tmp_path, "ddp.yaml", CONNECTOR)


@pytest.mark.slow
def test_fsdp2_with_a_text_only_rank_equals_one_process(tmp_path):
    compare(tmp_path, "fsdp2.yaml", ALL)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
@pytest.mark.parametrize("stage", [CONNECTOR, GLOBAL, LOCAL, ALL], ids=lambda stage: stage.name)
def test_every_kind_of_stage_in_two_processes(tmp_path, config, stage):
    compare(tmp_path, config, stage)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_activation_checkpointing_in_two_processes(tmp_path, config):
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    if config == "ddp.yaml":  # the last layer of the tower, after the one that is read, never gets a gradient
        kwargs["ddp_find_unused_parameters"] = True
    compare(tmp_path, config, ALL, extra=kwargs)


RECONSTRUCT = Stage(
    "reconstruct",
    {"connector": 1e-3, "objectives.reconstruction.epigone": 1e-3, "objectives.reconstruction.denoiser": 1e-3},
    loss_weights={"reconstruction": 1.0},
)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_reconstruction_in_two_processes(tmp_path, config):
    """One process sees images, the other text only; one process on the union gives the same losses and weights."""
    stage = RECONSTRUCT
    if config == "fsdp2.yaml":
        stage = dataclasses.replace(ALL, settings={}, trainable={**ALL.trainable, **RECONSTRUCT.trainable})
        stage = dataclasses.replace(stage, loss_weights=RECONSTRUCT.loss_weights)
    compare(tmp_path, config, stage, settings={"reconstruct": True})
    objectives = [load_objectives(tmp_path / name / "objectives")["reconstruction"] for name in ("one", "two")]
    for one, two in zip(objectives[0].parameters(), objectives[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_reconstruction_goes_on_in_two_processes(tmp_path, config):
    run = {**RUN, "optim": "adamw_torch", "per_device_train_batch_size": 1, "max_steps": 4}
    run |= {"save_strategy": "steps", "save_steps": 2}
    settings = {"stage": RECONSTRUCT.to_dict(), "data": "by_rank", "reconstruct": True, "arguments": run}
    folder = tmp_path / "run"
    launch(config, {**settings, "folder": str(folder)})
    expected = json.loads((folder / "result-0.json").read_text())
    shutil.rmtree(folder / "checkpoint-4")
    launch(config, {**settings, "folder": str(folder), "resume": True})
    found = json.loads((folder / "result-0.json").read_text())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-6)
    assert any(name.startswith("objectives.reconstruction.denoiser") for name in found["sums"])


@pytest.mark.slow
def test_batches_of_different_work_do_not_hang(tmp_path):
    """The gate and the router are random here, so only the end is compared: it comes."""
    stage = dataclasses.replace(ALL, settings={FORCED_EXPERT: None})
    settings = {"stage": stage.to_dict(), "data": "by_rank", "connector": {"token_ops": ROUTED}}
    arguments = {**RUN, "per_device_train_batch_size": 1, "max_steps": 4}
    for config in ("ddp.yaml", "fsdp2.yaml"):
        launch(config, {**settings, "folder": str(tmp_path / config), "arguments": arguments})
        result = json.loads((tmp_path / config / "result-0.json").read_text())
        assert len(result["losses"]) == 4 and result["kind"] == KINDS[config]


@pytest.mark.slow
def test_the_example_runs_a_plan_in_two_processes(tmp_path):
    model, processor = slime_parts()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    for number in range(8):
        random_image(60 + 10 * number, 90, number).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "That one."}]
    records = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    command = [str(TESTS.parent / "examples" / "train.py"), "--model", str(tmp_path / "model")]
    command += ["--recipe", str(TESTS.parent / "examples" / "recipes" / "slime_vicuna_7b.yaml")]
    command += ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data.json")]
    command += ["--features", str(tmp_path / "features")]
    for entry in ("use_cpu=true", "bf16=false", "max_steps=2", "per_device_train_batch_size=1"):
        command += ["--set", entry]
    for entry in ("gradient_accumulation_steps=1", "dataloader_num_workers=0", "logging_steps=1"):
        command += ["--set", entry]
    run_launcher("ddp.yaml", command)
    final = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "slime" / "III" / "final")
    assert final.config.training_stage == "slime/III"
    assert final.config.connector_config.adapter["forced_expert"] is None
    before = dict(model.named_parameters())
    moved = {part_name(n).split(".")[0] for n, p in final.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"connector", "language_model", "lm_head"}
    run_launcher("ddp.yaml", command)  # all stages are finished: nothing to do
