"""The key table at the sizes of the four published models, without a byte of weights."""

import time

import pytest
import torch
from convert_tools import golden_config

from hires_lmm import HiResLmmConfig
from hires_lmm.conversion.configs import model_shapes, text_config_of
from hires_lmm.conversion.mapping import check_complete, map_backward, map_forward
from hires_lmm.conversion.pipeline import EMBEDDINGS, grow_embeddings
from hires_lmm.conversion.slime import key_table
from hires_lmm.conversion.slime_options import connector_settings
from hires_lmm.conversion.tensors import Entry, entry_of
from hires_lmm.conversion.towers import find_tower


# hidden, intermediate, layers, heads, key heads, vocabulary
SIZES = {
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
PARAMETERS = {"7B": 7.1e9, "8B": 8.4e9, "13B": 13.4e9, "70B": 71.0e9}  # all parts, tower included
CLIP_WIDTH, CLIP_INNER, CLIP_LAYERS, PATCHES = 1024, 4096, 24, 576


def language_shapes(hidden, inner, layers, heads, key_heads, vocabulary) -> dict:
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    narrow = hidden // heads * key_heads
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name, shape in (("q", (hidden, hidden)), ("k", (narrow, hidden)), ("v", (narrow, hidden))):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def linear(name: str, rows: int, columns: int) -> dict:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tower_shapes() -> dict:
    root = "model.vision_tower.vision_tower.vision_model."
    width = CLIP_WIDTH
    shapes = {
        f"{root}embeddings.class_embedding": (width,),
        f"{root}embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{root}embeddings.position_embedding.weight": (PATCHES + 1, width),
        **norm(f"{root}pre_layrnorm", width),
        **norm(f"{root}post_layernorm", width),
    }
    for number in range(CLIP_LAYERS):
        layer = f"{root}encoder.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{name}", width, width)
        shapes |= linear(f"{layer}mlp.fc1", CLIP_INNER, width) | linear(f"{layer}mlp.fc2", width, CLIP_INNER)
        shapes |= norm(f"{layer}layer_norm1", width) | norm(f"{layer}layer_norm2", width)
    return shapes


def query_former_shapes(root: str, queries: int) -> dict:
    width = CLIP_WIDTH
    return {
        f"{root}pos_embed": (queries, width),
        f"{root}query": (queries, width),
        f"{root}attn.in_proj_weight": (3 * width, width),
        f"{root}attn.in_proj_bias": (3 * width,),
        **linear(f"{root}attn.out_proj", width, width),
        **norm(f"{root}ln_q", width),
        **norm(f"{root}ln_kv", width),
        **norm(f"{root}ln_post", width),
    }


def released_entries(size: str) -> dict:
    hidden = SIZES[size][0]
    adapter = "model.mm_projector."
    shapes = {
        **language_shapes(*SIZES[size]),
        **tower_shapes(),
        f"{adapter}w_gate": (CLIP_WIDTH, 2),
        f"{adapter}w_noise": (CLIP_WIDTH, 2),
        **query_former_shapes(f"{adapter}attn.", PATCHES),
        **linear(f"{adapter}projection.0", hidden, CLIP_WIDTH),
        **linear(f"{adapter}projection.2", hidden, hidden),
        **query_former_shapes("model.sampler.post_qformer.", 144),
    }

    def unread() -> torch.Tensor:
        raise AssertionError("no weight may be read here")

    entries = {key: Entry(shape, torch.bfloat16, unread, "") for key, shape in shapes.items()}
    constants = {"mean": torch.zeros(1, dtype=torch.bfloat16), "std": torch.ones(1, dtype=torch.bfloat16)}
    return entries | {f"{adapter}{name}": entry_of(value, "") for name, value in constants.items()}


def config_of(size: str, tmp_path) -> dict:
    hidden, inner, layers, heads, key_heads, vocabulary = SIZES[size]
    return golden_config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        mm_hidden_size=CLIP_WIDTH,
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_key_is_used_once_and_fits(size, tmp_path):
    start = time.perf_counter()
    released, entries = config_of(size, tmp_path), released_entries(size)
    vision_config, folder = find_tower(None, released["mm_vision_tower"], tmp_path)
    assert folder is None  # the sizes of the published tower are known without a network
    text_config = text_config_of(released, "llama")
    text_config.vocab_size += 1
    config = HiResLmmConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=text_config.vocab_size - 1,
        **connector_settings(released),
    )
    rules = key_table(released["mm_projector_type"], released["mm_resampler_type"])
    mapped = map_forward(rules, entries)
    grow_embeddings(mapped, 1, EMBEDDINGS)
    check_complete(mapped, model_shapes(config), rules)
    assert sorted(record["source"] for record in mapped.records) == sorted(entries)
    targets = [target for record in mapped.records for target in record["targets"]]
    assert len(targets) == len(set(targets)) == len(mapped.entries)
    assert sum(entry.meta().numel() for entry in mapped.entries.values()) == pytest.approx(PARAMETERS[size], rel=0.02)
    back = map_backward(rules, map_forward(rules, entries).entries)
    assert back.problems == []
    assert {key: entry.shape for key, entry in back.entries.items()} == {k: e.shape for k, e in entries.items()}
    assert time.perf_counter() - start < 20
