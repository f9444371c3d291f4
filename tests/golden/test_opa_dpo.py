"""OPA-DPO's terms on given log-probabilities, the whole loss through the trainer, and its mask."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hires_lmm.training.preference import anchor_losses, mask_pixels, pair_losses

from .base import GoldenSet, write_set


NAME = "opa_dpo"
GOLDEN = GoldenSet(NAME)
POLICIES = ("policy.standard", "policy.ai", "policy.original", "policy_masked.standard", "policy_masked.ai")


def ratios(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log ratios by name: `standard`, `masked.standard`, ..."""
    return {
        name.replace("policy_masked", "masked").removeprefix("policy."): tensors[name]
        - tensors[name.replace("policy", "reference")]
        for name in POLICIES
    }


def terms(tensors: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """The four pairs at each position, the anchor and the sum, as the release puts them together."""
    r, beta = ratios(tensors), settings["beta"]
    of_ai, of_original, of_image = (tensors[f"scores.{name}"] for name in ("ai", "original", "relation"))
    pairs = [
        (r["standard"], r["original"]),
        (r["ai"] * of_ai, r["original"] * of_original),
        (r["standard"], r["masked.standard"]),
        (r["ai"] * of_image, r["masked.ai"] * of_image),
    ]
    found = {f"pair{index + 1}": pair_losses(*pair, beta) for index, pair in enumerate(pairs)}
    anchors = [
        anchor_losses(r[name], beta, name == "standard", settings["anchor_value"]) for name in ("standard", "ai") * 2
    ]
    weights = [settings[name] for name in ("standard_pair", "ai_pair", "image_mask_pair", "image_mask_pair")]
    total = sum(weight * found[f"pair{index + 1}"].mean() for index, weight in enumerate(weights))
    anchor = torch.stack([each.mean() for each in anchors]).sum()
    return {**found, "anchor": anchor, "loss": total + settings["anchor"] * anchor}


def test_the_terms():
    found = terms(GOLDEN.tensors, GOLDEN.cases["settings"])
    for name, value in found.items():
        GOLDEN.close(value, name)
        assert value.mean().item() == pytest.approx(GOLDEN.cases["values"][name], abs=1e-4)


def test_the_gradients():
    tensors = dict(GOLDEN.tensors)
    tensors |= {name: tensors[name].clone().requires_grad_() for name in POLICIES}
    terms(tensors, GOLDEN.cases["settings"])["loss"].backward()
    for name in POLICIES:
        GOLDEN.close(tensors[name].grad, f"grad.{name}", atol=1e-6)


def test_the_mask():
    torch.manual_seed(GOLDEN.cases["seed"])
    GOLDEN.close(mask_pixels(GOLDEN["image"], GOLDEN.cases["settings"]["mask_ratio"]), "image_masked_random", atol=0)


def test_the_trainer_gives_half_the_sum_over_both_rows_of_a_picture():
    """Rows (truth, original) and (revised, original); all positions count, so that padding does as in the release."""
    pytest.importorskip("trl")
    from trl import DPOTrainer

    from hires_lmm.training.preference.image_masked import ImageMaskedDPOTrainer

    settings, number, length = GOLDEN.cases["settings"], *GOLDEN["policy.standard"].shape
    shown = ("standard", "ai", "original", "original")

    def answer(which: str):
        names = [f"{which}.{name}" for name in shown] + [f"{which}_masked.{name}" for name in ("standard", "ai")]
        return torch.cat([GOLDEN[name] for name in names])

    class Output(dict):
        __getattr__ = dict.__getitem__

    def model(which: str):
        values = answer(which)
        names = ("entropy", "mean_logits", "is_top1")
        return lambda **_: Output(log_probs=values, **{name: torch.ones_like(values) > 0 for name in names})

    trainer = object.__new__(ImageMaskedDPOTrainer)
    vars(trainer).update(
        model=SimpleNamespace(training=True),
        ref_model=SimpleNamespace(),
        args=SimpleNamespace(
            level="token", mask_share=settings["mask_ratio"], image_weight=settings["image_mask_pair"],
            anchor_weight=2 * settings["anchor"], anchor_offset=settings["anchor_value"], anchor_revised="down",
        ),
        beta=settings["beta"], aux_loss_enabled=False, _log_losses=lambda **_: None,
        _reference_log_probs=lambda rows: answer("reference"),
    )  # fmt: skip
    ones = torch.ones_like(GOLDEN["scores.ai"])
    weights = torch.cat([ones, GOLDEN["scores.ai"], ones, GOLDEN["scores.original"]])
    pad = lambda values: torch.cat([torch.ones(len(values), 1), values], dim=1)  # noqa: E731
    inputs = {
        "input_ids": torch.zeros(4 * number, length + 1, dtype=torch.long),
        "completion_mask": torch.ones(4 * number, length + 1, dtype=torch.long),
        "pixel_values": torch.zeros(4 * number, 3, 2, 2),
        "revised": torch.arange(2 * number) >= number,
        "answer_weights": pad(weights),
        "image_weights": pad(torch.cat([ones, GOLDEN["scores.relation"]])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "_compute_loss", lambda *_: torch.tensor(float("nan")))
        loss = trainer._compute_loss(model("policy"), inputs, False)
    assert 2 * loss.item() == pytest.approx(GOLDEN.cases["values"]["loss"], abs=1e-4)


def remake(folder: Path, seed: int) -> None:
    """Another set, from our own functions."""
    settings = {**GOLDEN.cases["settings"], "beta": 0.2, "mask_ratio": 0.45, "image_mask_pair": 0.5}
    names = [*POLICIES, *(name.replace("policy", "reference") for name in POLICIES)]
    tensors = {name: -2 * torch.rand(3, 7) for name in names}
    tensors |= {f"scores.{name}": 1 + torch.rand(3, 7) for name in ("ai", "original", "relation")}
    leaves = {name: tensors[name].clone().requires_grad_() for name in POLICIES}
    found = terms({**tensors, **leaves}, settings)
    found["loss"].backward()
    image = torch.randn(1, 3, 20, 12)
    torch.manual_seed(seed)
    masked = mask_pixels(image, settings["mask_ratio"])
    tensors |= {"image": image, "image_masked_random": masked, **found}
    tensors |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    values = {name: value.mean().item() for name, value in found.items()}
    write_set(folder, {"settings": settings, "values": values, "seed": seed}, tensors)
