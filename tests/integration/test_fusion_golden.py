"""Parity of the preset `fusion` with numbers of the released implementation (`tests/fixtures/fusion`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.compressors_hires_lmm import HiResLmmConvMerge


FOLDER = Path(__file__).parents[1] / "fixtures" / "fusion"
TOWER = "imgque_backbone.clip_model.vision_model."
ANSWER, END = 32, 128  # types of tokens in the golden file
IMAGE, PREFIX = 62, [61]  # ids that the golden language model's texts do not use


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "tensors.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    """The golden weights in our model, renamed by hand: independent of the converter's key map."""
    cases = json.loads((FOLDER / "cases.json").read_text())["c_fusion"]
    sizes = cases["settings"]
    vision = CLIPVisionConfig(
        hidden_size=sizes["hid"],
        intermediate_size=sizes["inter"],
        num_hidden_layers=sizes["vlayers"],
        num_attention_heads=sizes["vheads"],
        image_size=sizes["img"],
        patch_size=sizes["patch"],
    )
    text = LlamaConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=sizes["llm_heads"], **cases["llm"])
    fusion = {
        "part": "fusion",
        "num_queries": sizes["n_l"],
        "later_queries": sizes["n_s"],
        "num_layers": sizes["layers"],
        "num_heads": sizes["heads"],
        "intermediate_size": sizes["inter"],
        "vocab_size": cases["query_vocab"],
    }
    config = HiResLmmConfig.from_preset(
        "fusion",
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        answer_prefix_ids=PREFIX,
        connector_config={"token_ops": [fusion]},
    )
    made = HiResLmmForConditionalGeneration(config).eval()
    state = {}
    for name, tensor in golden.items():
        if name.startswith("weight."):
            state[name.removeprefix("weight.")] = tensor
    embeds = state["imgque_backbone.imgque_model.embed_tokens.weight"]
    wanted = made.state_dict()
    for key in wanted:
        if key.startswith("model.vision_tower."):
            source = TOWER + key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            if "post_layernorm" in key:  # the released tower has none, and nothing reads ours
                continue
        elif key.startswith("model.language_model."):
            source = "llm_backbone.model." + key.removeprefix("model.language_model.")
        elif ".token_ops.0.model." in key:
            source = "imgque_backbone.imgque_model." + key.split(".token_ops.0.model.")[1]
        else:
            source = {
                "lm_head.weight": "llm_backbone.lm_head.weight",
                "model.connector.view_ops.0.norm.weight": TOWER + "pos_layrnorm.weight",
                "model.connector.view_ops.0.norm.bias": TOWER + "pos_layrnorm.bias",
                "model.connector.view_ops.0.conv.weight": TOWER + "vision_embed_merge.weight",
                "model.connector.layout.separators.view_end": TOWER + "token_LF",
                "model.connector.token_ops.0.output.weight": "fusion_backbone.imgque_proj.weight",
                "model.connector.token_ops.0.queries": "",
            }[key]
        tensor = embeds[[*cases["placeholder_ids"], cases["query_eos"]]] if not source else state[source]
        wanted[key] = tensor.reshape(wanted[key].shape)
    made.load_state_dict(wanted)
    return made


def geometry(views, counts):
    """Positions and spans of images that are one global view and a row of crops."""
    rows, spans = [], []
    for number, count in zip(views, counts, strict=True):
        rows += [[0, 1, number - 1, 0, 0, count, 8, 8, 1]]
        rows += [[1, 1, number - 1, 0, at, count, 8, 8, 0] for at in range(number - 1)]
        spans += [[0, 8, 0, 8]] * number
    return torch.tensor(rows), torch.tensor(spans)


def test_merge_at_the_real_grid(golden):
    op = HiResLmmConvMerge(PartContext(None, 16, 16, {}, (24, 24)), HiResLmmConvMerge.Options(norm=False))
    op.conv.weight = nn.Parameter(golden["weight.merge24.vision_embed_merge.weight"])
    merged = op.forward_group(golden["input.merge24.tokens"], (24, 24))
    torch.testing.assert_close(merged, golden["output.merge24.tokens"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_view_tokens(golden, model):
    positions, spans = geometry([2, 4], [6, 6])
    features = model.get_image_features(golden["input.pixel_values"], positions, spans, return_dict=True)
    torch.testing.assert_close(
        features.tokens.features, golden["output.view_tokens"].flatten(0, 1), atol=1e-4, rtol=1e-4
    )


def golden_inputs(golden):
    """The language model's rows with placeholders and answer prefixes, and the questions in the other vocabulary."""
    ids = golden["input.llm_input_ids"].long().clone()
    rows = golden["output.llm_overwritten_rows"].long()
    ids[rows[:, 0], rows[:, 1]] = IMAGE
    questions = [[[5, 6, 7, 8]], [[12, 13], [17, 18, 19]]]
    asked = torch.full((2, 2, 4), -2)
    for row, own in enumerate(questions):
        for turn, words in enumerate(own):
            asked[row, turn] = torch.tensor([*words, *[-1] * (4 - len(words))])
    return ids, golden["input.llm_attention_mask"].long(), asked


@torch.no_grad()
def test_states_projection_rows_logits_and_loss(golden, model):
    positions, spans = geometry([2, 4], [6, 6])
    ids, mask, asked = golden_inputs(golden)
    seen, embeds = [], []
    fusion = model.model.connector.token_ops[0]
    hooks = [
        fusion.output.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=golden["input.pixel_values"],
        view_positions=positions,
        view_spans=spans,
        question_ids=asked,
    )
    for hook in hooks:
        hook.remove()
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(seen[0], golden["output.slots"], **close)
    torch.testing.assert_close(output.image_hidden_states, golden["output.slots_projected"], **close)
    torch.testing.assert_close(embeds[0], golden["output.llm_embeds"], **close)
    torch.testing.assert_close(output.logits[mask.bool()][::2], golden["output.llm_logits_valid"], **close)
    kinds = golden["input.llm_input_tps"]
    learned = (kinds & ANSWER > 0) | ((kinds & END > 0) & mask.bool())
    labels = torch.where(learned, ids, -100)
    loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, golden["output.llm_loss"], **close)
