"""Plans on the needle task with the stock Trainer, on a handful of scenes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from builders.needle import joined, run_options
from hires_lmm.training import get_plan
from needle.from_halves import main
from needle.runs import small_rates, train
from needle.runs.run import DONE, LOG, MODEL


def stages():
    """The perceptron on global views, then everything."""
    plan = small_rates(get_plan("slime"))
    return [plan[0], plan[3]]


def weights(folder):
    """The final weights of a run."""
    return load_file(folder / MODEL / "model.safetensors")


def test_an_interrupted_plan_ends_where_the_uninterrupted_one_does(tmp_path, monkeypatch):
    options = run_options(
        tmp_path / "cache", (6, 4), save_every=1, near={"global": 0.5}, mix={"all": 0.5, "global": 0.5}
    )
    train(*joined(), stages(), tmp_path / "whole", options)

    step, calls = Trainer.training_step, []

    def fail_at_fifth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # in the second step of the last stage
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(*joined(), stages(), tmp_path / "cut", options)
    assert (tmp_path / "cut" / "0-slime-I-a" / DONE).is_file() and not (tmp_path / "cut" / MODEL).exists()
    train(*joined(), stages(), tmp_path / "cut", options)
    assert len(calls) == 5 + 1, "only the step that failed is repeated"
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())

    seconds = [stage["seconds"]["wall"] for stage in json.loads((tmp_path / "cut" / LOG).read_text())["stages"]]
    assert all(second > 0 for second in seconds)
    train(*joined(), stages(), tmp_path / "cut", options)
    assert len(calls) == 6, "a finished plan runs no step"


def test_stages_train_their_parts_only(tmp_path):
    model, processor = joined()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, processor, stages()[:1], tmp_path / "one", run_options(tmp_path / "cache", (4,)))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.connector.adapter.mlp.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    log = json.loads((tmp_path / "one" / LOG).read_text())
    (stage,) = log["stages"]
    assert stage["visits"] == 4 and stage["steps"] == 2 and len(stage["loss"]) == 2
    assert stage["stage"]["name"] == "slime/I-a" and log["options"]["seed"] == 0
    with pytest.raises(ValueError, match="1 stages need as many"):
        train(model, processor, stages()[:1], tmp_path / "two", run_options(tmp_path / "cache", (4, 4)))


def test_a_router_in_training_reads_one_question_a_row(tmp_path):
    model, processor = joined(router=True)
    assert model.model.connector.reads_question
    options = run_options(tmp_path / "cache", (4,), questions=2)
    train(model, processor, stages()[1:], tmp_path / "run", options)
    (stage,) = json.loads((tmp_path / "run" / LOG).read_text())["stages"]
    assert all(loss > 0 for _, loss in stage["loss"])


def test_the_command_trains_scores_and_saves_a_model_with_its_router(tmp_path):
    command = ["--out", str(tmp_path / "run"), "--plan", "end_to_end", "--num-queries", "4", "--scenes", "4"]
    command += ["--visits", "4,4", "--batch-size", "2", "--questions", "3", "--evaluate", "2", "--note", "a test"]
    assert main(command) == 0
    log = json.loads((tmp_path / "run" / LOG).read_text())
    assert log["machine"] == "a test" and set(log["validation"]) == {"all", "global", "crops"}
    assert log["command"].startswith("python -m needle.from_halves --out ")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / MODEL)
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / MODEL)
    assert model.config.connector_config.token_ops[0]["score"] == "cosine"
    assert processor.image_tokens(384, 384) == 64 + 36 * 4
    assert model.config.training_stage == "end_to_end/all"
