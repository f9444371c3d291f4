"""DAMRO: scores of the class token, the negative prompt, and greedy answers of a tiny LLaVA."""

from pathlib import Path

import pytest
import torch

from hires_lmm.decoding import DAMRO, most_attended
from hires_lmm.modeling.towers_hires_lmm import class_products

from . import llava
from .base import GoldenSet, write_set


NAME = "damro"
GOLDEN = GoldenSet(NAME)
SETTINGS, CASES = GOLDEN.cases["settings"], GOLDEN.cases["cases"]
SCORES = {"merged": True, "per_head": False}


@pytest.fixture(scope="module")
def model():
    return llava.build(SETTINGS, GOLDEN.under("weight."))


@torch.no_grad()
def scores_of(model, pixels: torch.Tensor, merged: bool) -> torch.Tensor:
    """The share of each patch in the attention of the class token."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layer = model.config.vision_feature_layer % len(states) - 1
    return class_products(model.model.vision_tower, states, layer, merged).softmax(-1).mean(1)[:, 1:]


def options_of(case: dict) -> dict:
    compat = "release" if case["order"] == "score" else None
    return {"alpha": case["alpha"], "k": case["k"], "beta": case["beta"], "compat": compat}


def key_of(case: dict) -> str:
    """Beginning of the names of its tensors."""
    row, number, order = case["name"].split(".")
    return f"output.{row}.{number}" + (".raster" if order == "raster" else "")


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_the_class_token(kind, model):
    found = scores_of(model, GOLDEN["input.pixel_values"], SCORES[kind])
    GOLDEN.close(found, f"output.scores_{kind}", atol=1e-6)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@torch.no_grad()
def test_the_negative_prompt(case, kind, model):
    """Text, the chosen patches in their order, text."""
    inputs = llava.inputs_of(model, GOLDEN.tensors, [case["image"]])
    is_score = case["order"] == "score"
    context = most_attended(model, inputs, case["k"], merged=SCORES[kind], by_score=is_score)
    features = model.model.get_image_features(
        **{name: inputs[name] for name in ("pixel_values", "view_positions", "view_spans")}
    ).pooler_output[0]
    patches = case["patches"] if kind == "merged" else case["patches_per_head_score"]
    chosen = features[patches if is_score else sorted(patches)]
    ids = GOLDEN["input.input_ids"][case["image"]].long()
    at = ids.tolist().index(SETTINGS["image_token"])
    before, after = model.get_input_embeddings()(ids).split([at, len(ids) - at])
    torch.testing.assert_close(context["inputs_embeds"][0], torch.cat([before, chosen, after[1:]]))
    assert context["attention_mask"].tolist() == [[1] * case["negative_prompt_length"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_greedy_answers(case, model):
    name = key_of(case)
    inputs, count = llava.inputs_of(model, GOLDEN.tensors, [case["image"]]), len(case["tokens_8"])
    processor, seen = DAMRO(model, inputs, **options_of(case)), []
    rule = processor.combine
    processor.combine = lambda *scores: seen.append(scores) or rule(*scores)
    tokens, scores, logits = llava.generate(model, inputs, count, processor)
    assert tokens == [case["tokens_8"]]
    llava.same_scores(scores[0], GOLDEN[f"{name}.combined"], name)
    assert scores[0].isfinite().sum(-1).tolist() == case["plausible_per_step"]
    if f"{name}.logits" in GOLDEN.tensors:
        GOLDEN.close(logits[0], f"{name}.logits")
        llava.same_scores(torch.cat([other for _, other, _ in seen]), GOLDEN[f"{name}.logits_negative"], name)
    assert llava.generate(model, inputs, count)[0] == [case["plain_greedy_8"]]


def test_all_images_in_a_batch(model):
    rows = sorted({case["image"] for case in CASES})
    inputs = llava.inputs_of(model, GOLDEN.tensors, rows)
    for ending in {case["name"].split(".", 1)[1] for case in CASES}:
        cases = sorted((case for case in CASES if case["name"].split(".", 1)[1] == ending), key=lambda c: c["image"])
        tokens, _, _ = llava.generate(
            model, inputs, len(cases[0]["tokens_8"]), DAMRO(model, inputs, **options_of(cases[0]))
        )
        assert tokens == [case["tokens_8"] for case in cases]


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "vh": 24, "vl": 2, "vheads": 2, "vi": 32, "img": 32, "patch": 8, "h": 40, "l": 2, "heads": 5, "kv": 5,
        "inter": 48, "vocab": 50, "pre": 3, "txt": 4, "image_token": 1, "vision_feature_layer": -2, "seed": seed,
    }  # fmt: skip
    model, cases = llava.build(settings), []
    tensors = {f"weight.{name}": value for name, value in llava.released(model).items()} | llava.drawn(settings, 2)
    found = {kind: scores_of(model, tensors["input.pixel_values"], merged) for kind, merged in SCORES.items()}
    tensors |= {f"output.scores_{kind}": value for kind, value in found.items()}
    for row in range(2):
        inputs = llava.inputs_of(model, tensors, [row])
        for number, (alpha, k, beta) in enumerate([(1.0, 3, 0.2), (0.5, 6, 0.1)]):
            for order in ("score", "raster"):
                best = {kind: found[kind][row].topk(k).indices.tolist() for kind in SCORES}
                best = {kind: own if order == "score" else sorted(own) for kind, own in best.items()}
                case = {
                    "name": f"{row}.{number}.{order}", "image": row, "alpha": alpha, "k": k, "beta": beta,
                    "order": order, "patches": best["merged"], "patches_per_head_score": best["per_head"],
                    "negative_prompt_length": settings["pre"] + settings["txt"] + k,
                    "plain_greedy_8": llava.generate(model, inputs, 8)[0][0],
                }  # fmt: skip
                tokens, scores, _ = llava.generate(model, inputs, 8, DAMRO(model, inputs, **options_of(case)))
                tensors[f"{key_of(case)}.combined"] = scores[0].masked_fill(scores[0].isneginf(), -1e30)
                cases.append(
                    {**case, "tokens_8": tokens[0], "plausible_per_step": scores[0].isfinite().sum(-1).tolist()}
                )
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)
