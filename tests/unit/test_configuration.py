"""What a configuration refuses, and what it computes for the processor."""

import pytest

from builders.tiny import tiny_config
from hires_lmm import PRESETS, HiResLmmConfig


def row_end(value):
    """A layout with a separator behind each token row."""
    return {"separators": {"mark": {"place": "token_row_end", "value": value}}}


@pytest.mark.parametrize(
    "connector, message",
    [
        ({"foo": 1}, "Unknown key 'foo' in connector_config; known keys: view_ops"),
        ({"adapter": {"part": "mlx"}}, "adapter names the unknown part 'mlx'; known parts of this slot: identity"),
        (
            {"map_ops": [{"part": "pool"}]},
            r"map_ops\[0\] names the unknown part 'pool'; known parts of this slot: ",
        ),
        (
            {"heads": {"n": {"part": "x"}}},
            "heads.n names the unknown part 'x'; known parts of this slot: number_decoder",
        ),
        (
            {"adapter": {"part": "mlp", "size": 1}},
            r"Unknown option 'size' in adapter \(mlp\); known options: hidden_act",
        ),
        ({"adapter": {"part": "mlp", "bias": "yes"}}, "expected bool, got str"),
        ({"adapter": {"part": "identity"}}, "features of width 32, but the language model has width"),
        ({"view_ops": [{"part": "query_compressor", "num_queries": 10}]}, "num_queries=10 is not a square"),
        ({"token_ops": [{"part": "router", "keep": {"rule": "best"}}]}, "best"),
        ({"token_ops": [{"part": "router", "keep": {"gamma": 2}}]}, r"keep.gamma is 2; it must lie in \(0, 1\]"),
        ({"token_ops": [{"part": "router", "keep": {"size": 2}}]}, "size"),
        ({"token_ops": [{"part": "router"}, {"part": "router"}]}, "Two parts would consume"),
        ({"layout": {"row_end": "learned"}}, "Unknown option 'row_end' in layout; known options: order, crop_order"),
        ({"layout": row_end("newline")}, "layout.separators.mark: value='newline' must be"),
        ({"layout": row_end([10**6])}, "layout.separators.mark is the token id 1000000, but the language model has"),
    ],
)
def test_a_wrong_part_or_option_is_a_value_error_that_names_it(connector, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("llava_hd", text=wide_text(), connector_config=connector)


def wide_text():
    """A language model of another width than the tower."""
    from builders import tiny_text_config

    config = tiny_text_config("llama")
    config.hidden_size = 48
    return config


def test_an_unknown_preset_or_field_is_named():
    with pytest.raises(ValueError, match="Unknown preset 'slim'; known presets: llava_next"):
        HiResLmmConfig.from_preset("slim")
    with pytest.raises(ValueError, match="no field 'adapter'"):
        HiResLmmConfig.from_preset("slime", adapter={"part": "mlp"})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_survive_json(preset, tmp_path):
    config = HiResLmmConfig.from_preset(preset)
    config.save_pretrained(tmp_path)
    again = HiResLmmConfig.from_pretrained(tmp_path)
    assert again.token_layout() == config.token_layout()
    assert again.planner == config.planner
    for name in ("view_ops", "adapter", "token_ops", "layout"):
        assert getattr(again.connector_config, name) == getattr(config.connector_config, name)


def test_token_layout_of_slime():
    layout = tiny_config("slime", connector_config={"view_ops": [{"part": "query_compressor", "num_queries": 4}]})
    assert layout.token_layout() == {
        "patch_grid": [4, 4],
        "grids": {
            "global": {"rows": 4, "cols": 4, "stride": [1, 1]},
            "crops": {"rows": 2, "cols": 2, "stride": None},
        },
        "layout": {"order": ["global", "crops"], "crop_order": "raster", "separators": {}},
        "own_tokens": None,
        "later_tokens": None,
        "budget": {"on": "crops", "reads_question": True},
    }


def test_ties_of_the_language_model_are_kept():
    text = wide_text()
    text.tie_word_embeddings = True
    assert tiny_config("llava_hd", text=text).tie_word_embeddings


def test_a_tower_for_images_of_any_shape_is_refused():
    with pytest.raises(ValueError, match=r"siglip2_vision_model.* reads patches of images of any shape"):
        HiResLmmConfig(vision_config={"model_type": "siglip2_vision_model"})


@pytest.mark.parametrize(
    "half, changes, text",
    [
        ("vision_config", {"patch_size": 0}, r"vision_config.patch_size=0"),
        ("vision_config", {"image_size": 10**6, "patch_size": 1}, "1 to 1024 patches a side"),
        ("vision_config", {"image_size": 7, "patch_size": 14}, "1 to 1024 patches a side"),
        (
            "vision_config",
            {"num_hidden_layers": 10**9},
            "vision_config.num_hidden_layers=1000000000 is more than 1000",
        ),
        ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers=1000000000 is more than 1000"),
        ("text_config", {"vocab_size": -1}, "text_config.vocab_size=-1"),
        ("vision_config", {"model_type": "bert"}, "vision_config.image_size=None of a 'bert'"),
    ],
)
def test_halves_that_cannot_be_built(half, changes, text):
    values = tiny_config("llava_next").to_dict()
    values[half] = changes if "model_type" in changes else {**values[half], **changes}
    with pytest.raises(ValueError, match=text):
        HiResLmmConfig(**{key: values[key] for key in ("vision_config", "text_config", "connector_config", "planner")})
