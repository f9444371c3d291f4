"""`compose --random`: a small checkpoint with random weights, for trying things out; its answers mean nothing.

It has the geometry of a CLIP ViT-L/14 at 336 pixels, so its token counts are those of a real model, and almost no
width, so it loads and runs in seconds on a CPU.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from ..modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig
from ..modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from ..processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from ..processing.processing_hires_lmm import HiResLmmProcessor
from .cards import write_card
from .checkpoint import versions
from .writing import new_folder


SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>")
SPACE = "Ġ"
"""How byte-level tokenizers write a space."""

LOCAL_ATTENTION = 3.0
"""Gain of the queries and keys of a compressor: each query attends to the patches around its place."""


def compose_random(destination: str | Path, preset: str = "slime", seed: int = 0) -> Path:
    """Write a small random checkpoint: weights, code, processor, tokenizer and card.

    Args:
        destination (`str` or `Path`): The folder to make; it must not exist, or be empty.
        preset (`str`): A name in `hires_lmm.PRESETS`.
        seed (`int`): Seed of the weights; the same seed gives the same files.

    Raises:
        ConversionError: If the destination is not empty.
        ValueError: If the preset is unknown.
    """
    tokenizer = build_byte_tokenizer()
    config = _random_config(tokenizer, preset)
    processor = HiResLmmProcessor.from_config(config, tokenizer)
    model = HiResLmmForConditionalGeneration(config).eval()
    _randomise(model, seed)
    model.generation_config = _printable_generation(tokenizer)
    with new_folder(destination) as work:
        model.save_pretrained(work)
        processor.save_pretrained(work)
        facts = {
            "title": Path(destination).name,
            "summary": f"A small model of the preset `{preset}` with random weights; its answers mean nothing.",
            "versions": versions(),
        }
        write_card(work, config, processor.image_processor, facts)
    return Path(destination)


def preset_processor(preset: str = "slime") -> HiResLmmProcessor:
    """The processor of a preset over a tower of 24 x 24 patches of 14 pixels, for counting tokens without weights."""
    tokenizer = build_byte_tokenizer()
    return HiResLmmProcessor.from_config(_random_config(tokenizer, preset), tokenizer)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with ChatML marks and `<image>`: no training, no files, any text survives."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATES["chatml"]
    return fast


def _random_config(tokenizer: PreTrainedTokenizerFast, preset: str) -> HiResLmmConfig:
    """Views of 336 pixels, 24 x 24 patches, and widths of 64."""
    vision_config = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    changes: dict = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    layout = PRESETS.get(preset, {}).get("connector_config", {}).get("layout", {})
    separators = layout.get("separators", {})
    stand_in = [tokenizer.convert_tokens_to_ids(SPACE)]  # for ids of the released tokenizer, which this one lacks
    given = {name: {**each, "value": stand_in} if "value" in each else each for name, each in separators.items()}
    if separators:
        changes["connector_config"] = {"layout": {**layout, "separators": given}}
    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}  # convolutional, as all second towers of presets
    if towers := PRESETS.get(preset, {}).get("extra_towers"):
        changes["extra_towers"] = {name: {**tower, **small} for name, tower in towers.items()}
    return HiResLmmConfig.from_preset(preset, vision_config=vision_config, text_config=text_config, **changes)


def _printable_generation(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Random weights would write control bytes to a terminal: only letters and spaces may be generated."""
    wanted = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([SPACE, *"abcdefghijklmnopqrstuvwxyz"])}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        suppress_tokens=[index for index in range(len(tokenizer)) if index not in wanted],
    )


@torch.no_grad()
def _randomise(model: HiResLmmForConditionalGeneration, seed: int) -> None:
    """Draw all matrices with gain one; the queries of a compressor look at their own places."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            continue
        std = parameter[0].numel() ** -0.5
        if "position_embedding" in name:
            std = 0.01
        elif "embed_tokens" in name:
            std = 1.0
        elif "queries" in name:
            std = 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if "query_former" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.copy_(torch.eye(len(parameter)) * LOCAL_ATTENTION)
