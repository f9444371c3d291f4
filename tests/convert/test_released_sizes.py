"""The key tables of the published models at their true sizes, without a byte of weights."""

import pytest
import torch
from test_true_sizes import language_shapes, linear, norm, tower_shapes
from transformers import ConvNextModel

from hires_lmm import HiResLmmConfig
from hires_lmm.conversion.configs import model_shapes, text_config_of
from hires_lmm.conversion.llava_formats import FORMATS
from hires_lmm.conversion.mapping import check_complete, map_backward, map_forward
from hires_lmm.conversion.open_clip import RULES, read_convnext
from hires_lmm.conversion.pipeline import EMBEDDINGS, grow_embeddings
from hires_lmm.conversion.tensors import Entry, entry_of
from hires_lmm.conversion.towers import find_tower
from hires_lmm.modeling.configuration_hires_lmm import PRESETS


# hidden, intermediate, layers, heads, key heads, vocabulary
VICUNA_7B = (4096, 11008, 32, 32, 32, 32000)
VICUNA_13B = (5120, 13824, 40, 40, 40, 32000)
LLAMA3_8B = (4096, 14336, 32, 32, 8, 128256)
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31["original_max_position_embeddings"] = 8192


def attention(name: str, width: int) -> dict:
    fused = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return {**fused, **linear(f"{name}.out_proj", width, width)}


def mqt_shapes() -> dict:
    root = "model.query_abstractor."
    shapes = {f"{root}{name}": (256, 1024) for name in ("query", "pos_embed")} | {f"{root}proj": (1024, 4096)}
    for name in ("ln_q", "ln_k", "ln_v"):
        shapes |= norm(root + name, 1024)
    return shapes | attention(f"{root}attn", 1024)


def uhd_shapes() -> dict:
    root, width = "model.mm_projector.", 5120
    shapes = {f"{root}{name}": (144, width) for name in ("query", "pos_embed")}
    shapes |= {f"{root}proj": (width, width), f"{root}kv_proj.weight": (width, 1024)}
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes |= norm(root + name, width)
    return shapes | attention(f"{root}attn", width)


def inf_shapes() -> dict:
    root = "model.spatial_embed."
    shapes = norm(f"{root}attention.ln", 1024) | norm(f"{root}ln_fuse", 1024)
    for number in range(4):
        shapes |= linear(f"{root}attention.linears.{number}", 1024, 1024)
    for name in ("ffn_crop", "ffn_stride"):
        shapes |= linear(f"{root}{name}.0", 64, 1024) | linear(f"{root}{name}.2", 512, 64)
    return shapes | projector_shapes()


def projector_shapes() -> dict:
    return linear("model.mm_projector.0", 4096, 1024) | linear("model.mm_projector.2", 4096, 4096)


def mini_shapes() -> dict:
    root, layers = "model.compressor.", language_shapes(4096, 14336, 4, 32, 8, 1)
    shapes = {f"{root}query": (1, 1024), f"{root}pos_embed": (1, 1024)} | attention(f"{root}attn", 1024)
    shapes |= norm(f"{root}ln_q", 1024) | norm(f"{root}ln_kv", 1024) | projector_shapes()
    fused = {key: shape for key, shape in layers.items() if ".layers." in key}
    return shapes | {key.replace("model.layers.", "model.prefusion_layers."): own for key, own in fused.items()}


# sizes of the language model, what lies between, its number of parameters (positions counted), options
MODELS = {
    "mqt": (VICUNA_7B, mqt_shapes, 8.92e6, {"mm_projector_type": "linear"}),
    "llava-uhd": (VICUNA_13B, uhd_shapes, 137.9e6, {"mm_projector_type": "adapt_spatial_resampler"}),
    "inf-llava": (LLAMA3_8B, inf_shapes, 4.40e6 + 21.0e6, {"mm_projector_type": "mlp2x_gelu"}),
    "llava-mini": (
        LLAMA3_8B,
        mini_shapes,
        872.4e6 + 4.2e6 + 21.0e6,
        {"mm_projector_type": "mlp2x_gelu", "compressor_size": 1, "rope_scaling": LLAMA31, "rope_theta": 500000.0},
    ),
}


def unread() -> torch.Tensor:
    raise AssertionError("no weight may be read here")


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_used_once_and_fits_at_true_sizes(name, tmp_path):
    sizes, between, parameters, options = MODELS[name]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = dict(zip((*names, "num_key_value_heads", "vocab_size"), sizes, strict=True))
    config |= {"mm_vision_select_layer": -2, "image_aspect_ratio": "pad", **options}
    shapes = {**language_shapes(*sizes), **tower_shapes(), **between()}
    entries = {key: Entry(shape, torch.bfloat16, unread, "") for key, shape in shapes.items()}
    form, tower = FORMATS[name], find_tower(None, "openai/clip-vit-large-patch14-336", tmp_path)[0]
    read, text = form.options.read(config), text_config_of(config, "llama")
    settings = form.settings(read, text)
    text.vocab_size += 1
    ours = HiResLmmConfig.from_preset(
        form.preset, tower, text, image_token_id=text.vocab_size - 1, dtype=torch.bfloat16, **settings
    )
    rules = form.rules(read)
    mapped = map_forward(rules, entries)
    back = map_backward(rules, dict(mapped.entries))
    grow_embeddings(mapped, 1, EMBEDDINGS)
    check_complete(mapped, model_shapes(ours), rules)
    assert sorted(record["source"] for record in mapped.records) == sorted(entries)
    assert back.problems == [] and {k: e.shape for k, e in back.entries.items()} == shapes
    made = [entry for key, entry in mapped.entries.items() if key.startswith("model.connector.")]
    assert sum(entry.meta().numel() for entry in made) == pytest.approx(parameters, rel=0.01)


def test_the_sizes_of_the_published_convnext_are_read_off_its_weights(tmp_path):
    """Those of timm's convnext_large, which the preset names too."""
    found, widths = {}, (192, 384, 768, 1536)
    found |= {"stem.0.weight": (192, 3, 4, 4), "stem.0.bias": (192,), **norm("stem.1", 192)}
    for stage, (depth, width) in enumerate(zip((3, 3, 27, 3), widths, strict=True)):
        for block in range(depth):
            root = f"stages.{stage}.blocks.{block}."
            found |= {f"{root}gamma": (width,), f"{root}conv_dw.weight": (width, 1, 7, 7)}
            found |= {f"{root}conv_dw.bias": (width,), **norm(f"{root}norm", width)}
            found |= linear(f"{root}mlp.fc1", 4 * width, width) | linear(f"{root}mlp.fc2", width, 4 * width)
        if stage:
            root, before = f"stages.{stage}.downsample.", widths[stage - 1]
            found |= norm(f"{root}0", before) | {f"{root}1.weight": (width, before, 2, 2), f"{root}1.bias": (width,)}
    found |= norm("head.norm", 1536)
    small = {key: torch.zeros(shape if "gamma" in key else ()) for key, shape in found.items()}
    torch.save(
        {f"visual.trunk.{key}": value for key, value in small.items()}, tmp_path / "open_clip_pytorch_model.bin"
    )
    config, _ = read_convnext(tmp_path, 768)
    preset = PRESETS["mg_llava"]["extra_towers"]["hires"]
    assert {key: config.to_dict()[key] for key in preset} == preset
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in ConvNextModel(config).state_dict().items()}
    mapped = map_forward(RULES, {key: entry_of(torch.empty(shape, device="meta")) for key, shape in found.items()})
    assert {key: entry.shape for key, entry in mapped.entries.items()} == wanted
