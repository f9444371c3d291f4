"""CG-VLM: similarities, both halves of the loss, and the gradient of an image."""

import math
from pathlib import Path

import pytest
import torch

from hires_lmm.training.objectives.cg_vlm import image_vectors, text_vectors
from hires_lmm.training.objectives.contrastive_math import contrast

from .base import GoldenSet, write_set


NAME = "cg_vlm"
GOLDEN = GoldenSet(NAME)


def measure(tensors: dict, settings: dict, case: dict) -> dict:
    """Everything that a set says of a case, by the names of the set."""
    features = tensors["input.features"].clone().requires_grad_()
    pooled = case["name"].startswith("pool_then")
    images = image_vectors(features, (settings["gh"], settings["gw"]), case.get("pool", 1), pooled)
    texts = text_vectors(tensors["input.embedding_table"][tensors["input.ids"]], tensors["input.mask"], pooled)
    loss = contrast(images, texts, torch.tensor(-math.log(case["tau"])))
    loss.backward()
    similarity = images.detach() @ texts.T
    own = torch.arange(len(similarity))
    cross_entropy = torch.nn.functional.cross_entropy
    return {
        "similarity": similarity,
        "loss": loss.item(),
        "i2t": cross_entropy(similarity / case["tau"], own).item(),
        "t2i": cross_entropy(similarity.T / case["tau"], own).item(),
        "grad_features_image0": features.grad[0],
    }


@pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["name"])
def test_the_loss(case):
    found = measure(GOLDEN.tensors, GOLDEN.cases["settings"], case)
    GOLDEN.close(found["similarity"], f"output.{case['name'].partition('.tau')[0]}.similarity")
    for name in ("loss", "i2t", "t2i"):
        if name in case:
            assert found[name] == pytest.approx(case[name], rel=1e-4, abs=1e-4)
    if f"output.{case['name']}.grad_features_image0" in GOLDEN.tensors:
        GOLDEN.close(found["grad_features_image0"], f"output.{case['name']}.grad_features_image0", atol=1e-6)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"B": 4, "gh": 4, "gw": 8, "D": 20, "vocab": 30, "T": 6}
    lengths = torch.tensor([6, 1, 4, 3])
    tensors = {
        "input.features": torch.randn(4, 32, 20),
        "input.embedding_table": torch.randn(30, 20),
        "input.ids": torch.randint(0, 30, (4, 6)),
        "input.mask": (torch.arange(6) < lengths[:, None]).long(),
    }
    names = [({"pool": pool}, f"k{pool}") for pool in (1, 2, 4)] + [({}, "pool_then_normalise_all")]
    cases = []
    for options, name in names:
        for tau in (0.1, 0.5):
            case = {"name": f"{name}.tau{tau}", "tau": tau, **options}
            found = measure(tensors, settings, case)
            tensors[f"output.{name}.similarity"] = found["similarity"]
            tensors[f"output.{case['name']}.grad_features_image0"] = found["grad_features_image0"]
            cases.append({**case, **{each: found[each] for each in ("loss", "i2t", "t2i")}})
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)
