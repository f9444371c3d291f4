"""The set `fusion`: its model, with the released weights renamed by hand, its inputs, and a checkpoint as released."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration

from .base import GoldenSet


NAME = "fusion"
GOLDEN = GoldenSet(NAME)
MODEL = GOLDEN.cases["c_fusion"]
PARTS = ("imgque_backbone.", "fusion_backbone.", "llm_backbone.")
TOWER = "imgque_backbone.clip_model.vision_model."
FUSION = "imgque_backbone.imgque_model."
OTHERS = {
    "lm_head.weight": "llm_backbone.lm_head.weight",
    "model.connector.view_ops.0.norm.weight": TOWER + "pos_layrnorm.weight",
    "model.connector.view_ops.0.norm.bias": TOWER + "pos_layrnorm.bias",
    "model.connector.view_ops.0.conv.weight": TOWER + "vision_embed_merge.weight",
    "model.connector.layout.separators.view_end": TOWER + "token_LF",
    "model.connector.token_ops.0.output.weight": "fusion_backbone.imgque_proj.weight",
}


# ---- the model and its inputs


def slots_of(cases: dict) -> list[int]:
    """Row of each slot in the table of words."""
    return [*cases["placeholder_ids"], cases["query_eos"]]


def num_layers(weights: dict[str, torch.Tensor]) -> int:
    """Layers of the language model."""
    return 1 + max(int(name.split(".")[3]) for name in weights if name.startswith("llm_backbone.model.layers."))


def build_model(cases: dict, layers: int) -> HiResLmmForConditionalGeneration:
    """Our model at the sizes of a set; image token and answer prefix are ids beyond the golden words."""
    sizes, words = cases["settings"], cases["llm_vocab"]
    vision = CLIPVisionConfig(
        hidden_size=sizes["hid"],
        intermediate_size=sizes["inter"],
        num_hidden_layers=sizes["vlayers"],
        num_attention_heads=sizes["vheads"],
        image_size=sizes["img"],
        patch_size=sizes["patch"],
        hidden_act=cases["vision"]["hidden_act"],
        layer_norm_eps=cases["vision"]["layer_norm_eps"],
    )
    text = LlamaConfig(
        vocab_size=words + 2, num_hidden_layers=layers, num_attention_heads=sizes["llm_heads"], **cases["llm"]
    )
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
        image_token_id=words,
        answer_prefix_ids=[words + 1],
        connector_config={"token_ops": [fusion]},
    )
    return HiResLmmForConditionalGeneration(config).eval()


def released_name(key: str) -> str:
    """Our name -> the released one, by hand: independent of the converter's table. The queries have none."""
    for ours, theirs in (
        ("model.vision_tower.", TOWER),
        ("model.language_model.", "llm_backbone.model."),
        ("model.connector.token_ops.0.model.", FUSION),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours).removeprefix("vision_model.")
    return OTHERS[key]


def hand_made(cases: dict, weights: dict[str, torch.Tensor]) -> HiResLmmForConditionalGeneration:
    """The golden model: every tensor by its name; ids beyond the golden words get rows of zeros."""
    made = build_model(cases, num_layers(weights))
    state = made.state_dict()
    for key, tensor in state.items():
        if "post_layernorm" in key:  # the released tower has none, and nothing reads ours
            continue
        if key == "model.connector.token_ops.0.queries":
            found = weights[FUSION + "embed_tokens.weight"][slots_of(cases)]
        else:
            found = weights[released_name(key)]
        if key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            found = torch.nn.functional.pad(found, (0, 0, 0, len(tensor) - len(found)))
        state[key] = found.reshape(tensor.shape)
    made.load_state_dict(state)
    return made


def inputs_of(cases: dict, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The golden batch as our model takes it: placeholders, questions by turn, images that are a row of crops."""
    kinds = cases["token_types"]
    ids, kind = tensors["input.llm_input_ids"].long(), tensors["input.llm_input_tps"]
    mask = tensors["input.llm_attention_mask"].long()
    learned = (kind == kinds["ANS"]) | ((kind == kinds["EOS"]) & mask.bool())
    counts, side = cases["views_per_sample"], cases["settings"]["img"] // cases["settings"]["patch"]
    rows = []
    for count in counts:
        rows += [[0, 1, count - 1, 0, 0, cases["settings"]["n_l"], side, side, 1]]
        rows += [[1, 1, count - 1, 0, col, cases["settings"]["n_l"], side, side, 0] for col in range(count - 1)]
    return {
        "input_ids": torch.where(kind == kinds["QED"], cases["llm_vocab"], ids),
        "attention_mask": mask,
        "labels": torch.where(learned, ids, -100),
        "question_ids": questions_of(cases, tensors),
        "pixel_values": tensors["input.pixel_values"],
        "view_positions": torch.tensor(rows),
        "view_spans": torch.tensor([0, side, 0, side]).repeat(len(rows), 1),
    }


def questions_of(cases: dict, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(rows, turns, tokens)`: the words of each turn; -1 fills a turn, -2 a row with fewer turns."""
    kinds, rows = cases["token_types"], []
    for ids, kind in zip(tensors["input.que_input_ids"], tensors["input.que_input_tps"], strict=True):
        turns: list[list[int]] = [[]]
        for token, what in zip(ids.tolist(), kind.tolist(), strict=True):
            if what == kinds["QUE"]:
                turns[-1].append(token)
            elif what == kinds["EOS"]:
                turns.append([])
        rows.append(turns[:-1])
    longest, most = max(len(turn) for row in rows for turn in row), max(map(len, rows))
    filled = [[[*turn, *[-1] * (longest - len(turn))] for turn in row] for row in rows]
    return torch.tensor([[*row, *[[-2] * longest] * (most - len(row))] for row in filled])


def text_encoder(cases: dict, weights: dict[str, torch.Tensor], **changes) -> CLIPTextModelWithProjection:
    """The text encoder of the golden contrastive model."""
    sizes, text = cases["settings"], cases["text"]
    config = CLIPTextConfig(
        vocab_size=cases["query_vocab"],
        hidden_size=sizes["thid"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["layers"],
        num_attention_heads=sizes["theads"],
        max_position_embeddings=len(weights["clip_model.text_model.embeddings.position_embedding.weight"]),
        projection_dim=sizes["proj"],
        hidden_act=text["hidden_act"],
        layer_norm_eps=text["layer_norm_eps"],
        eos_token_id=cases["query_eos"],
        pad_token_id=cases["query_pad"],
        bos_token_id=1,
        **changes,
    )
    encoder = CLIPTextModelWithProjection(config)
    states = {
        key.removeprefix("clip_model."): value for key, value in weights.items() if key.startswith("clip_model.")
    }
    found = encoder.load_state_dict(states, strict=False)
    assert not found.unexpected_keys and all("position_ids" in key for key in found.missing_keys)
    return encoder.eval()


# ---- a released checkpoint with these weights


def released_weights() -> dict[str, torch.Tensor]:
    """The weights of the released generating model."""
    return {key: value for key, value in GOLDEN.under("weight.").items() if key.startswith(PARTS)}


def released_config(**changes) -> dict:
    """`config.json` as the released class writes it, at the golden sizes."""
    size, width = MODEL["settings"], {"hidden_size": MODEL["settings"]["hid"]}
    vision = {
        "model_type": "clip_vision_hd",
        **width,
        "intermediate_size": size["inter"],
        "num_hidden_layers": size["vlayers"],
        "num_attention_heads": size["vheads"],
        "image_size": size["img"],
        "patch_size": size["patch"],
        "projection_dim": size["proj"],
        "hidden_act": MODEL["vision"]["hidden_act"],
        "layer_norm_eps": MODEL["vision"]["layer_norm_eps"],
        "enable_local_merge": True,
        "enable_token_crlf": True,
        "vembed_merge_kernel_size": 3,
        "vembed_merge_stride": 2,
        "vembed_hidden_size": size["hid"],
    }
    llama = {
        "model_type": "llama",
        "vocab_size": MODEL["query_vocab"],
        **width,
        "intermediate_size": size["inter"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "attention_bias": False,
        **MODEL["llama"],
    }
    inner = {
        "model_type": "modeling_image_hd_multi_query_clip",
        "vision_config": vision,
        "text_config": {"model_type": "clip_text_model", "vocab_size": MODEL["query_vocab"], "num_hidden_layers": 2},
        "num_hidden_layers": size["layers"],
        "vocab_size": MODEL["query_vocab"],
        **width,
        "imgque_config": llama,
    }
    language = {
        **llama,
        "vocab_size": MODEL["llm_vocab"],
        "num_attention_heads": size["llm_heads"],
        "num_key_value_heads": size["llm_heads"],
        "num_hidden_layers": num_layers(released_weights()),
        "bos_token_id": MODEL["llm_eos"] - 1,
        "eos_token_id": MODEL["llm_eos"],
        "pad_token_id": MODEL["llm_pad"],
        "tie_word_embeddings": False,
        **MODEL["llm"],
    }
    values = {
        "model_type": "modeling_query_adapt_clip_llm",
        "architectures": ["ImageMultiQueryCLIPLLMModel"],
        "fusion_name": "img_multi_que_clip_fusion_linear",
        "torch_dtype": "float32",
        "length_que_end": size["n_l"],
        "length_que_end_short": size["n_s"],
        "append_special_padding": True,
        "enable_que_end": True,
        "hidden_size": size["llm_hid"],
        "imgque_config": inner,
        "llm_config": language,
    }
    return {**values, **changes}


def word_tokenizer(size: int, special: dict[str, int], first: int, **names: str) -> PreTrainedTokenizerFast:
    """One token a word: special ones at their ids, `w1` at `first` and so on, other ids in angle brackets."""
    free = [number for number in range(size) if number not in special.values()]
    words = {f"<{n}>" if n < first else f"w{n - first + 1}": n for n in free} | special
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def question_tokenizer() -> PreTrainedTokenizerFast:
    """The golden words; the placeholders of slots are not among them yet."""
    special = {"<unk>": 0, "<bos>": 1, "<end>": MODEL["query_eos"], "<pad>": MODEL["query_pad"], "?": 4}
    size = MODEL["query_vocab"] - len(MODEL["placeholder_ids"])
    return word_tokenizer(size, special, 5, bos_token="<bos>", eos_token="<end>", pad_token="<pad>")


def language_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the golden language model has."""
    end, size = MODEL["llm_eos"], MODEL["llm_vocab"]
    roles = {"USER": size - 6, "ASSISTANT": size - 5, ":": size - 4, ".": size - 1}
    special = {"<unk>": end - 2, "<s>": end - 1, "</s>": end, "<pad>": MODEL["llm_pad"], **roles}
    return word_tokenizer(size, special, end + 3, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_released(folder: Path, **changes) -> Path:
    """A released checkpoint with the golden weights; `changes` are of its configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(released_config(**changes)))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": 9}))
    save_file(released_weights(), folder / "model.safetensors", {"format": "pt"})
    language_tokenizer().save_pretrained(folder)
    question_tokenizer().save_pretrained(folder / "clip")
    return folder
