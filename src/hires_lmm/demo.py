"""A small random checkpoint for demonstrations, tests and documentation; its answers mean nothing.

It has the geometry of a CLIP ViT-L/14 at 336 pixels, so its token counts are those of a real model, and almost no
width, so it loads and runs in seconds on a CPU. `python -m hires_lmm.demo FOLDER` writes one.
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from .modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig
from .modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from .processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from .processing.processing_hires_lmm import HiResLmmProcessor


SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>")
SPACE = "Ġ"
"""How byte-level tokenizers write a space."""

LOCAL_ATTENTION = 3.0
"""Gain of the queries and keys of a compressor: each query attends to the patches around its place."""


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes: no training, no files, any text survives.

    Returns:
        A tokenizer of 262 tokens with ChatML marks and the chat template that uses them; `<image>` is one token.
    """
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


def demo_config(tokenizer: PreTrainedTokenizerFast, preset: str = "slime") -> HiResLmmConfig:
    """The configuration of the demo model.

    Args:
        tokenizer: Its vocabulary and special tokens are taken over.
        preset (`str`): Name of the preset.

    Returns:
        A configuration with views of 336 pixels and 24 x 24 patches, and widths of 64.
    """
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
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    changes: dict = {"image_token_id": image_token_id}
    layout = PRESETS.get(preset, {}).get("connector_config", {}).get("layout", {})
    marks = {name: mark for name, mark in layout.items() if isinstance(mark, int) and not isinstance(mark, bool)}
    if marks:  # ids of the released tokenizer, which the small vocabulary does not have
        stand_in = tokenizer.convert_tokens_to_ids(SPACE)
        changes["connector_config"] = {"layout": {**layout, **dict.fromkeys(marks, stand_in)}}
    return HiResLmmConfig.from_preset(preset, vision_config=vision_config, text_config=text_config, **changes)


def build_demo_checkpoint(folder: str | Path, preset: str = "slime", seed: int = 0) -> Path:
    """Write a small random checkpoint: weights, code, processor and tokenizer.

    Args:
        folder (`str` or `Path`): Where to; created if missing.
        preset (`str`): Name of the preset.
        seed (`int`): Seed of the weights; the same seed gives the same files.

    Returns:
        The folder.

    Raises:
        ValueError: If the preset is unknown.
    """
    tokenizer = build_byte_tokenizer()
    config = demo_config(tokenizer, preset)
    processor = HiResLmmProcessor.from_config(config, tokenizer)
    model = HiResLmmForConditionalGeneration(config).eval()
    _randomise(model, seed)
    model.generation_config = _printable_generation(tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


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


def main(arguments: list[str] | None = None) -> int:
    """Write a demo checkpoint from the command line.

    Args:
        arguments (`list[str]`, *optional*): As in `sys.argv[1:]`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m hires_lmm.demo", description="Write a small random checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="slime")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        build_demo_checkpoint(options.folder, options.preset, options.seed)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
