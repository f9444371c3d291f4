"""The released fusion model: merge, view tokens, slots, projection, rows of the language model, logits, loss."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from builders.tiny import randomise
from hires_lmm.conversion import convert_fusion
from hires_lmm.conversion.fusion import UNUSED_NORM, key_table
from hires_lmm.conversion.mapping import map_backward
from hires_lmm.conversion.tensors import entry_of
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.compressors_hires_lmm import HiResLmmConvMerge

from . import test_fusion_loss, test_fusion_views
from .base import write_set
from .fusion import (
    GOLDEN,
    MODEL,
    NAME,
    build_model,
    hand_made,
    inputs_of,
    released_weights,
    slots_of,
    write_released,
)


__all__ = ["NAME"]


@torch.no_grad()
def merge(weight: torch.Tensor, tokens: torch.Tensor, width: int, side: int) -> torch.Tensor:
    """The 3 x 3 merge alone."""
    grid = (side, side)
    op = HiResLmmConvMerge(PartContext(None, width, width, {}, grid), HiResLmmConvMerge.Options(norm=False))
    op.conv.weight = nn.Parameter(weight)
    return op.forward_group(tokens, grid)


@torch.no_grad()
def measure(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Every number on the way, by the names of the set."""
    seen: dict = {}
    hooks = [
        model.model.connector.token_ops[0].output.register_forward_hook(
            lambda module, args, output: seen.update(slots=args[0], slots_projected=output)
        ),
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ]
    words = {key: value for key, value in inputs.items() if key != "labels"}
    output = model(**words)
    for hook in hooks:
        hook.remove()
    views = {key: inputs[key] for key in ("pixel_values", "view_positions", "view_spans")}
    tokens = model.model.get_image_features(**views, return_dict=True).tokens.features
    logits = output.logits[..., : model.config.image_token_id]
    return {
        "view_tokens": tokens.unflatten(0, (len(inputs["view_positions"]), -1)),
        "slots": seen["slots"],
        "slots_projected": seen["slots_projected"],
        "llm_embeds": seen["embeds"],
        "llm_logits_valid": logits[inputs["attention_mask"].bool()][::2],
        "llm_loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()),
    }


def test_the_merge_at_the_real_grid():
    size = GOLDEN.cases["b_merge24"]
    weight = GOLDEN["weight.merge24.vision_embed_merge.weight"]
    found = merge(weight, GOLDEN["input.merge24.tokens"], size["width"], size["grid"])
    GOLDEN.close(found, "output.merge24.tokens")


def test_every_stage():
    found = measure(hand_made(MODEL, released_weights()), inputs_of(MODEL, GOLDEN.tensors))
    GOLDEN.close(found.pop("slots_projected"), "output.slots_projected", atol=1e-5, rtol=0)
    for name, value in found.items():
        GOLDEN.close(value, f"output.{name}")


def test_the_conversion_gives_the_weights_renamed_by_hand(tmp_path):
    convert_fusion(write_released(tmp_path / "released"), tmp_path / "ours")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").state_dict()
    wanted = hand_made(MODEL, released_weights()).state_dict()
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        if UNUSED_NORM not in name:
            rows = min(len(tensor), len(ours[name]), MODEL["llm_vocab"]) if "embed" in name or "head" in name else None
            assert torch.equal(ours[name][:rows], tensor[:rows]), name


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    cases = {
        "settings": {
            **{"hid": 32, "inter": 48, "heads": 4, "layers": 1, "vlayers": 2, "vheads": 2, "img": 42, "patch": 7},
            **{"n_l": 4, "n_s": 2, "llm_hid": 24, "llm_heads": 2, "proj": 20, "thid": 16, "theads": 4},
        },
        "views_per_sample": [3, 2],
        "query_vocab": 40,
        "llm_vocab": 50,
        "query_eos": 2,
        "query_pad": 3,
        "llm_eos": 6,
        "llm_pad": 7,
        "placeholder_ids": [37, 38, 39],
        "token_types": MODEL["token_types"],
        "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"},
        "llm": {"hidden_size": 24, "intermediate_size": 40, "rms_norm_eps": 1e-6, "rope_theta": 500.0},
        "vision": {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
        "text": {"layers": 1, "intermediate_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    }
    model = randomise(build_model(cases, 2), seed)
    entries = {name: entry_of(value) for name, value in model.state_dict().items() if UNUSED_NORM not in name}
    weights = {name: entry.read() for name, entry in map_backward(key_table(slots_of(cases)), entries).entries.items()}
    for name in ("llm_backbone.model.embed_tokens.weight", "llm_backbone.lm_head.weight"):
        weights[name] = weights[name][: cases["llm_vocab"]]
    tensors = batch(cases)
    found = measure(hand_made(cases, weights), inputs_of(cases, tensors))
    weights |= test_fusion_loss.random_weights(cases, seed)
    loss, numbers = test_fusion_loss.remade(cases, weights, tensors, found["slots"])
    merged = {"weight": torch.randn(8, 8, 3, 3) / 8, "tokens": torch.randn(3, 36, 8)}
    tensors |= {f"weight.{name}": value for name, value in weights.items()}
    tensors |= {f"output.{name}": value for name, value in {**found, **loss}.items()}
    tensors |= {
        "weight.merge24.vision_embed_merge.weight": merged["weight"],
        "input.merge24.tokens": merged["tokens"],
        "output.merge24.tokens": merge(merged["weight"], merged["tokens"], 8, 6),
    }
    table, rendered, views = test_fusion_views.remade(seed)
    sets = {"a_plan_table": table, "rendered_views": rendered, "c_fusion": cases, "d_loss": numbers}
    write_set(folder, {**sets, "b_merge24": {"width": 8, "grid": 6}}, {**tensors, **views})


def batch(cases: dict) -> dict[str, torch.Tensor]:
    """Two conversations, of two turns and of one, as the released code lays them out."""
    kinds, sizes = cases["token_types"], cases["settings"]
    chats = [[([11, 12], [21, 22, 23]), ([13, 14, 15], [24])], [([16, 17, 18, 19], [25, 26])]]
    asked, words, answers = [], [], []
    for chat in chats:
        question, text = [], [(4, kinds["BOS"])] * 2 + [(5, kinds["SYS"])] * 3
        for turn, (ask, answer) in enumerate(chat):
            count = sizes["n_l"] if turn == 0 else sizes["n_s"]
            slots = [(token, kinds["QED"]) for token in cases["placeholder_ids"][: count - 1]]
            end = [(cases["query_eos"], kinds["EOS"])]
            question += [(token, kinds["QUE"]) for token in ask] + slots + end
            answers.append([(token, kinds["ANS"]) for token in answer] + slots + end)
            text += [(8, kinds["INST"])] + [(cases["llm_pad"], kinds["QED"])] * count
            text += [(token + 5, kinds["QUE"]) for token in ask] + [(9, kinds["INST"])]
            text += [(token + 5, kinds["ANS"]) for token in answer] + [(cases["llm_eos"], kinds["EOS"])]
        asked.append(question)
        words.append(text)
    found = {}
    for name, rows, pad in (
        ("que", asked, cases["query_pad"]),
        ("ans", answers, cases["query_pad"]),
        ("llm", words, cases["llm_pad"]),
    ):
        longest = max(map(len, rows))
        full = torch.tensor([row + [(pad, kinds["PAD"])] * (longest - len(row)) for row in rows])
        found[f"input.{name}_input_ids"], found[f"input.{name}_input_tps"] = full.unbind(-1)
        found[f"input.{name}_attention_mask"] = torch.tensor(
            [[n < len(row) for n in range(longest)] for row in rows]
        ).int()
    views = sum(cases["views_per_sample"])
    return {**found, "input.pixel_values": torch.randn(views, 3, sizes["img"], sizes["img"])}
