"""LLaVA-Mini: the released compressor and pre-fusion of one view, of crops with a global view, of frames."""

from math import ceil, isqrt
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from builders import randomise
from hires_lmm import HiResLmmConfig
from hires_lmm.modeling.attention_hires_lmm import resize_positions
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, ViewGroup
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.splice_hires_lmm import splice

from .base import GoldenSet, fuse_attention, split_attention, write_set


NAME = "llava_mini"
GOLDEN = GoldenSet(NAME)
IMAGE = -200  # stands for the image in `input_ids`
NORMS = {"ln_q": "view_ops.0.query_norm", "ln_kv": "view_ops.0.key_norm"}
PROJECTOR = {"mm_projector.0": "adapter.mlp.linear_1", "mm_projector.2": "adapter.mlp.linear_2"}


def build(settings: dict, side: int) -> HiResLmmConnector:
    """The connector of the settings of a set, with so many compressed tokens a side."""
    config = HiResLmmConfig.from_preset(
        "llava_mini",
        CLIPVisionConfig(
            hidden_size=settings["vision_width"],
            num_attention_heads=settings["compressor_heads"],
            image_size=settings["grid"],
            patch_size=1,
        ),
        LlamaConfig(
            vocab_size=settings["vocab"],
            hidden_size=settings["llm_width"],
            num_attention_heads=settings["llm_heads"],
            bos_token_id=None,
            eos_token_id=None,
        ),
        image_token_id=0,
        connector_config={
            "view_ops": [
                {"part": "mini_compressor", "num_queries": side**2, "num_heads": settings["compressor_heads"]}
            ],
            "token_ops": [
                {
                    "part": "prompt_fuser",
                    "num_layers": settings["prefusion_layers"],
                    "num_heads": settings["llm_heads"],
                    "num_key_value_heads": settings["kv_heads"],
                    "intermediate_size": settings["ffn"],
                    "rms_norm_eps": settings["rms_norm_eps"],
                    "rope_theta": settings["rope_theta"],
                    "compat": "release",
                }
            ],
        },
    )
    return HiResLmmConnector(config.connector_config, config.part_context()).eval()


def names_of(released: dict[str, torch.Tensor], compressor: str) -> dict[str, torch.Tensor]:
    """Released weights by our names."""
    own = {key.removeprefix(f"{compressor}."): value for key, value in released.items() if key.startswith(compressor)}
    attention = {key.removeprefix("attn."): value for key, value in own.items() if key.startswith("attn.")}
    named = {"view_ops.0.queries": own["query"]}
    named |= {f"view_ops.0.attention.{key}": value for key, value in split_attention(attention).items()}
    for kind in ("weight", "bias"):
        named |= {
            f"view_ops.0.query_norm.{kind}": own[f"ln_q.{kind}"],
            f"view_ops.0.key_norm.{kind}": own[f"ln_kv.{kind}"],
        }
        named |= {
            f"adapter.mlp.linear_{n}.{kind}": released[f"mm_projector.{at}.{kind}"] for n, at in ((1, 0), (2, 2))
        }
    layers = {key: value for key, value in released.items() if key.startswith("prefusion_layers.")}
    return named | {f"token_ops.0.model.{key.removeprefix('prefusion_')}": value for key, value in layers.items()}


def geometry_of(number: int, num_views: int, side: int) -> ImageGeometry:
    """A square grid of crops, of which the set has all views but the last, and the global view."""
    crops = isqrt(num_views - 1)
    whole = (side, side, 0, side, 0, side)
    views = [(int(Kind.GLOBAL), crops, crops, 0, 0, *whole)]
    views += [(int(Kind.CROP), crops, crops, n // crops, n % crops, *whole) for n in range(num_views - 1)]
    return ImageGeometry(number * num_views, tuple(views), 0)


@torch.no_grad()
def run(
    connector: HiResLmmConnector,
    embeddings: torch.Tensor,
    features: torch.Tensor,
    ids: torch.Tensor,
    labels=None,
    are_frames: bool = False,
):
    """All numbers of a case: features `(I, views, L, C)`, the global view last, and ids `(B, S)`; images of one view
    may be the frames of one video."""
    num_images, num_views, length, _ = features.shape
    side = isqrt(length)
    rows = [image * num_views for image in range(num_images)]
    groups = [ViewGroup(int(Kind.GLOBAL), features[:, -1], (side, side), tuple(rows))]
    if num_views > 1:
        crops = tuple(row + 1 + number for row in rows for number in range(num_views - 1))
        groups.append(ViewGroup(int(Kind.CROP), features[:, :-1].flatten(0, 1), (side, side), crops))
    images = [geometry_of(image, num_views, side) for image in range(num_images)]
    if are_frames:
        groups[0].kind = int(Kind.FRAME)
        frame = (int(Kind.FRAME), num_images, 1)
        images = [ImageGeometry(0, tuple((*frame, n, *image.views[0][4:]) for n, image in enumerate(images)), 0)]
    views = ViewFeatures(groups, images)
    seen = {}
    hook = connector.view_ops[0].register_forward_hook(lambda _, args, output: seen.update(made=output))
    tokens = connector.encode(views, embed=lambda ids: embeddings[ids])
    hook.remove()
    in_row = num_images // len(ids)
    count = connector.token_ops[0].num_tokens * in_row
    text = ids if labels is None else torch.where(labels == -100, ids, 0)  # answers are not read
    spread, readable = [], []
    for row, own in zip(ids.tolist(), text.tolist(), strict=True):
        spread.append([token for each in row for token in ([IMAGE] * count if each == IMAGE else [each])])
        turn = [[0] * count if each == IMAGE else [int(read > 0)] for each, read in zip(row, own, strict=True)]
        readable.append([each for part in turn for each in part])
    spread_ids, turn = torch.tensor(spread), torch.tensor(readable)
    embeds = embeddings[spread_ids.clamp(min=0)]
    image_row = torch.arange(len(images)) // (len(images) // len(ids))
    question = Question(embeds, spread_ids, turn, image_row, torch.ones(len(images), dtype=torch.long))
    tokens, question = connector.finish(tokens, question)
    slot = spread_ids == IMAGE
    return SimpleNamespace(
        compressor=seen["made"].group("detail").features,
        image_tokens=tokens.features.view(num_images, -1, tokens.features.shape[1]),
        text=question.embeds,
        slot=slot,
        inputs_embeds=splice(embeds, slot, tokens, question).embeds * (spread_ids != 0)[..., None],  # padding is 0
    )


def every(rows: int, kept: int) -> int:
    """The step at which a set keeps so many of so many rows."""
    return ceil(rows / kept)


def released(side: int) -> HiResLmmConnector:
    """The connector with the weights of the set."""
    connector = build(GOLDEN.cases["settings"], side)
    weights = names_of(GOLDEN.under("weight."), f"compressor_c{side}")
    weights["view_ops.0.positions"] = GOLDEN[f"output.compressor_c{side}.pos_embed"]
    torch.testing.assert_close(connector.view_ops[0].positions, weights["view_ops.0.positions"], atol=1e-6, rtol=0)
    connector.load_state_dict(weights)
    return connector


@pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["name"])
def test_every_stage(case):
    name, connector = case["name"], released(case["c"])
    given = GOLDEN.under(f"input.{name}.")
    ids, embeddings = given["input_ids"].long(), GOLDEN["weight.embed_tokens.weight"]
    found = run(connector, embeddings, given["features"], ids, given.get("labels"))
    GOLDEN.close(found.compressor, f"output.{name}.compressor")
    GOLDEN.close(found.image_tokens, f"output.{name}.image_tokens")
    GOLDEN.close(found.inputs_embeds, f"output.{name}.inputs_embeds")
    if f"output.{name}.text_tokens" in GOLDEN.tensors:
        wanted = GOLDEN[f"output.{name}.text_tokens"][ids != IMAGE]
        torch.testing.assert_close(found.text[~found.slot], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("input.video.features" not in GOLDEN.tensors, reason="the set has no video")
@pytest.mark.parametrize("are_frames", [False, True], ids=["images", "frames"])
def test_text_about_several_images_or_frames_is_the_mean_over_them(are_frames):
    ids = GOLDEN["input.video.input_ids"].long()
    frames = GOLDEN["input.video.features"]
    more = GOLDEN["output.video.inputs_embeds"].shape[1] - ids.shape[1] + 1
    connector = released(isqrt(more // len(frames)))
    found = run(connector, GOLDEN["weight.embed_tokens.weight"], frames[:, None], ids, are_frames=are_frames)
    GOLDEN.close(found.inputs_embeds, "output.video.inputs_embeds")


def test_positions_of_keys():
    for name in GOLDEN.under("output.key_positions_c"):
        part = build(GOLDEN.cases["settings"], int(name)).view_ops[0]
        part.init_weights()
        keys = resize_positions(part.positions, (GOLDEN.cases["settings"]["grid"],) * 2)
        wanted = f"output.key_positions_c{name}"
        GOLDEN.close(keys[:: every(len(keys), len(GOLDEN[wanted]))], wanted)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "vision_width": 24,
        "llm_width": 36,
        "llm_heads": 6,
        "kv_heads": 3,
        "ffn": 40,
        "prefusion_layers": 3,
        "grid": 5,
        "vocab": 50,
        "compressor_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    embeddings = torch.randn(settings["vocab"], settings["llm_width"])
    tensors, cases, shared = {"weight.embed_tokens.weight": embeddings}, [], None
    for name, side, num_views, labelled in (("one", 3, 1, True), ("tiles", 1, 10, False)):
        made = randomise(build(settings, side), seed)
        if shared is not None:
            made.adapter, made.token_ops = shared.adapter, shared.token_ops
            made.token_ops[0].num_tokens = side**2
        shared = made
        own = made.state_dict()
        attention = {key.removeprefix("view_ops.0.attention."): own[key] for key in own if ".attention." in key}
        weights = {f"compressor_c{side}.attn.{key}": value for key, value in fuse_attention(attention).items()}
        weights[f"compressor_c{side}.query"] = own["view_ops.0.queries"]
        for kind in ("weight", "bias"):
            weights[f"compressor_c{side}.ln_q.{kind}"] = own[f"view_ops.0.query_norm.{kind}"]
            weights[f"compressor_c{side}.ln_kv.{kind}"] = own[f"view_ops.0.key_norm.{kind}"]
            weights |= {
                f"mm_projector.{at}.{kind}": own[f"adapter.mlp.linear_{n}.{kind}"] for n, at in ((1, 0), (2, 2))
            }
        layers = [key for key in own if key.startswith("token_ops.0.model.layers.")]
        weights |= {f"prefusion_{key.removeprefix('token_ops.0.model.')}": own[key] for key in layers}
        tensors |= {f"weight.{key}": value for key, value in weights.items()}
        tensors[f"output.compressor_c{side}.pos_embed"] = own["view_ops.0.positions"]
        ids = torch.randint(1, settings["vocab"], (2, 9))
        ids[:, 2], ids[1, 7:] = IMAGE, 0
        labels = torch.full_like(ids, -100)
        labels[:, 5:] = ids[:, 5:]
        features = torch.randn(2, num_views, settings["grid"] ** 2, settings["vision_width"])
        found = run(made, embeddings, features, ids, labels if labelled else None)
        cases.append({"name": name, "c": side})
        tensors |= {
            f"input.{name}.features": features,
            f"input.{name}.input_ids": ids.int(),
            f"output.{name}.compressor": found.compressor,
            f"output.{name}.image_tokens": found.image_tokens,
            f"output.{name}.inputs_embeds": found.inputs_embeds,
        }
        if labelled:
            tensors[f"input.{name}.labels"] = labels.int()
        else:
            frames = features[0, :3]
            found = run(made, embeddings, frames[:, None], ids[:1], are_frames=True)
            tensors |= {"input.video.features": frames, "input.video.input_ids": ids[:1].int()}
            tensors["output.video.inputs_embeds"] = found.inputs_embeds
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)
