"""MQT-LLaVA: the released query transformer at several numbers of tokens."""

from math import ceil
from pathlib import Path

import pytest
import torch
from torch import nn

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.adapters_hires_lmm import HiResLmmLinearAdapter
from hires_lmm.modeling.attention_hires_lmm import resize_positions
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.mqt_hires_lmm import HiResLmmMqt

from .base import GoldenSet, fuse_attention, split_attention, write_set


NAME = "mqt"
GOLDEN = GoldenSet(NAME)
NORMS = {"ln_q": "query_norm", "ln_k": "key_norm", "ln_v": "value_norm"}


def build(settings: dict) -> nn.Sequential:
    """View op and adapter of the settings of a set."""
    config = HiResLmmConnectorConfig()
    config._attn_implementation = "sdpa"
    grid = Grid(*settings["target_sizes"][0])
    width, text_width = settings["kv_dim"], settings["embed_dim"]
    context = PartContext(config, width, text_width, {(int(Kind.GLOBAL), MAIN_TOWER): grid}, grid.size)
    options = HiResLmmMqt.Options(num_queries=settings["grid_size"] ** 2, num_heads=settings["num_heads"])
    mqt, linear = (
        HiResLmmMqt(context, options),
        HiResLmmLinearAdapter(context, HiResLmmLinearAdapter.Options(bias=False)),
    )
    mqt.init_weights()
    return nn.Sequential(mqt, linear).eval()


def load(parts: nn.Sequential, released: dict[str, torch.Tensor]) -> None:
    """Give them the released weights."""
    named = {"queries": released["query"], "positions": parts[0].positions}
    for theirs, ours in NORMS.items():
        named |= {f"{ours}.{kind}": released[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    attention = {key.removeprefix("attn."): value for key, value in released.items() if key.startswith("attn.")}
    parts[0].load_state_dict(named | {f"attention.{key}": value for key, value in split_attention(attention).items()})
    parts[1].load_state_dict({"linear.weight": released["proj"].T})


@pytest.fixture(scope="module")
def parts() -> nn.Sequential:
    made = build(GOLDEN.cases["settings"])
    load(made, GOLDEN.under("weight."))
    return made


@torch.no_grad()
def run(parts: nn.Sequential, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return parts[1](parts[0].forward_group(features, grid), int(Kind.GLOBAL))


def attention_of(part: HiResLmmMqt, m: int, grid: tuple[int, int]) -> torch.Tensor:
    """Mean over the heads of what each of the first queries takes of each patch, `(m, L)`."""
    keys = part.attention._heads(part.attention.k_proj(part.key_norm(resize_positions(part.positions, grid)[None])))
    queries = part.query_norm(part.queries + part.positions)[None, :m]
    products = part.attention._heads(part.attention.q_proj(queries)) @ keys.transpose(2, 3)
    return (products * part.attention.scaling).softmax(dim=-1).mean(dim=1)[0]


def every(rows: int, kept: int) -> int:
    """The step at which a set keeps so many of so many rows."""
    return ceil(rows / kept)


def test_positions(parts):
    GOLDEN.close(parts[0].positions, f"output.pos_embed{GOLDEN.cases['settings']['grid_size']}", atol=0, rtol=0)
    for number, grid in enumerate(GOLDEN.cases["settings"]["target_sizes"]):
        name = f"output.x{number}.key_pos_sub"
        keys = resize_positions(parts[0].positions, tuple(grid))
        GOLDEN.close(keys[:: every(len(keys), len(GOLDEN[name]))], name)


def test_every_number_of_tokens(parts):
    settings = GOLDEN.cases["settings"]
    for number, grid in enumerate(settings["target_sizes"]):
        found = run(parts, GOLDEN[f"input.x{number}"], tuple(grid))
        for m in settings["m"]:
            name = f"output.x{number}.m{m}"
            GOLDEN.close(found[:, :m][:, :: every(m, GOLDEN[name].shape[1])], name)
            if f"{name}.attention" in GOLDEN.tensors:
                weights = attention_of(parts[0], m, tuple(grid))
                kept = GOLDEN[f"{name}.attention"].shape[1]
                GOLDEN.close(weights[:, :: every(weights.shape[1], kept)], f"{name}.attention", atol=1e-5)


def test_keys_of_content_let_the_picture_decide(parts):
    """With positions alone the tokens are linear in the normalised patches: each query has one weighting."""
    settings = GOLDEN.cases["settings"]
    grid = tuple(settings["target_sizes"][0])
    content = build(settings)
    content.load_state_dict(parts.state_dict())
    content[0].options.key_mode = "content"
    features = nn.functional.layer_norm(torch.randn(2, grid[0] * grid[1], settings["kv_dim"]), (settings["kv_dim"],))
    with torch.no_grad():
        parts[0].value_norm, norm = nn.Identity(), parts[0].value_norm
        mixed = torch.cat([features, features.mean(dim=0, keepdim=True)])
        first, second, mean = run(parts, mixed, grid)
        torch.testing.assert_close(mean, (first + second) / 2, atol=1e-4, rtol=1e-4)
        content[0].value_norm = nn.Identity()
        first, second, mean = run(content, mixed, grid)
        parts[0].value_norm = norm
    assert (mean - (first + second) / 2).abs().max() > 1e-3


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "grid_size": 6,
        "embed_dim": 20,
        "num_heads": 3,
        "kv_dim": 24,
        "ln_eps": 1e-6,
        "m": [36, 17, 5, 1],
        "target_sizes": [[9, 9]],
        "batch": 3,
    }
    made = randomise(build(settings), seed)
    grid = tuple(settings["target_sizes"][0])
    features = torch.randn(settings["batch"], grid[0] * grid[1], settings["kv_dim"])
    weights = made[0].state_dict()
    attention = {key.removeprefix("attention."): weights[key] for key in weights if key.startswith("attention.")}
    released = {"query": weights["queries"], "proj": made[1].linear.weight.T}
    released |= {f"attn.{key}": value for key, value in fuse_attention(attention).items()}
    for theirs, ours in NORMS.items():
        released |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    found = run(made, features, grid)
    tensors = {f"weight.{key}": value for key, value in released.items()}
    tensors |= {"output.pos_embed6": made[0].positions, "input.x0": features}
    tensors["output.x0.key_pos_sub"] = resize_positions(made[0].positions, grid)[::4]
    tensors |= {f"output.x0.m{m}": found[:, :m][:, ::2] for m in settings["m"]}
    write_set(folder, {"seed": seed, "settings": settings}, tensors)
