"""Sizes of the models that the benchmarks build, with random weights: small ones for the CPU, true ones for CUDA."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig


VIEW, PATCH = 336, 14
IMAGE_TOKEN, PAD_TOKEN = 3, 2
TEXT_LENGTH = 32
IMAGE_SIZES = {
    "336x336": [(336, 336)],
    "1024x1024": [(1024, 1024)],
    "2048x2048": [(2048, 2048)],
    "3840x2160": [(2160, 3840)],
    "400x4000": [(4000, 400)],
    "mixed batch": [(336, 336), (800, 600), (1024, 1024), (500, 2000)],
}
"""Name -> (height, width) of the images of a batch, one a row."""


@dataclass(frozen=True)
class Shapes:
    """Tower and language model.

    Args:
        tower (`tuple[int, int, int, int]`): Width, layers, heads, inner width.
        text (`tuple[int, int, int, int, int, int]`): Width, layers, heads, key heads, inner width, vocabulary.
        dtype (`torch.dtype`): Of all weights.
    """

    tower: tuple[int, int, int, int]
    text: tuple[int, int, int, int, int, int]
    dtype: torch.dtype

    def clip(self) -> CLIPVisionConfig:
        """CLIP on views of 336 pixels in patches of 14, as CLIP ViT-L/14-336."""
        width, layers, heads, inner = self.tower
        return CLIPVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            image_size=VIEW,
            patch_size=PATCH,
        )

    def text_numbers(self) -> dict[str, Any]:
        """Numbers that all language models share."""
        width, layers, heads, key_heads, inner, vocabulary = self.text
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": False,
        }

    def llama(self) -> LlamaConfig:
        """Llama with these numbers."""
        return LlamaConfig(**self.text_numbers(), pad_token_id=PAD_TOKEN)


SHAPES = {
    "tiny": Shapes((32, 2, 2, 64), (32, 2, 2, 2, 64, 2048), torch.float32),
    "cpu": Shapes((128, 4, 2, 512), (256, 4, 4, 2, 688, 4096), torch.float32),
    "wide": Shapes((1024, 4, 16, 4096), (1024, 4, 16, 4, 2816, 4096), torch.float32),
    "deep": Shapes((64, 24, 1, 256), (256, 32, 4, 1, 896, 8016), torch.float32),
    "load": Shapes((1024, 24, 16, 4096), (2048, 8, 16, 8, 5632, 32000), torch.bfloat16),
    "true-cpu": Shapes((1024, 24, 16, 4096), (4096, 32, 32, 8, 14336, 128256), torch.float32),
    "cuda": Shapes((1024, 24, 16, 4096), (4096, 32, 32, 8, 14336, 128256), torch.bfloat16),
}
"""`cuda` is CLIP ViT-L/14-336 with Llama-3-8B; `wide` has a tower of its width and not its depth, `deep` has its depth
and all widths divided by 16, so that activations keep their proportions; `tiny` is for tests."""


def build(cls: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model in evaluation mode whose weights are made where they stay; on `meta` it has none.

    Args:
        cls (`type`): Class of the model.
        config (`PreTrainedConfig`): Its configuration.
        dtype (`torch.dtype`): Of its weights.
        device (`str`): Where.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def rows_of_ids(counts: list[int], device: str) -> dict[str, torch.Tensor]:
    """One row an image: its placeholders and a text; shorter rows are padded on the left.

    Args:
        counts (`list[int]`): Placeholders of each image.
        device (`str`): Where the tensors are wanted.

    Returns:
        `input_ids` and `attention_mask`.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max(counts)
    ids = torch.full((len(counts), longest + TEXT_LENGTH), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(counts):
        text = torch.randint(10, 200, (TEXT_LENGTH,), generator=generator)
        ids[row, longest - count :] = torch.cat([torch.full((count,), IMAGE_TOKEN), text])
        mask[row, longest - count :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
