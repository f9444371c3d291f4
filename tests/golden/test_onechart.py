"""OneChart's decoder of numbers: predictions, loss and gradient, and the check of what was written."""

from pathlib import Path

import pytest
import torch

from builders import tiny_config, tiny_model, tiny_processor, tiny_text_config
from builders.tiny import make_batch, random_image
from hires_lmm.charts import check_numbers

from .base import GoldenSet, write_set


NAME = "onechart"
GOLDEN = GoldenSet(NAME)
NUMBER = 7
"""Id of the token, which the texts below hold nowhere."""


def build(settings: dict):
    heads = {"numbers": {"part": "number_decoder", "token_id": NUMBER, "slots": settings["slots"], "weight": 2.0}}
    text = tiny_text_config("llama", hidden_size=settings["width"])
    config = tiny_config("llava_next", text=text, connector_config={"heads": heads})
    return tiny_model(config), tiny_processor(config)


def labels_of(numbers: list[list[float]], slots: int) -> torch.Tensor:
    """`(N, slots)`, NaN behind the numbers of each chart."""
    return torch.stack([torch.tensor([*own, *[float("nan")] * (slots - len(own))]) for own in numbers])


def run(tensors: dict, settings: dict, numbers: list[list[float]]):
    """The model with the released weights; the given states stand in place of what its language model gives at the
    tokens, of which rows have different numbers at different places."""
    model, processor = build(settings)
    weights = {name.removeprefix("weight."): value for name, value in tensors.items() if name.startswith("weight.")}
    model.model.connector.heads["numbers"].load_state_dict(weights)
    batch = make_batch(processor, [("<image>What is it?", [random_image(*size)]) for size in ((90, 60), (40, 200))])
    places = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    places[0, -4], places[1, -len(numbers) :] = True, torch.arange(len(numbers)) > 0
    batch["input_ids"][places] = NUMBER
    states = tensors["hidden"].clone().requires_grad_()

    def put(module, args, output):
        output.last_hidden_state = output.last_hidden_state.detach().masked_scatter(places[..., None], states)
        return output

    model.model.language_model.register_forward_hook(put)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 4, -100)
    plain = model(**batch, labels=labels)
    outputs = model(**batch, labels=labels, labels_numbers=labels_of(numbers, settings["slots"]))
    outputs.aux["loss/numbers"].backward()
    found = {"prediction": outputs.heads["numbers"].detach(), "loss": outputs.aux["loss/numbers"].detach()}
    return {**found, "grad.hidden": states.grad}, (outputs.loss - plain.loss).item()


def checks(numbers: list[list[float]], prediction: torch.Tensor) -> list[dict]:
    return [
        {"sample": row, **check_numbers(own, prediction[row])._asdict()} for row, own in enumerate(numbers)
    ]  # fmt: skip


def test_prediction_loss_and_gradient():
    found, added = run(GOLDEN.tensors, GOLDEN.cases["settings"], GOLDEN.cases["numbers"])
    for name, value in found.items():
        GOLDEN.close(value, name, atol=1e-5)
    assert added == pytest.approx(2 * GOLDEN["loss"].item(), rel=1e-4)


def test_the_check():
    found = checks(GOLDEN.cases["numbers"], GOLDEN["prediction"])
    for own, wanted in zip(found, GOLDEN.cases["self_check"], strict=True):
        assert own["distance"] == pytest.approx(wanted["distance"], abs=1e-4)
        assert own["reliable"] == wanted["reliable"]


def remake(folder: Path, seed: int) -> None:
    """Another set, by our own part: other sizes, and predictions that agree with one of the charts."""
    settings = {**GOLDEN.cases["settings"], "width": 24, "slots": 6}
    numbers = [[2.0, 8.0, 5.0], [4.0, 4.0], [1.0, 3.0, 2.0, 2.5, 1.5, 7.0]]
    names = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    shapes = ((12, 24), (12,), (12, 12), (12,), (6, 12), (6,))
    tensors = {
        f"weight.num_decoder.{name}": 0.3 * torch.randn(*shape) for name, shape in zip(names, shapes, strict=True)
    }
    tensors["hidden"] = torch.randn(3, 24)
    tensors |= run(tensors, settings, numbers)[0]
    told = checks(numbers, tensors["prediction"])
    write_set(folder, {"settings": settings, "numbers": numbers, "self_check": told, "seed": seed}, tensors)
