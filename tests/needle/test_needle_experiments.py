"""What the comparisons of selectors and of exits count: operations, kept tokens, other thresholds."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config


pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load():
    """Import a module of the folder of benchmarks."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@torch.no_grad()
def test_operations_are_those_of_a_real_run(load):
    """Counted by PyTorch in a prefill behind an exit, head and tower left out."""
    text = tiny_text_config("llama", num_hidden_layers=4)
    config = tiny_config("llava_next", text=text, connector_config={"layer_ops": [{"part": "dyvte", "layers": "all"}]})
    model, processor = tiny_model(config), tiny_processor(config)
    batch = make_batch(processor, [("USER: <image>\nHow many? ASSISTANT:", [random_image(100, 180, 1)])])
    features = model.get_image_features(
        **{name: value for name, value in batch.items() if "view" in name or "pix" in name}
    )
    given = {"input_ids": batch["input_ids"], "mm_encoder_outputs": {"image": features}}
    visual = int((batch["input_ids"] == config.image_token_id).sum())
    counted = {}
    for layer in (None, 1):
        with load("measure").operation_counter() as counter:
            model.model(**given, layer_options={"exit_after": layer})
        counted[layer] = counter.get_total_flops()
    gates = 4 * 2 * (2 * text.hidden_size * 128 + 128 * 2)
    for layer, entering in ((None, [visual] * 4), (1, [visual] * 2 + [0] * 2)):
        wanted = load("needle_exits").operations(text, entering, batch["input_ids"].shape[1] - visual)
        assert counted[layer] == pytest.approx(wanted + gates, rel=1e-6)


def test_blind_selectors_keep_the_budget(load):
    module = load("needle_selectors")
    context = SimpleNamespace(grids={}, width=4)
    tokens = SimpleNamespace(
        features=torch.zeros(12, 4), num_tokens=[5], lengths=[12], rows=lambda on: [torch.arange(2, 12)]
    )
    for part in (module.Even, module.Drawn):
        op = part(context, part.Options())
        kept = op(tokens, None)[0].kept
        assert kept.sum() == 5 and kept[:2].all()
        assert part is module.Drawn or kept.nonzero()[2:, 0].tolist() == [2 + 1, 2 + 5, 2 + 8]


def test_gates_with_another_bias_are_put_together_from_fixed_exits(load):
    """At bias 0 they are what the gates did in a run of their own."""
    module = load("needle_exits")
    checkpoint = ROOT / "checkpoints" / "needle-slime"
    model, processor = module.with_layer_op(checkpoint, module.DYVTE, 0)
    torch.manual_seed(1)
    for part in model.model.connector.layer_ops.parameters():
        part.data.normal_(std=0.3)
    scenes = module.SceneSet("validation", 2)
    asked = module.ask(model, processor, scenes, None)
    runs = {"all": None, **{f"exit {layer}": layer for layer in module.LAYERS}}
    found = {name: module.answer(model, asked, layer_options={"exit_after": layer}) for name, layer in runs.items()}
    found["gates 0"] = found["all"]
    own = module.answer(model, asked)
    put = module.at_bias(found, 0, 0.0)
    assert [(r["right"], r["visual"]) for r in put] == [(r["right"], r["visual"]) for r in own]
    assert len({tuple(r["visual"]) for r in own}) > 1
    row = module.summarise(model.config.text_config, "gates 0", own)
    assert sum(row["exits"]["all"].values()) == len(own) == 16
    assert module.savings(model.config.text_config, found["all"]) == [0.0] * 16


def test_the_student_is_the_beginning_of_its_teacher(load, tmp_path):
    """Two of its layers, tower and connector as they are; and the table says what was right, seed by seed."""
    module = load("needle_mimic")
    checkpoint = ROOT / "checkpoints" / "needle-slime"
    (teacher, processor), (student, _) = (module.without_router(checkpoint, layers) for layers in (None, 2))
    assert len(teacher.model.language_model.layers) == 4 and len(student.model.language_model.layers) == 2
    whole = teacher.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in student.state_dict().items())
    batch = make_batch(processor, [("<image>which digit is red ?", [random_image(384, 384, 1)])])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 208
    with torch.no_grad():
        assert not torch.allclose(student(**batch).logits, teacher(**batch).logits, atol=1e-2)
    options = SimpleNamespace(results=tmp_path, split="test", seeds=[0, 1])
    for method, seed, right in (("teacher", 0, 9), ("alone", 0, 5), ("alone", 1, 7)):
        scores = {group: {"right": right, "questions": 10, "accuracy": right / 10} for group in module.GROUPS}
        module.result_file(options, method, seed).write_text(json.dumps({"scores": scores}))
    lines = module.report(options).splitlines()
    assert "| `alone` | 50.0, 70.0 (mean 60.0) |" in lines[-1] and "| `teacher` | 90.0 (59.6" in lines[-2]
