"""What an engine such as vLLM gets from the shipped code, without the engine."""

import jinja2
import pytest
import torch
from transformers.utils.chat_template_utils import _compile_jinja_template

from builders.reload import CHANGES
from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.conversion.fusion_template import LLAMA2_VISION
from hires_lmm.conversion.llava_templates import LLAMA3_VICUNA, LLAMA31_MINI
from hires_lmm.modeling.serving_hires_lmm import PLUGIN_FLAG, check_engine
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from hires_lmm.processing.geometry_hires_lmm import Column


COSINE = {"part": "router", "on": "crops", "score": "cosine", "keep": {"rule": "budget"}}
QUESTION = "how many red cats are there"


def cosine_config(**changes):
    connector = {**CHANGES["slime"]["connector_config"], "token_ops": [COSINE]}
    return tiny_config("slime", connector_config=connector, question_scope="prompt", **changes)


def served(config, with_plugin: bool = False):
    config.text_config._attn_implementation = "vllm"
    if with_plugin:
        setattr(config, PLUGIN_FLAG, True)
    return config


@pytest.mark.parametrize("preset", ["slime", "fusion"])
def test_features_that_are_told_their_question_are_those_of_the_forward_pass(preset):
    config = cosine_config() if preset == "slime" else tiny_config("fusion")
    model, processor = tiny_model(config), tiny_processor(config, "chatml")
    images = [random_image(100, 130), random_image(60, 300, seed=1)]
    budget = {"max_image_tokens": 22} if preset == "slime" else {}
    for image in images:
        text = f"<image>{QUESTION}"
        inputs = processor(images=[image], text=text, return_tensors="pt", **budget)
        wanted = model.model(**inputs).image_outputs.pooler_output[0]
        ids = inputs["input_ids"][0]
        asked = ids[ids != config.image_token_id] + 1
        positions = inputs["view_positions"]
        rows = torch.zeros(len(positions), len(asked) + 3, dtype=torch.long)  # engines fill up with zeros
        rows[positions[:, Column.STARTS_IMAGE] == 1, : len(asked)] = asked
        geometry = {name: value for name, value in inputs.items() if name.startswith(("view", "pixel"))}
        given = model.get_image_features(**geometry, routing_ids=rows).pooler_output[0]
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
        other = rows.clone()
        other[other > 0] = 7
        assert not torch.allclose(model.get_image_features(**geometry, routing_ids=other).pooler_output[0], wanted)


def test_a_budget_that_the_question_decides_is_refused_where_the_question_is_not_shown():
    processor = tiny_processor(cosine_config())
    asked = {"images": [random_image(100, 130)], "return_text_replacement_offsets": True}
    with pytest.raises(ValueError, match=r"max_image_tokens=22 keeps what the question asks about"):
        processor(text="<image>", max_image_tokens=22, **asked)
    with pytest.raises(ValueError, match=r"max_image_tokens=22 keeps"):
        processor(text="<image>", images_kwargs={"max_image_tokens": 22}, **asked)
    with pytest.raises(ValueError, match="text must be a string"):
        processor(text=[None], max_image_tokens=22, **asked)
    processor(text="<image>", **asked)
    processor(text=f"<image>{QUESTION}", max_image_tokens=22, **asked)
    processor.hears_question = True
    processor(text="<image>", max_image_tokens=22, **asked)
    saliency = tiny_processor(tiny_config("llava_next"))
    saliency(text="<image>", max_image_tokens=60, **asked)


@pytest.mark.parametrize(
    "config, message",
    [
        (tiny_config("fusion"), r"Fusion reads the question"),
        (tiny_config("llava_mini"), "works inside the language model or on the text"),
        (
            tiny_config(
                "llava_next", connector_config={"layer_ops": [{"part": "keep_after", "layers": 0, "share": 0.5}]}
            ),
            "layer_ops has",
        ),
    ],
    ids=["fusion", "llava_mini", "layer op"],
)
def test_what_an_engine_leaves_out_is_refused_at_load(config, message):
    check_engine(config)
    with pytest.raises(ValueError, match=message):
        check_engine(served(config))


def test_extra_towers_need_the_plugin_where_images_are_cut():
    whole = tiny_config("mg_llava")
    assert whole.planner["views"] == "global"
    check_engine(served(whole))
    cut = tiny_config("mg_llava", planner={**whole.planner, "views": "all"})
    with pytest.raises(ValueError, match="The views of extra towers"):
        check_engine(served(cut))
    check_engine(served(cut, with_plugin=True))


def test_with_the_plugin_fusion_loads_and_a_threshold_warns(caplog):
    check_engine(served(tiny_config("fusion"), with_plugin=True))
    caplog.clear()
    check_engine(
        served(tiny_config("slime", connector_config={"token_ops": [{**COSINE, "keep": {"rule": "threshold"}}]}))
    )
    assert "a threshold keeps all of them" in caplog.text


@pytest.mark.parametrize("template", [*CHAT_TEMPLATES.values(), LLAMA2_VISION, LLAMA3_VICUNA, LLAMA31_MINI])
def test_an_engine_sees_that_templates_take_parts(template):
    """vLLM looks for a loop over a macro's own parameter, and else gives messages as one string."""
    tree = _compile_jinja_template(template).environment.parse(template)
    macros = list(tree.find_all(jinja2.nodes.Macro))
    looped = [
        loop.iter.name
        for macro in macros
        for loop in macro.find_all(jinja2.nodes.For)
        if isinstance(loop.iter, jinja2.nodes.Name)
    ]
    assert "content" in looped
