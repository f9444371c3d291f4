"""From the two halves to one model of any preset, at the size of the halves."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from hires_lmm.modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig
from hires_lmm.modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor

from ..halves.files import Halves, load_halves
from ..halves.vision import FEATURE_LAYER


PAPER_PATCHES = 576
"""Patches of a view of the published models: CLIP ViT-L/14 at 336 pixels."""

MOST_CROPS = 36


def scaled_queries(num_queries: int, patches: int) -> int:
    """The square number of queries that keeps the share of the published count.

    Args:
        num_queries (`int`): Queries for views of 576 patches.
        patches (`int`): Patches of a view here.

    Returns:
        The nearest square, at least 1: 144 -> 16, 64 -> 9, 196 -> 25 and 576 -> 64 of 64 patches.
    """
    wanted = num_queries * patches / PAPER_PATCHES
    return min((side * side for side in range(1, patches + 1)), key=lambda square: abs(square - wanted))


def connector_at_this_size(preset: str, patches: int, num_queries: int | None = None) -> dict[str, Any]:
    """The connector of a preset with its query counts brought to the size of the halves.

    Args:
        preset (`str`): Name of the preset.
        patches (`int`): Patches of a view.
        num_queries (`int`, *optional*): Queries of every part that has some; scaled from the preset by default.

    Returns:
        A `connector_config`; marks that are token ids of released tokenizers become learned ones.

    Raises:
        ValueError: If the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; known presets: {', '.join(PRESETS)}.")
    connector = deepcopy(PRESETS[preset]["connector_config"])
    parts = [*connector.get("view_ops", []), connector.get("adapter", {}), *connector.get("token_ops", [])]
    for part in parts:
        if "num_queries" in part:
            part["num_queries"] = scaled_queries(part["num_queries"], patches) if num_queries is None else num_queries
    layout = connector.get("layout", {})
    connector["layout"] = {name: "learned" if _is_token_id(mark) else mark for name, mark in layout.items()}
    return connector


def _is_token_id(mark: Any) -> bool:
    return isinstance(mark, int) and not isinstance(mark, bool)


def join_halves(
    halves: Halves | str | Path,
    preset: str = "slime",
    num_queries: int | None = None,
    router: bool = False,
    seed: int = 0,
    **changes: Any,
) -> tuple[HiResLmmForConditionalGeneration, HiResLmmProcessor]:
    """Put an untrained connector between the halves.

    Args:
        halves (`Halves` or path): The halves or their folder; their weights are copied.
        preset (`str`): Name of the preset.
        num_queries (`int`, *optional*): Queries a view of every part that has some, a square number; by default the
            share of the preset (144 of 576 patches become 16 of 64).
        router (`bool`): Whether the model gets the preset's token operations. Without them training reads several
            questions at once; `with_token_ops` adds them afterwards, where they have no weights.
        seed (`int`): Of the connector's weights.
        changes: Fields of `HiResLmmConfig` that replace those of the preset, as in `from_preset`.

    Returns:
        The model in evaluation mode, single precision, fused attention (on a CPU twice as fast as eager at 640 tokens
        an image), and its processor.

    Raises:
        ValueError: If the preset is unknown, or the folder holds no halves.
    """
    halves = halves if isinstance(halves, Halves) else load_halves(halves)
    tower, language = halves.vision.tower, halves.language
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    connector = connector_at_this_size(preset, patches, num_queries)
    if not router:
        connector["token_ops"] = []
    connector |= changes.pop("connector_config", {})
    chosen = changes.pop("planner", {})
    planner = {**PRESETS[preset]["planner"], **chosen}
    if "max_crops" in planner and "max_crops" not in chosen:
        planner["max_crops"] = MOST_CROPS
    tokenizer = deepcopy(halves.tokenizer)
    config = HiResLmmConfig.from_preset(
        preset,
        deepcopy(tower.config),
        deepcopy(language.config),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        planner=planner,
        connector_config=connector,
        **changes,
    )
    processor = HiResLmmProcessor.from_config(config, tokenizer, chat_template="chatml")
    torch.manual_seed(seed)
    model = HiResLmmForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    return model.eval(), processor


def with_token_ops(
    model: HiResLmmForConditionalGeneration, token_ops: list[dict[str, Any]]
) -> HiResLmmForConditionalGeneration:
    """The same weights with other token operations.

    Args:
        model (`HiResLmmForConditionalGeneration`): A trained model; not changed.
        token_ops (`list[dict]`): Operations that hold no weights, such as a cosine router.

    Returns:
        A new model in evaluation mode.

    Raises:
        ValueError: If an operation has weights, which would be untrained.
    """
    config = deepcopy(model.config)
    connector: Any = config.connector_config
    connector.token_ops = deepcopy(token_ops)
    connector.resolve()
    attention = model.config._attn_implementation
    changed = HiResLmmForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=model.dtype)
    missing = changed.load_state_dict(model.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"token_ops={token_ops!r} have weights ({missing[0]}); train the model with them.")
    changed.tie_weights()
    changed.generation_config = deepcopy(model.generation_config)
    return changed.eval()
