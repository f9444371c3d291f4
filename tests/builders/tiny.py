"""Tiny configs, models, processors, images and batches for tests; every number is small, every token differs."""

import functools

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from builders.text import tiny_tokenizer


TEXT_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
VISION_FAMILIES = ("clip", "siglip")
GEOMETRY = ("pixel_values", "view_positions", "view_boxes", "view_spans")
LLAVA_NEXT_PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # (rows, columns) of views, the released grids


@functools.cache
def plain_tokenizer():
    """The tiny tokenizer without a chat template (shared; do not change it)."""
    return tiny_tokenizer(None)


def text_numbers() -> dict[str, int]:
    """What the tiny language models of all families have in common."""
    tokenizer = plain_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_text_config(family: str, **changes) -> PreTrainedConfig:
    """A two-layer text config of one family with the tiny tokenizer's vocabulary.

    Args:
        family (`str`): One of `TEXT_FAMILIES`.

    Returns:
        The config; hidden size 32, four heads of 8 (two key heads), rotary positions, context 2048.
    """
    numbers = text_numbers()
    head = {"head_dim": 8}
    # tied embeddings of a random model repeat their last token for ever: the tests untie them where the family ties
    gemma = {
        **head,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    }
    table = {
        "llama": (LlamaConfig, {}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, head),
        "mistral": (MistralConfig, {**head, "sliding_window": None}),
        "gemma2": (Gemma2Config, gemma),
        "gemma3_text": (Gemma3TextConfig, gemma),
    }
    config_class, extra = table[family]
    return config_class(**{**numbers, **extra, **changes})


def tiny_vision_config(
    family: str, image_size: int = 56, patch_size: int = 14, layers: int = 3, hidden_size: int = 32, **changes
) -> PreTrainedConfig:
    """A tiny vision config: `clip` (class token in front) or `siglip` (patches only); sizes in pixels."""
    classes = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    numbers = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 4,
    }
    return classes[family](**{**numbers, **changes})


def tiny_convnext(model_type: str = "convnext", image_size: int = 64) -> dict:
    """A convolutional tower of two stages; its map has an eighth of the pixels a side."""
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 16], "image_size": image_size, "layer_scale_init_value": 0.5}
    return {"model_type": model_type, **sizes, **({} if model_type == "dinov3_convnext" else {"num_stages": 2})}


def scaled_pinpoints(view_size: int) -> list[list[int]]:
    """The five llava_next canvases `[height, width]` in pixels for another view size."""
    return [[rows * view_size, columns * view_size] for rows, columns in LLAVA_NEXT_PINPOINTS]


def tiny_config(
    preset: str = "llava_next",
    vision: str | PreTrainedConfig = "clip",
    text: str | PreTrainedConfig = "llama",
    **changes,
):
    """A `HiResLmmConfig` of one preset over tiny parts; `changes` go to `from_preset`."""
    from hires_lmm import HiResLmmConfig

    vision_config = tiny_vision_config(vision) if isinstance(vision, str) else vision
    text_config = tiny_text_config(text) if isinstance(text, str) else text
    if preset == "llava_next":
        changes.setdefault("planner", {"name": "llava_next", "pinpoints": scaled_pinpoints(vision_config.image_size)})
    if preset == "mg_llava":
        changes.setdefault("extra_towers", {"hires": tiny_convnext()})
    if preset == "fusion" and "token_ops" not in (changes.get("connector_config") or {}):
        fusion = {"part": "fusion", "num_queries": 12, "later_queries": 3, "num_layers": 2, "num_heads": 4}
        changes["connector_config"] = {**(changes.get("connector_config") or {}), "token_ops": [fusion]}
    changes.setdefault("image_token_id", plain_tokenizer().convert_tokens_to_ids("<image>"))
    return HiResLmmConfig.from_preset(preset, vision_config=vision_config, text_config=text_config, **changes)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter of a model values large enough for tokens and logits to differ clearly, in place.

    Args:
        model (`nn.Module`): Any model; norms move by 0.1, matrices get gain 1.2, embeddings std 1, the head std 0.5.
        seed (`int`): Seed of a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = set()

    def fill(parameter: nn.Parameter, std: float, add: bool = False) -> None:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(parameter + noise if add else noise)

    modules = sorted(model.named_modules(), key=lambda pair: pair[0].endswith("lm_head"))
    for name, module in modules:
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            fill(module.weight, 0.5 if name.endswith("lm_head") else 1.2 * fan_in**-0.5)
        elif isinstance(module, nn.Embedding):
            fill(module.weight, 0.5 if "position" in name else 1.0)
        for parameter in module.parameters(recurse=False):
            norm = "Norm" in type(module).__name__ or parameter is getattr(module, "bias", None)
            fill(parameter, 0.1 if norm else 0.5, add=norm)
    return model


def tiny_model(config, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A `HiResLmmForConditionalGeneration` in eval mode with clear weights; it stops on no token by itself."""
    from hires_lmm import HiResLmmForConditionalGeneration

    model = randomise(HiResLmmForConditionalGeneration(config), seed).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = plain_tokenizer().pad_token_id
    return model.to(dtype)


def tiny_processor(config, chat_template: str | None = None):
    """The processor of a config over the tiny tokenizer."""
    from hires_lmm import HiResLmmProcessor

    return HiResLmmProcessor.from_config(config, tiny_tokenizer(chat_template))


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image with a gradient, waves and noise, so that no two patches and no two seeds look alike."""
    rng = np.random.default_rng([seed, height, width])
    rows = np.linspace(0, 1, height)[:, None, None]
    columns = np.linspace(0, 1, width)[None, :, None]
    slope, phase, speed = rng.uniform(-1, 1, (2, 3)), rng.uniform(0, 6.28, 3), rng.uniform(3, 12, (2, 3))
    waves = np.sin(speed[0] * rows + speed[1] * columns + phase)
    blocks = rng.normal(0, 40, (-(-height // 9), -(-width // 9), 3)).repeat(9, 0).repeat(9, 1)[:height, :width]
    values = (
        128 + 60 * (slope[0] * rows + slope[1] * columns) + 40 * waves + blocks + rng.normal(0, 8, (height, width, 3))
    )
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_batch(processor, samples: list[tuple[str, list[Image.Image]]], **kwargs):
    """Tensors of a batch of `(text, images)` samples; images go in as one flat list, padding is on. A list of frames
    among the images is a video."""
    texts = [text for text, _ in samples]
    sources = [source for _, sources in samples for source in sources]
    videos = [source for source in sources if isinstance(source, list)]
    images = [source for source in sources if not isinstance(source, list)]
    given = {"images": images or None, "videos": videos or None}
    return processor(text=texts, **given, return_tensors="pt", padding=True, **kwargs)


def geometry_of(batch) -> dict[str, torch.Tensor]:
    """The four image tensors of a batch."""
    return {name: batch[name] for name in GEOMETRY}
