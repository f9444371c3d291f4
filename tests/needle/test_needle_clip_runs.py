"""Runs on needle clips: what a model starts from, batches against the processor, training, the parts of methods."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from hires_lmm import PRESETS
from hires_lmm.inference import load_model
from needle.clips import CLIP_WORDS, needle_clip, render_clip
from needle.runs import RunOptions
from needle.runs.clips import ClipFeatures, ClipSet, answer_clips, clip_collator, join_clips, train_clips


ROOT = Path(__file__).parents[2]
SLIME, HALVES = ROOT / "checkpoints" / "needle-slime", ROOT / "checkpoints" / "halves"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("needle_clips")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def join(experiment, name: str, seed: int = 0):
    method = experiment.METHODS[name]
    return join_clips(SLIME, HALVES, method.preset, experiment.NUM_QUERIES, seed, **method.changes)


@pytest.mark.parametrize("name", ["one frame", "slime_video", "pllava", "ts_llava"])
def test_a_model_starts_from_what_the_checkpoint_knows(experiment, name):
    model, processor = join(experiment, name)
    source = load_model(str(SLIME), device="cpu").state_dict()
    own = model.state_dict()
    words = source["model.language_model.embed_tokens.weight"]
    assert len(processor.tokenizer) == len(words) + len(CLIP_WORDS)
    torch.testing.assert_close(own["model.language_model.embed_tokens.weight"][: len(words)], words)
    layer = "model.language_model.layers.3.mlp.up_proj.weight"
    torch.testing.assert_close(own[layer], source[layer])
    mlp = "model.connector.adapter.mlp.linear_2.weight"
    torch.testing.assert_close(own[mlp], source[mlp])
    if name == "slime_video":
        queries = "query_former.queries"
        torch.testing.assert_close(
            own[f"model.connector.view_ops.1.{queries}"], source[f"model.connector.view_ops.0.{queries}"]
        )


@pytest.mark.parametrize("name", ["one frame", "slime_video", "pllava", "ts_llava"])
@torch.inference_mode()
def test_a_batch_is_what_the_processor_makes_of_each_question(experiment, name):
    """Two clips with all their questions in packed rows over cached features, against single questions on pixels."""
    model, processor = join(experiment, name)
    clips = ClipSet("validation", 3, frame=experiment.METHODS[name].frame)
    batch = clip_collator(model, processor, clips, ClipFeatures(model, processor, clips)).build(
        [{"scene": 1}, {"scene": 2}]
    )
    inputs = dict(batch.inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    for row, number in enumerate((1, 2)):
        frames = render_clip(needle_clip(number, "validation"))
        media = {"type": "video", "video": frames}
        if clips.frame is not None:
            media = {"type": "image", "image": frames[clips.frame]}
        for place, question in enumerate(batch.questions[row], start=1):
            messages = [
                {"role": "user", "content": [media, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
            kwargs = {"images_kwargs": {"views": "global"}} if clips.frame is not None else {}
            alone = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
            )
            wanted = model(**alone).logits[0]
            length = int((batch.number[row] == place).sum())
            torch.testing.assert_close(logits[row, batch.number[row] == place], wanted[-length:], atol=2e-2, rtol=1e-2)
            answer = labels[row, batch.number[row] == place]
            assert processor.decode(answer[answer >= 0], skip_special_tokens=True) == question.answer


@torch.inference_mode()
def loss_on(model, processor, clips: ClipSet) -> float:
    rows = [{"scene": number} for number in range(clips.count)]
    return float(model(**clip_collator(model, processor, clips, None).build(rows).inputs).loss)


def test_training_learns_and_is_not_repeated(experiment, tmp_path, monkeypatch):
    model, processor = join(experiment, "slime_video")
    clips = ClipSet("train", 4)
    before = loss_on(model, processor, clips)
    options = RunOptions(cache="", visits=(48,), batch_size=4, decay_share=0.2)
    model = train_clips(model, processor, clips, tmp_path, options)
    assert loss_on(model, processor, clips) < 0.5 * before
    assert len(answer_clips(model, processor, clips)) == 2 + 3 + 2 + 1
    monkeypatch.setattr("needle.runs.clips.Trainer", None)
    again = train_clips(None, None, clips, tmp_path, options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["slime_video", "pllava", "ts_llava"])
def test_the_methods_have_the_parts_of_the_presets(experiment, name):
    """All but the router of slime_video, which drops tokens and has no weights."""
    model, _ = join(experiment, name)
    mine, theirs = model.config.connector_config.to_dict(), PRESETS[name]["connector_config"]
    for slot in ("view_ops", "map_ops"):
        assert [op["part"] for op in mine[slot]] == [op["part"] for op in theirs.get(slot, [])]
    assert mine["adapter"]["part"] == theirs["adapter"]["part"]
    planner = model.config.video_planner or {"name": "frames"}
    assert planner["name"] == PRESETS[name]["video_planner"]["name"]


def test_the_table_shows_what_was_scored(experiment):
    scores = {
        kind: {"accuracy": 0.5, "wilson": [0.4, 0.6], "bootstrap": [0.35, 0.61]}
        for kind in ("all", *experiment.CLIP_KINDS)
    }
    row = {"method": "pllava", "seed": 1, "tokens": 128, "scores": scores, "seconds": {"processor": 90.0}}
    last = experiment.build_table([row]).splitlines()[-1]
    assert last == "| `pllava` | 1 | 128 | 50.0 (35.0–61.0) | 50.0 | 50.0 | 50.0 | 50.0 | 1.5 |"
