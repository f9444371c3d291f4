"""The preset `vlsa`: the same number of tokens for every image, and checkpoints without triton."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.conversion import preset_processor


TOKENS = 16  # of the tiny tower; 576 of the real one
SIZES = [(100, 180), (57, 30), (300, 90), (1, 1), (56, 56), (57, 113), (1200, 5)]


@functools.cache
def build():
    config = tiny_config("vlsa")
    return tiny_model(config, seed=2), tiny_processor(config)


# ---- counts


def test_every_size_has_576_tokens():
    """Without pixels: all sides from 100 to 6000 pixels on a grid, and random ones."""
    processor = preset_processor("vlsa")
    sides = [*range(100, 6001, 59), 6000]
    rng = np.random.default_rng(0)
    sizes = [(h, w) for h in sides[::4] for w in sides[::4]] + [(side, side) for side in sides]
    sizes += [(int(h), int(w)) for h, w in rng.integers(100, 6001, (500, 2))]
    for extra in ({}, {"max_crops": 6}, {"views": "global"}, {"unpad": True, "global_view": "pad"}):
        assert {processor.image_tokens(*size, **extra) for size in sizes} == {576}
    plans = [processor.image_processor.plan(*size) for size in ((100, 100), (337, 336), (2000, 3000), (6000, 6000))]
    assert [len(plan.views) - 1 for plan in plans] == [1, 2, 35, 36]


def test_four_images_have_four_times_576_tokens():
    processor = preset_processor("vlsa")
    images = [random_image(*size) for size in ((100, 200), (400, 300), (336, 336), (30, 700))]
    batch = processor(text="<image> <image> a <image><image>", images=images, return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 * 576
    assert batch["pixel_values"].shape[0] == 4 + 1 + 2 + 1 + 3
    assert set(batch["view_positions"][:, 5].tolist()) == {576}


@torch.no_grad()
def test_a_smaller_budget_keeps_the_most_salient_tokens_and_a_larger_one_changes_nothing():
    processor = preset_processor("vlsa")
    for budget in (576, 577, 5000):
        assert processor.image_tokens(2000, 3000, max_image_tokens=budget) == 576
    assert [processor.image_tokens(2000, 3000, max_image_tokens=budget) for budget in (575, 1)] == [575, 1]
    assert processor.min_image_tokens(2000, 3000) == 1
    model, processor = build()
    images = [random_image(60, 50), random_image(100, 180)]
    found = model(**make_batch(processor, [("<image>" * 2, images)], max_image_tokens=9), output_token_map=True)
    for image, tokens in enumerate(found.image_outputs.pooler_output):
        score, kept = (
            values[found.token_map.image == image] for values in (found.token_map.score, found.token_map.kept)
        )
        assert (len(tokens), len(kept), int(kept.sum())) == (9, TOKENS, 9)
        assert score[kept].min() >= score[~kept].max()
    with pytest.raises(ValueError, match=r"has no tokens with views='crops'; take other views\.$"):
        processor(text="<image>", images=images[0], views="crops")


@pytest.mark.parametrize(
    "extra",
    [{}, {"views": "global"}, {"unpad": True, "global_view": "pad"}, {"max_crops": 2}],
    ids=str,
)
@torch.no_grad()
def test_the_model_makes_as_many_tokens_as_promised(extra):
    """Whatever is asked of the planner, the low-resolution view enters as a whole."""
    model, processor = build()
    batch = make_batch(processor, [("a <image> b", [random_image(*size)]) for size in SIZES], **extra)
    features = model.model.get_image_features(**geometry_of(batch))
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(TOKENS, 32)] * len(SIZES)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [TOKENS] * len(SIZES)
    assert features.tokens.aux["global_embedding"].shape == (len(SIZES), 32)
    assert model(**batch, output_token_map=True).token_map.kept.all()


MARKS = {
    "newline": {"place": "token_row_end", "on": "crops"},
    "end": {"place": "view_end"},
}


def test_marks_and_routers_count():
    config = tiny_config("vlsa", connector_config={"layout": {"separators": MARKS}})
    assert tiny_processor(config).image_tokens(100, 180) == TOKENS + 1
    batch = make_batch(tiny_processor(config), [("<image>", [random_image(100, 180)])])
    assert len(tiny_model(config).model.get_image_features(**geometry_of(batch)).pooler_output[0]) == TOKENS + 1
    router = {"part": "router", "score": "saliency", "on": "all", "keep": {"rule": "budget"}}
    for on, least in (("all", 1), ("crops", TOKENS)):
        config = tiny_config("vlsa", connector_config={"token_ops": [{**router, "on": on}]})
        processor = tiny_processor(config)
        assert processor.image_tokens(100, 180, max_image_tokens=least) == least
        batch = make_batch(processor, [("<image>", [random_image(100, 180)])], max_image_tokens=least)
        with torch.no_grad():
            model = tiny_model(config)
            assert len(model.model.get_image_features(**geometry_of(batch)).pooler_output[0]) == least
            assert torch.isfinite(model(**batch).logits).all()


@torch.no_grad()
def test_every_crop_and_the_global_view_matter():
    model, processor = build()
    batch = make_batch(processor, [("<image>", [random_image(100, 180)])])
    wanted = model(**batch).logits
    for view in range(len(batch["pixel_values"])):
        changed = dict(batch)
        changed["pixel_values"] = batch["pixel_values"].clone()
        changed["pixel_values"][view] = changed["pixel_values"][view].flip(-1)
        assert (model(**changed).logits - wanted).abs().max() > 1e-3, view


# ---- training


def test_a_batch_without_images_reaches_every_parameter_of_the_connector():
    """What keeps processes in step: the same parameters get a gradient with images, crops or neither."""
    config = tiny_config("vlsa")
    model, processor = tiny_model(config).train(), tiny_processor(config)
    found = []
    for images, extra in (([random_image(100, 180)], {}), ([random_image(100, 180)], {"views": "global"}), ([], {})):
        model.zero_grad()
        batch = make_batch(processor, [("USER: <image> a boat" if images else "USER: a boat", images)], **extra)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert all(parameter.grad is not None for parameter in model.model.connector.parameters())
    assert found[0] == found[1] == found[2]


# ---- checkpoints

CHILD = """
import json, sys
BLOCKED = ("hires_lmm", "triton", "diffusers")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, again = sys.argv[1:]
batch = torch.load(folder + "/batch.pt")
results = []
for source in (folder, again):
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**batch["inputs"]).logits
    ids = model.generate(**batch["inputs"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    results.append([torch.equal(logits, batch["logits"]), ids.tolist(), processor.image_tokens(333, 555)])
    model.train()
    model(**batch["inputs"], labels=batch["inputs"]["input_ids"]).loss.backward()
    model.save_pretrained(again)
    processor.save_pretrained(again)
loaded = [name for name in sys.modules if name.partition(".")[0] in BLOCKED]
print(json.dumps({"results": results, "loaded": loaded, "kernel": type(model).__module__}))
"""


def test_a_checkpoint_loads_and_trains_without_triton_and_diffusers(tmp_path):
    model, processor = build()
    folder, again = tmp_path / "one", tmp_path / "two"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert not list(folder.glob("*kernel*"))
    batch = make_batch(processor, [("USER: <image> a boat", [random_image(100, 180)])])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = model(**batch).logits
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.set_num_threads(threads)
    torch.save({"inputs": dict(batch), "logits": logits}, folder / "batch.pt")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {**kept, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", CHILD, str(folder), str(again)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded"] == []
    assert result["results"] == [[True, ids.tolist(), TOKENS]] * 2
    assert not list(again.glob("*kernel*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_saved_and_loaded_in_half_precision(tmp_path, dtype):
    model, processor = build()
    model.save_pretrained(tmp_path)
    half = HiResLmmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    batch = make_batch(processor, [("USER: <image> a boat", [random_image(100, 180)])])
    wanted, found = model(**batch).logits, half(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits
    assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < (
        5e-2 if dtype == torch.bfloat16 else 1e-2
    )
    half.save_pretrained(tmp_path / "again")
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch).logits, half(**batch).logits)


def test_a_new_model_starts_from_named_values():
    """At initialisation: norms of one, a small query, and weights of the configured spread."""
    torch.manual_seed(0)
    model = HiResLmmForConditionalGeneration(tiny_config("vlsa", tiny_vision_config("clip", hidden_size=128)))
    op = model.model.connector.view_ops[0]
    assert torch.equal(op.cross_norm.weight, torch.ones(128)) and torch.equal(op.self_norm.weight, torch.ones(128))
    for weight in (op.global_query, op.q_proj.weight, op.kv_proj.weight, op.k_proj.weight, op.self_out.weight):
        assert 0.015 < float(weight.detach().std()) < 0.025
