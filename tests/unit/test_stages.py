"""Stages and plans: what they train in which model, at which rate, and what they refuse."""

import json
from pathlib import Path

import pytest

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from builders.training import query_former_config, slime_config, slime_parts, training_arguments
from hires_lmm.training import Alternation, Stage, alternating_scheduler, get_plan, set_options, summarise
from hires_lmm.training.optimization import parameter_groups
from hires_lmm.training.parameters import list_parts, part_name
from hires_lmm.training.plans import COLUMNS, FORCED_EXPERT


GOLDEN = Path(__file__).parents[1] / "fixtures" / "training_plans.json"
CONFIGS = {"slime": slime_config, "query_former": query_former_config, "end_to_end": slime_config}


def unset(stage: Stage) -> list[str]:
    """Fields that most plans leave alone and the golden data leaves out."""
    return [name for name in ("max_image_tokens", "after", "cognition", "noise") if getattr(stage, name) is None]


def describe(plan: str, column: str) -> list[dict]:
    """Everything a plan decides in the tiny model of the plan."""
    model, stages = tiny_model(CONFIGS[plan]()), []
    for stage in get_plan(plan, column):
        names = {name for pairs in stage.parameters(model).values() for name, _ in pairs}
        stage.apply(model)
        assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        stages.append(
            {
                **{key: value for key, value in stage.to_dict().items() if key not in ("alternation", *unset(stage))},
                "parts": {
                    row.part: [row.trainable, row.parameters, list(row.learning_rates)]
                    for row in summarise(model, stage)
                },
                "names": sorted(part_name(name) for name in names) if column == "vicuna_7b" else None,
            }
        )
    return stages


@pytest.mark.parametrize("plan", CONFIGS)
def test_every_stage_of_every_plan_is_golden_data(plan):
    golden = json.loads(GOLDEN.read_text())
    for column in COLUMNS:
        assert describe(plan, column) == golden[f"{plan}/{column}"], f"{plan}/{column} changed"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_what_no_gradient_reaches_is_not_trained(tower, layer):
    vision = tiny_vision_config(tower, layers=3)
    model = tiny_model(tiny_config("llava_next", vision=vision, vision_feature_layer=layer))
    batch = make_batch(tiny_processor(model.config), [("<image>What is it?", [random_image(60, 90)])])
    model(**batch).logits.sum().backward()
    tower = model.model.vision_tower
    named = {f"vision_tower.{name}": parameter for name, parameter in tower.named_parameters()}
    reached = {name for name, parameter in named.items() if parameter.grad is not None}
    stage = Stage("mine", {"vision_tower": 1e-4})
    assert {part_name(name) for name, _ in stage.parameters(model)["vision_tower"]} == reached
    stage.apply(model)
    assert {name for name, parameter in named.items() if parameter.requires_grad} == reached
    assert 0 < len(reached) < len(named)


def test_wrappers_do_not_change_the_name_of_a_part():
    for name in (
        "model.connector.adapter.mlp.linear_1.weight",
        "module.model.connector.adapter.mlp.linear_1.weight",
        "_fsdp_wrapped_module.model.connector.adapter._fsdp_wrapped_module.mlp.linear_1.weight",
        "base_model.model.model.connector.adapter.modules_to_save.default.mlp.linear_1.weight",
    ):
        assert part_name(name) == "connector.adapter.mlp.linear_1.weight"


def test_the_first_matching_pattern_decides():
    model = tiny_model(slime_config())
    stage = Stage("x", {"connector.adapter.mlp.*.bias": 1e-2, "connector": 1e-3, "language_model.layers.1": 1e-4})
    groups = {group["name"]: group for group in parameter_groups(stage.parameters(model), stage.trainable, "x")}
    assert [groups[name]["lr"] for name in stage.trainable] == [1e-2, 1e-3, 1e-4]
    assert len(groups["connector.adapter.mlp.*.bias"]["params"]) == 2
    flat = [id(p) for group in groups.values() for p in group["params"]]
    assert len(flat) == len(set(flat))


def test_weight_decay_spares_vectors():
    model = tiny_model(slime_config())
    stage = Stage("x", {"connector": 1e-3})
    groups = parameter_groups(stage.parameters(model), stage.trainable, "x", weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("connector", 0.1),
        ("connector (no decay)", 0.0),
    ]
    assert all(p.ndim < 2 for p in groups[1]["params"]) and all(p.ndim >= 2 for p in groups[0]["params"])


def test_a_pattern_that_matches_nothing_names_the_parts():
    model = tiny_model(query_former_config())
    with pytest.raises(
        ValueError, match=r"connector\.view_ops.*Parts of this model: vision_tower, connector\.adapter"
    ):
        get_plan("slime")[2].apply(model)
    assert list_parts(model)[-2:] == ["language_model", "lm_head"]


def test_a_tied_head_is_trained_with_the_embeddings():
    config = tiny_config("slime", text="llama", connector_config={"view_ops": [], "token_ops": []})
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = tiny_model(config)
    model.tie_weights()
    get_plan("end_to_end")[1].apply(model)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainable": {}}, "trains nothing"),
        ({"views": "local"}, "views='local'"),
        ({"loss_weights": {"language": 1.0}}, "unknown loss 'language'"),
        ({"alternation": Alternation([["a"], ["b"]])}, "alternates 'a'"),
        ({"trainable": {"connector": "1e-4"}}, r"has '1e-4' for 'connector'; .*in YAML with a point: 1\.0e-4"),
        ({"trainable": {"connector": -1e-4}}, "has -0.0001 for 'connector'"),
        ({"trainable": {"connector": float("nan")}}, "has nan for 'connector'"),
        ({"loss_weights": {"generation": "1e-1"}}, "has '1e-1' for 'generation'"),
        ({"max_image_tokens": 0}, "max_image_tokens=0; use an integer of at least 1"),
        ({"max_image_tokens": [None]}, r"max_image_tokens=\[None\]"),
        ({"max_image_tokens": []}, r"max_image_tokens=\[\]"),
        ({"max_image_tokens": [4, "8"]}, r"max_image_tokens=\[4, '8'\]"),
    ],
)
def test_contradictory_stages_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"name": "x", "trainable": {"connector": 1e-3}, **changes})


def test_stages_survive_json():
    for stage in [*get_plan("slime"), Stage("x", {"a": 1.0, "b": 2.0}, alternation=Alternation([["a"], ["b"]], 3))]:
        assert Stage.from_dict(json.loads(json.dumps(stage.to_dict()))) == stage
    with pytest.raises(ValueError, match="no field 'lr'"):
        Stage.from_dict({"name": "x", "lr": 1})


def test_an_option_is_set_in_the_model_and_in_its_configuration(tmp_path):
    from transformers import AutoModelForImageTextToText

    model, _ = slime_parts()
    for expert in ("mlp", "query_former", None):
        set_options(model, {FORCED_EXPERT: expert})
        assert model.model.connector.adapter.forced_expert == expert
        model.save_pretrained(tmp_path / str(expert))
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / str(expert))
        assert again.model.connector.adapter.forced_expert == expert


@pytest.mark.parametrize(
    "options, words",
    [
        ({"connector.adapter.gate": "release"}, "no switch 'connector.adapter.gate'; its switches: .*forced_expert"),
        ({"connector.token_ops.7.question": False}, "no switch 'connector.token_ops.7.question'"),
        ({"expert": "mlp"}, "no switch 'expert'"),
        ({FORCED_EXPERT: "both"}, r"Bad option in adapter \(mixture\).*both"),
    ],
)
def test_an_option_that_cannot_be_set_changes_nothing(options, words):
    model, _ = slime_parts()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=words):
        set_options(model, {FORCED_EXPERT: "mlp", **options})
    assert model.model.connector.adapter.forced_expert is None and model.config.to_dict() == before
    with pytest.raises(ValueError, match="its switches: none"):
        set_options(tiny_model(query_former_config()), {FORCED_EXPERT: "mlp"})


def test_the_stage_is_saved_with_the_model(tmp_path):
    from transformers import AutoConfig

    model, _ = slime_parts()
    get_plan("slime")[0].apply(model)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.training_stage == "slime/I-a"
    assert config.connector_config.adapter["forced_expert"] == "mlp"


def test_alternation_switches_groups_and_survives_a_resume(tmp_path):
    model = tiny_model(slime_config())
    stage = Stage(
        "x",
        {"connector.adapter": 1e-2, "connector.view_ops": 1e-3, "lm_head": 1e-4},
        alternation=Alternation([["connector.adapter"], ["connector.view_ops"]], steps=2),
    )
    args = training_arguments(tmp_path)

    def start():
        optimizer = stage.optimizer(model, args)
        return optimizer, alternating_scheduler(stage, optimizer, 8, name="constant")

    def run(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    whole = run(*start(), 8)
    assert [bool(row[0]) for row in whole] == [True, True, False, False] * 2
    assert all(bool(row[0]) != bool(row[1]) and row[2] == 1e-4 for row in whole)
    optimizer, scheduler = start()
    first = run(optimizer, scheduler, 3)
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = start()
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert first + run(optimizer, scheduler, 5) == whole
    with pytest.raises(ValueError, match="has no alternation"):
        alternating_scheduler(get_plan("slime")[0], optimizer, 8)
