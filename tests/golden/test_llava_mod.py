"""LLaVA-MoD's mimic loss; and its preference losses, which are those of TRL, through TRL's own methods."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hires_lmm.training.objectives import Mimic, StepValues, mimic_losses
from hires_lmm.training.objectives import mimic as mimic_file

from .base import GoldenSet, write_set


pytest.importorskip("trl")

from trl import DPOTrainer, KTOTrainer


NAME = "llava_mod"
GOLDEN = GoldenSet(NAME)
CASES = GOLDEN.cases["preference"]
STUDENT, TEACHER = "student_logits", "teacher_logits"
LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


class Teacher:
    """A second model that gives these logits, in which rows begin with more tokens than the student's."""

    def __init__(self, logits: torch.Tensor, ahead: int):
        self.logits = torch.nn.functional.pad(logits, (0, 0, ahead, 0), value=9.0)
        self.model = SimpleNamespace(forward=lambda input_ids: None)

    def __call__(self, inputs: dict, logits_to_keep: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, logits_to_keep])


def mimic(student: torch.Tensor, tensors: dict[str, torch.Tensor], compat: str | None) -> torch.Tensor:
    """The objective on answers, as a run weighs it: the mean over the tokens of all rows."""
    labels, ahead = tensors["labels"], 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mimic_file, "SecondModel", lambda **_: Teacher(tensors[TEACHER], ahead))
        objective = Mimic("teacher", compat=compat)
    read = {"labels": torch.nn.functional.pad(labels, (ahead, 0), value=-100)}
    outputs, columns = SimpleNamespace(logits=student), {mimic_file.COLUMN: read}
    rows = objective(StepValues(outputs, columns, {"labels": labels}, True, None))
    shares = ((labels if compat else labels[:, 1:]) != -100).sum(dim=1)
    return (rows * shares / shares.sum()).sum()


def mimic_all(student: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """At every position, prompts too."""
    return mimic_losses(student.flatten(0, 1), tensors[TEACHER].flatten(0, 1), compat="release").mean()


def mimics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each loss and its gradient by name, those of the released code and the shifted divergence."""
    found = {}
    ways = {
        "mimic_response": lambda own: mimic(own, tensors, "release"),
        "mimic_all": lambda own: mimic_all(own, tensors),
        "kl_shifted_response": lambda own: mimic(own, tensors, None),
    }
    for name, way in ways.items():
        student = tensors[STUDENT].clone().requires_grad_()
        value = way(student)
        value.backward()
        found |= {name: value.detach(), f"{name}.grad": student.grad}
    return found


def test_the_mimic_losses_and_their_gradients():
    found = mimics(GOLDEN.tensors)
    for name, value in found.items():
        if name in GOLDEN.tensors:
            GOLDEN.close(value, name, atol=1e-6 if name.endswith("grad") else 1e-4)
    for case in GOLDEN.cases["mimic"]:
        assert found[case["tensor"]].item() == pytest.approx(case["value"], abs=1e-4)


class Output(dict):
    """What TRL's fused head returns."""

    def __init__(self, logps: torch.Tensor):
        columns = logps[:, None]
        others = {"entropy": columns, "mean_logits": columns, "is_top1": columns > 0, "aux_loss": None}
        super().__init__(log_probs=columns, **others)

    __getattr__ = dict.__getitem__


def trainer(beta: float, **values: Any) -> SimpleNamespace:
    """As much of a trainer as the loss reads."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    both = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "beta": beta,
        "aux_loss_enabled": False,
    }
    return SimpleNamespace(
        **both,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        precompute_ref_logps=True,
        **values,
    )


def batch(number: int) -> dict[str, torch.Tensor]:
    """Answers of one token."""
    ones = torch.ones(number, 2, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": ones * torch.tensor([0, 1])}


def dpo(logps: dict[str, torch.Tensor], case: dict) -> torch.Tensor:
    """Each pair by itself. The smoothed sigmoid is a mixture of TRL's sigmoid and its unbiased form of it."""
    smoothing = case["label_smoothing"]
    mixed = {"loss_types": ["sigmoid", "robust"], "loss_weights": [2 * (1 - smoothing), 2 * smoothing - 1]}
    plain = {"loss_types": [case["loss_type"]], "loss_weights": [1.0]}
    me = trainer(
        case["beta"], ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, label_smoothing=smoothing,
        **(mixed if smoothing else plain),
    )  # fmt: skip
    found = []
    for pair in zip(*(logps[name] for name in LOGPS), strict=True):
        chosen, rejected, ref_chosen, ref_rejected = (value.reshape(1) for value in pair)
        inputs = {**batch(2), "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        output = Output(torch.cat([chosen, rejected]))
        found.append(DPOTrainer._compute_loss(me, lambda output=output, **_: output, inputs, False))
    return torch.stack(found)


def kto_pair(logps: dict[str, torch.Tensor], case: dict) -> torch.Tensor:
    """Losses of the chosen answers beside the divergence on the rejected ones, then the other way round."""
    found = []
    for label, name, other in ((True, "chosen", "rejected"), (False, "rejected", "chosen")):
        for index in range(len(logps["policy_chosen"])):
            me = trainer(
                case["beta"], calculate_KL=True, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0,
                _compute_kl_logps=lambda *_, other=other: logps[f"policy_{other}"],
            )  # fmt: skip
            inputs = {
                **batch(1),
                "label": torch.tensor([label]),
                "ref_logps": logps[f"reference_{name}"][index : index + 1],
                "ref_KL_logps": logps[f"reference_{other}"],
            }
            output = Output(logps[f"policy_{name}"][index : index + 1])
            found.append(KTOTrainer._compute_loss(me, lambda output=output, **_: output, inputs, False))
    return torch.stack(found)


def losses(logps: dict[str, torch.Tensor], case: dict) -> torch.Tensor:
    return (kto_pair if case["loss_type"] == "kto_pair" else dpo)(logps, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tensor"])
def test_the_losses_and_their_gradients(case):
    logps = {name: GOLDEN[name].clone().requires_grad_(name.startswith("policy")) for name in LOGPS}
    found = losses(logps, case)
    GOLDEN.close(found, case["tensor"])
    assert found.mean().item() == pytest.approx(case["mean"], abs=1e-4)
    if case["loss_type"] == "kto_pair":
        return  # the release derives the divergence too, TRL holds it fixed, as KTO's paper does
    found.mean().backward()
    for name in ("chosen", "rejected"):
        GOLDEN.close(logps[f"policy_{name}"].grad, f"{case['tensor']}.grad_{name}", atol=1e-6)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Through TRL's fused head, over a model that gives logits: its head is the identity."""
    from trl.trainer.utils import add_fused_lm_head

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
            self.head.weight.data = torch.eye(logits.shape[-1])
            text = SimpleNamespace(model_type="llama")
            self.config = SimpleNamespace(get_text_config=lambda: text)

        def get_output_embeddings(self):
            return self.head

        def base_model(self, **_):
            return SimpleNamespace(last_hidden_state=logits, get=lambda *_: None)

        def forward(self, **_):
            return None

    model = Model()
    add_fused_lm_head(model)
    with torch.no_grad():
        return model(labels=labels, fused_lm_head=True).log_probs.sum(dim=1)


def test_log_probabilities_of_sequences():
    GOLDEN.close(sequence_logps(GOLDEN["student_logits"], GOLDEN["labels"]), "sequence_logps")


def remake(folder: Path, seed: int) -> None:
    """Another set, by our own loss and TRL's methods."""
    beta = 0.25
    tensors = {name: -20 * torch.rand(5) - 5 for name in LOGPS}
    tensors |= {name: torch.randn(2, 9, 11) for name in (STUDENT, TEACHER)}
    tensors["labels"] = torch.randint(0, 11, (2, 9)).masked_fill(torch.arange(9) < torch.tensor([[3], [5]]), -100)
    tensors |= mimics(tensors)
    tensors["sequence_logps"] = sequence_logps(tensors[STUDENT], tensors["labels"])
    settled = [{**case, "value": tensors[case["tensor"]].item()} for case in GOLDEN.cases["mimic"]]
    cases = [{**case, "beta": beta} for case in CASES]
    for case in cases:
        logps = {name: tensors[name].clone().requires_grad_(name.startswith("policy")) for name in LOGPS}
        tensors[case["tensor"]] = found = losses(logps, case)
        case["mean"] = found.mean().item()
        found.mean().backward()
        for name in ("chosen", "rejected"):
            tensors[f"{case['tensor']}.grad_{name}"] = logps[f"policy_{name}"].grad
    write_set(folder, {**GOLDEN.cases, "seed": seed, "mimic": settled, "preference": cases}, tensors)
