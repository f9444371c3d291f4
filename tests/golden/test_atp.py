"""ATP-LLaVA: scores, thresholds, masks and loss terms, and hard pruning at two layers of a small decoder.

Of the readings of the paper that the set holds, ours are `received` and `bias`; others are not built.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hires_lmm.modeling.atp_hires_lmm import HiResLmmAtp, spatial_scores
from hires_lmm.modeling.bases_hires_lmm import LayerCall, PartContext
from hires_lmm.training.objectives import TokenBudget, token_budget

from . import decoder
from .base import GoldenSet, write_set


NAME = "atp"
GOLDEN = GoldenSet(NAME)
HEADS = {"proj": "middle", "redundant": "redundancy", "spatial": "spatial"}


def cases(start: str) -> list[dict]:
    return [case for case in GOLDEN.cases["cases"] if case["name"].startswith(start)]


def rates_of(settings: dict) -> list[float]:
    return next(case["spatial_rates"] for case in GOLDEN.cases["cases"] if "spatial_rates" in case)


def options_of(settings: dict, activation: str, rates: list[float]) -> dict:
    return {
        "middle": settings["m"], "activation": activation, "rates": rates, "factor": settings["lam"],
        "temperature": settings["T"],
    }  # fmt: skip


def heads_of(tensors: dict, prefix: str) -> dict:
    """Weights of the heads of one layer, by our names."""
    return {
        f"{ours}.{kind}": tensors[f"{prefix}.{theirs}.{kind}"]
        for theirs, ours in HEADS.items()
        for kind in ("weight", "bias")
    }


class Given:
    """The attention of a layer whose logits are known, whatever is seen."""

    def __init__(self, logits: torch.Tensor):
        self.all = logits
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        self.probabilities = logits.masked_fill(~causal, float("-inf")).softmax(dim=-1)

    def take(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return values.gather(2, rows[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.take(self.all, rows)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self.take(self.probabilities, rows)


def call_of(settings: dict, logits: torch.Tensor, training: bool) -> LayerCall:
    """A prompt of system text, a grid of visual tokens and text, whose attention is known."""
    count, length = settings["gh"] * settings["gw"], logits.shape[-1]
    places = torch.arange(length).expand(len(logits), -1)
    token = torch.where((places >= settings["sys"]) & (places < settings["sys"] + count), places - settings["sys"], -1)
    cells = torch.stack([torch.arange(count) // settings["gw"], torch.arange(count) % settings["gw"]], dim=1)
    tokens = SimpleNamespace(cell=cells, view=torch.zeros(count))
    real, last = torch.ones_like(token, dtype=torch.bool), torch.full((len(logits),), length - 1)
    return LayerCall(places, real, token >= 0, last, token, tokens, Given(logits), True, training, {})


def part_of(settings: dict, activation: str, rates: list[float], heads: dict | None = None) -> HiResLmmAtp:
    options = HiResLmmAtp.Options(layers=0, **options_of(settings, activation, rates))
    part = HiResLmmAtp(PartContext(None, 8, 8, {}, (1, 1), layers=(0,)), options)
    if heads is not None:
        part.thresholds[0].load_state_dict(heads)
    return part


def visual(settings: dict, values: torch.Tensor) -> torch.Tensor:
    return values[:, settings["sys"] : settings["sys"] + settings["gh"] * settings["gw"]]


def test_the_scores_of_a_layer():
    settings = GOLDEN.cases["settings"]
    part, logits = part_of(settings, "none", rates_of(settings)), GOLDEN["input.attention_logits"]
    redundancy, _, means = part.scores(call_of(settings, logits, False))
    GOLDEN.close(visual(settings, redundancy), "output.S_r")
    for column, name in enumerate(("S_self_received", "S_cross")):
        torch.testing.assert_close(means[:, column], GOLDEN[f"output.{name}"].mean(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", cases("spatial."), ids=lambda case: case["name"])
def test_the_spatial_score(case):
    rows, cols = (torch.arange(size) for size in case["grid"])
    cells = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1)
    found = spatial_scores(cells, case["rates"], GOLDEN.cases["settings"]["lam"])
    GOLDEN.close(found, f"output.{case['name']}")
    assert int((found > 0).sum()) == case["sampled"]


@pytest.mark.parametrize("case", cases("masks."), ids=lambda case: case["name"])
@torch.no_grad()
def test_thresholds_and_masks(case):
    settings, activation = GOLDEN.cases["settings"], case["name"].partition(".")[2]
    part = part_of(settings, activation, case["spatial_rates"], heads_of(GOLDEN.tensors, "weight.heads"))
    logits = GOLDEN["input.attention_logits"]
    soft, hard = (call_of(settings, logits, training) for training in (True, False))
    for name, found in zip(("theta_r", "theta_s"), part.thresholds[0](part.scores(hard)[2]), strict=True):
        GOLDEN.close(found, f"output.{name}.{activation}")
    hidden = torch.zeros(*logits.shape[:1], logits.shape[-1], 8)
    GOLDEN.close(visual(settings, part(0, hidden, soft)[1]), f"output.soft_mask.{activation}")
    kept = visual(settings, part(0, hidden, hard)[1])
    assert kept.tolist() == GOLDEN[f"output.hard_keep.{activation}"].bool().tolist()
    for call, name in ((soft, "soft_count"), (hard, "kept")):
        assert call.aux["token_budget/0"][:, 0].tolist() == pytest.approx(case[name], rel=1e-4)


@pytest.mark.parametrize("case", cases("loss_"), ids=lambda case: case["name"])
def test_the_two_terms_of_the_loss(case):
    weights, target = case["name"].removeprefix("loss_w").split("_target")
    masks = torch.stack([GOLDEN[f"input.loss.mask{number}"] for number in range(len(case["layers"]))])
    kept, totals = masks.sum(dim=-1), torch.full((masks.shape[1],), float(case["N0"]))
    share, distance = token_budget(kept, totals, case["layers"], float(target))
    assert (float(share), float(distance)) == pytest.approx((case["L_atp"], case["L_target"]), rel=1e-4)
    objective = TokenBudget(float(target), *map(float, weights.split("_")))
    aux = {
        f"token_budget/{layer - 1}": torch.stack([own, totals], dim=1)
        for layer, own in zip(case["layers"], kept, strict=True)
    }
    assert float(objective(SimpleNamespace(aux=aux))) == pytest.approx(case["weighted_sum"], rel=1e-4)


def build(settings: dict, rates: list[float], weights: dict | None = None):
    """A decoder that prunes behind the layers of a set."""
    spec = {"part": "atp", "layers": settings["after"], **options_of(settings, "none", rates)}
    model = decoder.build(settings, [spec], weights)
    for layer, head in zip(settings["after"], model.model.connector.layer_ops[0].thresholds, strict=True):
        if weights is not None:
            head.load_state_dict(heads_of(weights, f"layer{layer}"))
    return model


def prompt_of(number: int, settings: dict, tensors: dict) -> dict:
    parts = (tensors[f"input.{name}"][number] for name in ("ids_system", "visual", "ids_text"))
    return decoder.prompt([tuple(parts)], (settings["gh"], settings["gw"]))


@pytest.mark.parametrize("case", cases("decoder."), ids=lambda case: case["name"])
def test_pruning_in_a_decoder(case):
    settings = GOLDEN.cases["settings"]
    model = build(settings, case["spatial_rates"], GOLDEN.under("weight."))
    batch = prompt_of(case["prompt"], settings, GOLDEN.tensors)
    wanted = GOLDEN[f"output.{case['name']}.logits_text"]
    logits, lengths, aux = decoder.prefill(model, batch, len(wanted))
    GOLDEN.close(logits[0], f"output.{case['name']}.logits_text")
    assert lengths == case["cache_lengths"]
    for layer in case["after_layers"]:
        assert int(aux[f"token_budget/{layer}"][0, 0]) == len(case["kept"][str(layer)])
    tokens, steps = decoder.generate(model, batch, len(case["greedy_6"]))
    assert tokens == [case["greedy_6"]]
    GOLDEN.close(steps[0], f"output.{case['name']}.logits_steps")


# ---- a set at other sizes


@torch.no_grad()
def remake(folder: Path, seed: int) -> None:
    settings = {
        "gh": 4, "gw": 5, "sys": 2, "txt": 4, "m": 6, "lam": 2.0, "T": 7.0, "hidden": 24, "layers": 4, "heads": 4,
        "kv": 2, "inter": 32, "vocab": 40, "theta": 9000.0, "eps": 1e-5, "after": [0, 2], "seed": seed,
    }  # fmt: skip
    rates, count, length = [1 / 4, 1 / 9], settings["gh"] * settings["gw"], 26
    logits, cases, masks = torch.randn(2, 3, length, length), [], torch.rand(2, 3, count)
    logits += 3 * torch.rand(2, 1, 1, length)  # some tokens get more than others
    tensors = {"input.attention_logits": logits}
    for activation in ("none", "relu"):
        part = part_of(settings, activation, rates)
        if activation == "none":
            shared = part.thresholds[0].state_dict()
            names = {ours: theirs for theirs, ours in HEADS.items()}
            for key, value in shared.items():
                head, _, kind = key.partition(".")
                tensors[f"weight.heads.{names[head]}.{kind}"] = value
        part.thresholds[0].load_state_dict(shared)
        soft, hard = (call_of(settings, logits, training) for training in (True, False))
        redundancy, _, means = part.scores(hard)
        for name, value in zip(("theta_r", "theta_s"), part.thresholds[0](means), strict=True):
            tensors[f"output.{name}.{activation}"] = value
        hidden = torch.zeros(2, length, 8)
        tensors[f"output.soft_mask.{activation}"] = visual(settings, part(0, hidden, soft)[1])
        tensors[f"output.hard_keep.{activation}"] = visual(settings, part(0, hidden, hard)[1]).byte()
        counts = {n: call.aux["token_budget/0"][:, 0].tolist() for n, call in (("soft_count", soft), ("kept", hard))}
        cases.append({"name": f"masks.{activation}", "spatial_rates": rates, **counts})
    tensors["output.S_r"] = visual(settings, redundancy)
    for column, name in enumerate(("S_self_received", "S_cross")):
        tensors[f"output.{name}"] = means[:, column, None].expand(-1, count)
    for number, (grid, own) in enumerate((((3, 7), [1 / 4]), ((6, 4), rates))):
        cells = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1)
        found = spatial_scores(cells, own, settings["lam"])
        tensors[f"output.spatial.{number}"] = found
        cases.append({"name": f"spatial.{number}", "grid": grid, "rates": own, "sampled": int((found > 0).sum())})
    share, distance = token_budget(masks.sum(-1), torch.full((3,), float(count)), [2, 5], 9.0)
    cases.append({"name": "loss_w0.1_0.3_target9.0", "layers": [2, 5], "N0": count, "L_atp": float(share),
                  "L_target": float(distance), "weighted_sum": float(0.1 * share + 0.3 * distance)})  # fmt: skip
    tensors |= {f"input.loss.mask{number}": mask for number, mask in enumerate(masks)}
    model = build(settings, rates)
    for head in model.model.connector.layer_ops[0].thresholds:
        head.redundancy.bias.sub_(2.0)  # low enough for some
    tensors |= {f"weight.{key}": value for key, value in decoder.released(model).items()}
    for layer, head in zip(settings["after"], model.model.connector.layer_ops[0].thresholds, strict=True):
        for key, value in head.state_dict().items():
            name, _, kind = key.partition(".")
            tensors[f"weight.layer{layer}.{names[name]}.{kind}"] = value
    for name, shape in (("ids_system", settings["sys"]), ("ids_text", settings["txt"])):
        tensors[f"input.{name}"] = torch.randint(1, settings["vocab"], (2, shape))
    tensors["input.visual"] = torch.randn(2, count, settings["hidden"])
    for number in range(2):
        batch, name = prompt_of(number, settings, tensors), f"decoder.{number}"
        found, lengths, aux = decoder.prefill(model, batch, settings["txt"])
        tokens, steps = decoder.generate(model, batch, 6)
        tensors |= {f"output.{name}.logits_text": found[0], f"output.{name}.logits_steps": steps[0]}
        kept = {str(at): [0] * int(aux[f"token_budget/{at}"][0, 0]) for at in settings["after"]}
        cases.append({"name": name, "prompt": number, "after_layers": settings["after"], "kept": kept,
                      "cache_lengths": lengths, "greedy_6": tokens[0], "spatial_rates": rates})  # fmt: skip
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)
