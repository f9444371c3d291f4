"""The golden fusion model as a released checkpoint: its weights, its configuration, its two tokenizers."""

from pathlib import Path

import torch
from convert_tools import write_json
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from builders_fusion import golden_cases, golden_tensors


PARTS = ("imgque_backbone.", "fusion_backbone.", "llm_backbone.")


def golden_settings() -> dict:
    return golden_cases()["c_fusion"]["settings"]


def released_weights() -> dict[str, torch.Tensor]:
    """The weights of the released generating model."""
    weights = {key.removeprefix("weight."): value for key, value in golden_tensors().items()}
    return {key: value.contiguous() for key, value in weights.items() if key.startswith(PARTS)}


def released_config(**changes) -> dict:
    """`config.json` as the released class writes it, at the golden sizes."""
    size = golden_settings()
    vision = {
        "model_type": "clip_vision_hd",
        "hidden_size": size["hid"],
        "intermediate_size": size["inter"],
        "num_hidden_layers": size["vlayers"],
        "num_attention_heads": size["vheads"],
        "image_size": size["img"],
        "patch_size": size["patch"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": size["proj"],
        "enable_local_merge": True,
        "enable_token_crlf": True,
        "vembed_merge_kernel_size": 3,
        "vembed_merge_stride": 2,
        "vembed_hidden_size": size["hid"],
    }
    llama = {
        "model_type": "llama",
        "vocab_size": 55,
        "hidden_size": size["hid"],
        "intermediate_size": size["inter"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    inner = {
        "model_type": "modeling_image_hd_multi_query_clip",
        "vision_config": vision,
        "text_config": {"model_type": "clip_text_model", "vocab_size": 55, "num_hidden_layers": 2},
        "num_hidden_layers": size["layers"],
        "vocab_size": 55,
        "hidden_size": size["hid"],
        "imgque_config": llama,
    }
    language = {
        **llama,
        "vocab_size": 64,
        "hidden_size": size["llm_hid"],
        "intermediate_size": 80,
        "num_attention_heads": size["llm_heads"],
        "num_key_value_heads": size["llm_heads"],
        "num_hidden_layers": language_layers(),
        "bos_token_id": 5,
        "eos_token_id": 6,
        "pad_token_id": 7,
        "tie_word_embeddings": False,
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


def language_layers() -> int:
    names = [key for key in golden_tensors() if key.startswith("weight.llm_backbone.model.layers.")]
    return 1 + max(int(name.split(".")[4]) for name in names)


def word_tokenizer(vocabulary: dict[str, int], **special) -> PreTrainedTokenizerFast:
    """One token a word, of the golden numbers."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def question_tokenizer() -> PreTrainedTokenizerFast:
    """50 tokens: `w1` is 5; the five placeholders are not among them yet."""
    words = {"<unk>": 0, "<bos>": 1, "<end>": 2, "<pad>": 3, "?": 4, **{f"w{n}": n + 4 for n in range(1, 46)}}
    return word_tokenizer(words, bos_token="<bos>", eos_token="<end>", pad_token="<pad>")


def language_tokenizer() -> PreTrainedTokenizerFast:
    """64 tokens: `w1` is 9."""
    words = {f"<{n}>": n for n in range(64)}
    words = {name: number for name, number in words.items() if number not in (4, 5, 6, 7, *range(9, 61), 63)}
    words |= {"<unk>": 4, "<s>": 5, "</s>": 6, "<pad>": 7, "USER": 58, "ASSISTANT": 59, ":": 60, ".": 63}
    words |= {f"w{n}": n + 8 for n in range(1, 50)}
    return word_tokenizer(words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_released_fusion(folder: Path, tensors: dict | None = None, **changes) -> Path:
    """A released checkpoint with the golden weights."""
    write_json(folder / "config.json", released_config(**changes))
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "Phi3VImageProcessor", "num_crops": 9})
    save_file(tensors if tensors is not None else released_weights(), folder / "model.safetensors", {"format": "pt"})
    language_tokenizer().save_pretrained(folder)
    question_tokenizer().save_pretrained(folder / "clip")
    return folder


def golden_inputs(image_token: int) -> dict[str, torch.Tensor]:
    """The golden batch as this package takes it; question and answer are told apart by the golden token types."""
    golden, size = golden_tensors(), golden_settings()
    kinds = golden["input.llm_input_tps"]
    ids = torch.where(kinds == 256, image_token, golden["input.llm_input_ids"].long())
    side, rows = size["img"] // size["patch"], []
    for count in golden["input.crop_index"].bincount().tolist():
        rows += [[0, 1, count - 1, 0, 0, size["n_l"], side, side, 1]]
        rows += [[1, 1, count - 1, 0, col, size["n_l"], side, side, 0] for col in range(count - 1)]
    positions = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": golden["input.llm_attention_mask"].long(),
        "prompt_mask": kinds == 16,
        "labels": torch.where((kinds & (32 | 128)) != 0, ids, -100),
        "pixel_values": golden["input.pixel_values"],
        "view_positions": positions,
        "view_spans": torch.tensor([0, side, 0, side]).repeat(len(positions), 1),
        "view_boxes": torch.zeros(len(positions), 4, dtype=torch.long),
    }
