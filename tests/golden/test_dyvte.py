"""DyVTE: the released gates, their exits in a small decoder, and the labels that they learn from."""

from pathlib import Path

import pytest
import torch

from hires_lmm.training.objectives import ExitGate, exit_labels
from hires_lmm.training.objectives.base import StepValues
from hires_lmm.training.objectives.exit_gate import answer_losses

from . import decoder
from .base import GoldenSet, write_set


NAME = "dyvte"
GOLDEN = GoldenSet(NAME)
GATES = "model.visual_gates_router."


def build(settings: dict, weights: dict | None = None):
    """A decoder with released gates behind every layer."""
    spec = {"part": "dyvte", "gate": "per_layer", "middle": settings["gate_hidden"]}
    model = decoder.build(settings, [spec], weights)
    if weights is not None:
        gates = {key.removeprefix(GATES): value for key, value in weights.items() if key.startswith(GATES)}
        gates = {key.replace(".w1", ".linear_1").replace(".w2", ".linear_2"): value for key, value in gates.items()}
        model.model.connector.layer_ops[0].gates.load_state_dict(gates)
    return model


@pytest.fixture(scope="module")
def model():
    return build(GOLDEN.cases["settings"], GOLDEN.under("weight."))


def rows(numbers, visual: int | None = None) -> list[tuple]:
    """Prompts of the set, with so many of their visual tokens."""
    parts = (GOLDEN["input.ids_system"], GOLDEN["input.visual"][:, :visual], GOLDEN["input.ids_text"])
    return [tuple(part[number] for part in parts) for number in numbers]


def cases(*ends: str) -> list[dict]:
    return [case for case in GOLDEN.cases["cases"] if case["name"].endswith(ends or "") and "greedy_8" in case]


FORCED = [case for case in cases() if "layers_with_visual" in case and case["name"].startswith("p")]
FORCED = [case for case in FORCED if not case["name"].endswith(".gated")]
PROMPTS = sorted({case["prompt"] for case in FORCED})


@torch.no_grad()
def test_gates_see_what_the_released_ones_see(model):
    """In a batch, and with nobody leaving; the logits are those of the whole model."""
    count = GOLDEN.cases["settings"]["txt"]
    options = {"layer_options": {"exit_after": None}}
    logits, _, aux = decoder.prefill(model, decoder.prompt(rows(PROMPTS)), count, **options)
    for row, number in enumerate(PROMPTS):
        GOLDEN.close(logits[row], f"output.p{number}.full.logits_text")
        found = torch.stack([aux[f"exit_gate/{layer}"][row] for layer in range(GOLDEN.cases["settings"]["layers"])])
        GOLDEN.close(found, f"output.p{number}.gate_logits")


@pytest.mark.parametrize("case", FORCED, ids=lambda case: case["name"])
def test_an_exit_behind_a_given_layer(case):
    """By the gates' option, and by `keep_after` with nothing kept."""
    number, layer = case["prompt"], case["layers_with_visual"] - 1
    settings, wanted = GOLDEN.cases["settings"], f"output.{case['name']}.logits_text"
    batch = decoder.prompt(rows([number]))
    gated = build(settings, GOLDEN.under("weight."))
    none = decoder.build(settings, [{"part": "keep_after", "layers": layer, "share": 0.0}], GOLDEN.under("weight."))
    for model, options in ((gated, {"layer_options": {"exit_after": layer}}), (none, {})):
        logits, lengths, _ = decoder.prefill(model, batch, len(GOLDEN[wanted]), **options)
        GOLDEN.close(logits[0], wanted)
        assert lengths == case["cache_lengths_after_prefill"]
    tokens, steps = decoder.generate(none, batch, len(case["greedy_8"]))
    assert tokens == [case["greedy_8"]]
    if f"output.{case['name']}.logits_steps" in GOLDEN.tensors:
        GOLDEN.close(steps[0], f"output.{case['name']}.logits_steps")


@pytest.mark.parametrize("case", cases(".gated"), ids=lambda case: case["name"])
def test_the_gates_choose_the_layer(model, case):
    batch = decoder.prompt(rows([case["prompt"]]))
    assert decoder.generate(model, batch, len(case["greedy_8"]))[0] == [case["greedy_8"]]
    lengths = decoder.prefill(model, batch, 1)[1]
    whole = GOLDEN.cases["settings"]["prompt_length"]
    assert lengths == case.get("cache_lengths_after_prefill", [whole] * len(lengths))


def test_every_row_of_a_batch_leaves_where_it_would_alone(model):
    found = cases(".gated")
    tokens, _ = decoder.generate(model, decoder.prompt(rows([case["prompt"] for case in found])), 8)
    assert tokens == [case["greedy_8"] for case in found]
    assert len({case.get("exit_layer") for case in found}) > 1


@pytest.mark.parametrize("case", [case for case in cases() if "from_prompt" in case], ids=lambda case: case["name"])
def test_prompts_of_different_length_in_a_batch(case):
    layer = case["layers_with_visual"] - 1
    model = decoder.build(
        GOLDEN.cases["settings"], [{"part": "keep_after", "layers": layer, "share": 0.0}], GOLDEN.under("weight.")
    )
    batch = decoder.prompt([*rows([case["from_prompt"]], case["visual_tokens"]), *rows([0])])
    assert decoder.generate(model, batch, len(case["greedy_8"]))[0][0] == case["greedy_8"]
    count = GOLDEN.cases["settings"]["txt"]
    logits = decoder.prefill(model, batch, count)[0]
    GOLDEN.close(logits[0], f"output.{case['name']}.logits_text")


@pytest.mark.parametrize(
    "case", [case for case in GOLDEN.cases["cases"] if case["name"].startswith("train.")], ids=lambda c: c["name"]
)
def test_the_loss_of_a_gate(model, case, monkeypatch):
    """The objective as a run calls it, at the layer of the case."""
    answers, name = GOLDEN["input.train.ids_answer"].long(), f"output.{case['name']}"
    numbers, count = range(len(answers)), answers.shape[1]
    prompts = [
        (system, visual, torch.cat([text.long(), answer]))
        for (system, visual, text), answer in zip(rows(numbers), answers, strict=True)
    ]
    batch = decoder.on(model, decoder.prompt(prompts))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -count:] = answers
    inputs = {**batch, "labels": labels, **ExitGate.asks}
    model.train()
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(case["exit_layer"]))
    seen = []
    monkeypatch.setattr(
        "hires_lmm.training.objectives.exit_gate.exit_labels", lambda *args: seen.append(args) or exit_labels(*args)
    )
    try:
        outputs = model(**inputs)
        outputs.logits = outputs.logits[..., :-1]  # without the placeholder
        step = StepValues(outputs, {}, inputs, True, model.model, lambda hidden: model.lm_head(hidden)[..., :-1])
        losses = ExitGate()(step)
    finally:
        model.eval()
    GOLDEN.close(losses.mean()[None], f"{name}.gate_ce")
    full, exited, _ = seen[0]
    assert exit_labels(full, exited, labels).tolist() == case["labels"]
    GOLDEN.close(answer_losses(full, labels), f"{name}.loss_full")
    GOLDEN.close(answer_losses(exited, labels), f"{name}.loss_exit")
    GOLDEN.close(step.aux[f"exit_gate/{case['exit_layer']}"], f"{name}.gate_logits")
    losses.sum().backward()
    assert all(
        p.grad.abs().sum() > 0 for p in model.model.connector.layer_ops[0].gates[case["exit_layer"]].parameters()
    )


def test_the_rule_for_labels():
    case = next(case for case in GOLDEN.cases["cases"] if case["name"] == "label_rule")
    given, labels = GOLDEN.under("input.label."), GOLDEN["input.label.labels"].long()
    full, exited = given["logits_full"], given["logits_exit"]
    GOLDEN.close(answer_losses(full, labels), "output.label.loss_full")
    GOLDEN.close(answer_losses(exited, labels), "output.label.loss_exit")
    found = exit_labels(full, exited, labels)
    assert found.tolist() == case["labels"]
    GOLDEN.close(torch.nn.functional.cross_entropy(given["gate_logits"], found)[None], "output.label.gate_ce")


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "hidden": 48, "layers": 5, "heads": 6, "kv": 3, "inter": 56, "vocab": 70, "sys": 5, "vis": 15, "txt": 6,
        "gate_hidden": 9, "theta": 5000.0, "eps": 1e-5, "prompt_length": 26, "seed": seed,
    }  # fmt: skip
    model, num = build(settings), 3
    op = model.model.connector.layer_ops[0]
    system, text = (torch.randint(1, settings["vocab"], (num, settings[name])) for name in ("sys", "txt"))
    visual, answers = (
        torch.randn(num, settings["vis"], settings["hidden"]),
        torch.randint(1, settings["vocab"], (num, 4)),
    )
    names = {".linear_1": ".w1", ".linear_2": ".w2"}
    tensors = {f"weight.{key}": value for key, value in decoder.released(model).items()}
    for key, value in op.gates.state_dict().items():
        tensors[f"weight.{GATES}{key.replace(key[1:10], names[key[1:10]])}"] = value
    tensors |= {"input.ids_system": system, "input.ids_text": text, "input.visual": visual}
    tensors["input.train.ids_answer"] = answers
    prompts, cases, count = list(zip(system, visual, text, strict=True)), [], settings["txt"]

    def forced(layer: int):
        return decoder.build(
            settings, [{"part": "keep_after", "layers": layer, "share": 0.0}], decoder.released(model)
        )

    for number, row in enumerate(prompts):
        batch = decoder.prompt([row])
        logits, _, aux = decoder.prefill(model, batch, count, layer_options={"exit_after": None})
        tensors[f"output.p{number}.full.logits_text"] = logits[0]
        gates = torch.cat([aux[f"exit_gate/{layer}"] for layer in range(settings["layers"])])
        tensors[f"output.p{number}.gate_logits"] = gates
        for k in range(1, settings["layers"]):
            other, name = forced(k - 1), f"p{number}.k{k}"
            logits, lengths, _ = decoder.prefill(other, batch, count)
            tokens, steps = decoder.generate(other, batch, 8)
            tensors |= {f"output.{name}.logits_text": logits[0], f"output.{name}.logits_steps": steps[0]}
            cases.append({"name": name, "prompt": number, "layers_with_visual": k, "greedy_8": tokens[0],
                          "cache_lengths_after_prefill": lengths})  # fmt: skip
        leaves = (gates[:, 1] > gates[:, 0]).nonzero()[:, 0].tolist()
        tokens, lengths = decoder.generate(model, batch, 8)[0][0], decoder.prefill(model, batch, 1)[1]
        cases.append({"name": f"p{number}.gated", "prompt": number, "exit_layer": leaves[0] if leaves else None,
                      "greedy_8": tokens, "cache_lengths_after_prefill": lengths})  # fmt: skip
    short = decoder.prompt([(system[1], visual[1, :7], text[1])])
    tensors["output.short.k2.logits_text"] = decoder.prefill(forced(1), short, count)[0][0]
    cases.append({"name": "short.k2", "from_prompt": 1, "visual_tokens": 7, "layers_with_visual": 2,
                  "greedy_8": decoder.generate(forced(1), short, 8)[0][0]})  # fmt: skip
    longer = decoder.prompt([(s, v, torch.cat([t, a])) for (s, v, t), a in zip(prompts, answers, strict=True)])
    labels = torch.full_like(longer["input_ids"], -100)
    labels[:, -answers.shape[1] :] = answers
    mask = {"prompt_mask": labels == -100}  # evaluation reads no labels
    full, _, aux = decoder.prefill(model, longer, 0, layer_options={"exit_after": None}, **mask)
    for layer in range(settings["layers"]):
        exited = decoder.prefill(model, longer, 0, layer_options={"exit_after": layer}, **mask)[0]
        wanted, logits, name = exit_labels(full, exited, labels), aux[f"exit_gate/{layer}"], f"output.train.e{layer}"
        cases.append({"name": f"train.e{layer}", "exit_layer": layer, "labels": wanted.tolist()})
        tensors |= {
            f"{name}.loss_full": answer_losses(full, labels),
            f"{name}.loss_exit": answer_losses(exited, labels),
            f"{name}.gate_logits": logits,
            f"{name}.gate_ce": torch.nn.functional.cross_entropy(logits, wanted)[None],
        }
    given = {
        "labels": torch.randint(0, 9, (4, 7)),
        "logits_full": torch.randn(4, 7, 9),
        "gate_logits": torch.randn(4, 2),
    }
    given["logits_exit"] = given["logits_full"] + torch.tensor([0.0, 1e-3, 0.5, 2.0])[:, None, None] * torch.randn(
        4, 7, 9
    )
    wanted = exit_labels(given["logits_full"], given["logits_exit"], given["labels"])
    cases.append({"name": "label_rule", "labels": wanted.tolist()})
    tensors |= {f"input.label.{key}": value for key, value in given.items()}
    for kind in ("full", "exit"):
        tensors[f"output.label.loss_{kind}"] = answer_losses(given[f"logits_{kind}"], given["labels"])
    tensors["output.label.gate_ce"] = torch.nn.functional.cross_entropy(given["gate_logits"], wanted)[None]
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)
