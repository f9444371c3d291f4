"""What an image costs: views, tokens before and after compression and under a budget, and LLaVA-NeXT's count."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .demo import build_byte_tokenizer
from .modeling.configuration_hires_lmm import LLAVA_NEXT_GRIDS, PRESETS, HiResLmmConfig
from .processing.geometry_hires_lmm import Grid
from .processing.processing_hires_lmm import HiResLmmProcessor
from .processing.token_layout_hires_lmm import TokenLayout, count_tokens


LLAVA_NEXT_VIEW, LLAVA_NEXT_PATCH = 336, 14


@dataclass(frozen=True)
class ImageAccount:
    """What one image costs.

    Args:
        height, width (`int`): The image, pixels.
        views (`int`): Squares that the vision tower sees.
        crop_rows, crop_cols (`int`): Their grid without the global view.
        patch_tokens (`int`): Patches of all views that enter the sequence, before any compression and without marks.
        tokens (`int`): Tokens after compression, marks included: the placeholders without a budget.
        budget_tokens (`int`, *optional*): Placeholders under the budget.
        llava_next (`int`): Tokens of the same image in LLaVA-NeXT with its released settings.
    """

    height: int
    width: int
    views: int
    crop_rows: int
    crop_cols: int
    patch_tokens: int
    tokens: int
    budget_tokens: int | None
    llava_next: int

    def to_dict(self) -> dict[str, int | None]:
        """The fields as JSON values."""
        return asdict(self)


def account_image(
    image_processor: Any, height: int, width: int, max_image_tokens: int | None = None, **images_kwargs: Any
) -> ImageAccount:
    """Count views and tokens of an image without its pixels.

    Args:
        image_processor (`HiResLmmImageProcessor`): Of a checkpoint, or of `preset_processor`.
        height, width (`int`): The upright image, pixels.
        max_image_tokens (`int`, *optional*): The budget.
        images_kwargs: Call-time options: `max_crops`, `views`, ...

    Returns:
        The account.

    Raises:
        ValueError: If a size or option is wrong, or the budget too small; the message names the smallest.
    """
    plan = image_processor.plan(height, width, **images_kwargs)
    grid = Grid(plan.patch_grid, plan.patch_grid)
    budget_tokens = None
    if max_image_tokens is not None:
        budget_tokens = image_processor.image_tokens(height, width, max_image_tokens=max_image_tokens, **images_kwargs)
    return ImageAccount(
        height=height,
        width=width,
        views=len(plan.views),
        crop_rows=plan.grid[0],
        crop_cols=plan.grid[1],
        patch_tokens=count_tokens(plan, TokenLayout(grid.size, {"global": grid, "crops": grid})).total,
        tokens=image_processor.image_tokens(height, width, **images_kwargs),
        budget_tokens=budget_tokens,
        llava_next=count_llava_next(height, width),
    )


@lru_cache(maxsize=1)
def _llava_next_processor() -> LlavaNextProcessor:
    side = {"height": LLAVA_NEXT_VIEW, "width": LLAVA_NEXT_VIEW}
    pinpoints = [[rows * LLAVA_NEXT_VIEW, cols * LLAVA_NEXT_VIEW] for rows, cols in LLAVA_NEXT_GRIDS]
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=side, crop_size=side, image_grid_pinpoints=pinpoints),
        build_byte_tokenizer(),
        patch_size=LLAVA_NEXT_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def count_llava_next(height: int, width: int) -> int:
    """Count the tokens of an image in LLaVA-NeXT, by transformers' own processor.

    Args:
        height, width (`int`): The image, pixels.

    Returns:
        The placeholders with the released settings: views of 336 pixels, patches of 14, five grids of crops.
    """
    return _llava_next_processor()._get_num_multimodal_tokens([(height, width)])["num_image_tokens"][0]


def preset_processor(preset: str) -> HiResLmmProcessor:
    """The processor of a preset over CLIP ViT-L/14 at 336 pixels, for counting without a checkpoint.

    Args:
        preset (`str`): A name in `PRESETS`.

    Returns:
        The processor; its tokenizer is a stand-in.

    Raises:
        ValueError: If the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; known presets: {', '.join(PRESETS)}.")
    tokenizer = build_byte_tokenizer()
    config = HiResLmmConfig.from_preset(
        preset,
        vision_config=CLIPVisionConfig(
            image_size=LLAVA_NEXT_VIEW, patch_size=LLAVA_NEXT_PATCH, hidden_size=1024, num_attention_heads=16
        ),
        text_config=LlamaConfig(vocab_size=32064, hidden_size=4096),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return HiResLmmProcessor.from_config(config, tokenizer)
