"""What no checkpoint holds (positions, rotary tables, scales) is right by value after loading, in every number format.

Loading makes models without storage first; a table that was filled then would hold whatever memory held.
"""

import math

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from builders import TEXT_FAMILIES, tiny_config, tiny_model, tiny_text_config
from builders.reload import DTYPES, PRESETS, case_config


COMBINATIONS = [(preset, "llama") for preset in PRESETS] + [("slime", text) for text in TEXT_FAMILIES[1:]]


def rotary_table(width: int, theta: float) -> torch.Tensor:
    """Frequencies theta^(-2i / width), in double precision."""
    return torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)


def theta_of(name: str, config) -> float:
    """The base of one rotary table, from the configuration."""
    parameters = config.rope_parameters
    kinds = [kind for kind in ("sliding_attention", "full_attention") if kind in name]
    return (parameters[kinds[0]] if kinds else parameters)["rope_theta"]


def expected_buffer(name: str, buffer: torch.Tensor, model) -> torch.Tensor:
    """The right values of one unsaved buffer; an unknown name is an error, so that new ones get a rule here."""
    if name.endswith("position_ids"):
        return torch.arange(buffer.shape[-1], dtype=torch.float64).expand(buffer.shape)
    if name.endswith("inv_freq"):
        inside = name.startswith("model.connector.")
        config = model.model.connector.token_ops[0].model.config if inside else model.config.text_config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return rotary_table(width, theta_of(name, config))
    if name.endswith("embed_scale"):
        return torch.tensor(math.sqrt(model.config.text_config.hidden_size), dtype=torch.float64)
    raise KeyError(f"no rule for the buffer {name}")


def check_buffers(model, dtype: torch.dtype) -> list[str]:
    """Compare every unsaved buffer; return their names."""
    names = []
    for name, buffer in model.named_non_persistent_buffers():
        wanted = expected_buffer(name, buffer, model)
        tolerance = 1e-6 if buffer.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(buffer.double(), wanted, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        if name.endswith("inv_freq"):
            assert buffer.dtype == torch.float32, f"{name} is {buffer.dtype}: positions would be rounded"
        names.append(name)
    return names


def sine_table(width: int, side: int) -> torch.Tensor:
    """Two-dimensional sine-cosine positions of a side x side grid, entry by entry: columns first, then rows."""
    rows = []
    for row in range(side):
        for column in range(side):
            halves = []
            for place in (column, row):
                angles = [place / 10000 ** (4 * i / width) for i in range(width // 4)]
                halves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(halves)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved checkpoint for each preset and family, made when first asked for."""
    root, made = tmp_path_factory.mktemp("buffers"), {}

    def get(preset: str, text: str):
        if (preset, text) not in made:
            folder = root / f"{preset}-{text}"
            tiny_model(case_config(preset, "clip" if len(made) % 2 else "siglip", text)).save_pretrained(folder)
            made[preset, text] = folder
        return made[preset, text]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset, text", COMBINATIONS)
def test_unsaved_buffers_by_value(folders, preset, text, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folders(preset, text), dtype=dtype)
    names = check_buffers(model, getattr(torch, dtype))
    assert any(name.startswith("model.language_model.rotary_emb") for name in names)
    assert any(name.endswith("position_ids") for name in names)
    assert any(name.startswith("model.connector.") for name in names) == (preset in ("fusion", "llava_mini"))


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_buffers_of_a_base_model_and_with_a_device_map(folders, device_map):
    model = AutoModel.from_pretrained(folders("fusion", "gemma3_text"), device_map=device_map)
    for name, buffer in model.named_non_persistent_buffers():
        assert not buffer.is_meta, name
    both = dict(model.named_non_persistent_buffers())
    frequencies = both["connector.token_ops.0.model.rotary_emb.inv_freq"]
    inner = model.connector.token_ops[0].model.config
    table = rotary_table(inner.hidden_size // inner.num_attention_heads, inner.rope_parameters["rope_theta"])
    torch.testing.assert_close(frequencies.double(), table, rtol=1e-6, atol=0)


def test_buffers_that_are_on_disk_while_loading(folders, tmp_path):
    parts = ("model.vision_tower", "model.connector", "model.language_model")
    places = {"lm_head": "cpu", **dict.fromkeys(parts, "disk")}
    model = AutoModelForImageTextToText.from_pretrained(
        folders("fusion", "gemma3_text"), device_map=places, offload_folder=str(tmp_path)
    )
    assert len(check_buffers(model, torch.float32)) > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_position_tables_by_value(folders, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folders("slime", "llama"), dtype=dtype)
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".positions")}
    assert len(tables) == 2
    for name, table in tables.items():
        wanted = sine_table(table.shape[1], math.isqrt(table.shape[0])).float().to(table.dtype)
        tolerance = max(2**-10, torch.finfo(table.dtype).eps)  # the table is made in float16, as the released ones are
        torch.testing.assert_close(table, wanted, atol=1e-6, rtol=tolerance, msg=name)
        assert name in model.state_dict()


def test_longer_contexts_keep_their_frequencies(tmp_path):
    """Scaled rotary positions: what is computed from the configuration while loading equals what a new model has."""
    text = tiny_text_config(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    model = tiny_model(tiny_config("llava_next", "clip", text))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float16)
    fresh, found = (dict(m.named_non_persistent_buffers()) for m in (model, loaded))
    name = "model.language_model.rotary_emb.inv_freq"
    assert torch.equal(found[name], fresh[name]) and found[name].dtype == torch.float32
    plain = rotary_table(8, 500000.0)
    torch.testing.assert_close(found[name][0].double(), plain[0], rtol=1e-6, atol=0)  # short waves stay
    torch.testing.assert_close(found[name][-1].double(), plain[-1] / 8, rtol=1e-6, atol=0)  # long ones are stretched
