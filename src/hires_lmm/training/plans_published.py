"""Plans of systems that train in the two stages of LLaVA-1.5: the connector, then connector and language model."""

from dataclasses import dataclass, replace
from typing import Any

from .stages import Stage, tower_rates


ALIGN_RATE, TUNE_RATE, PREFERENCE_RATE = 1e-3, 2e-5, 2e-6
ALIGN_BATCH, TUNE_BATCH = 256, 128
COLUMNS = ("released",)
EXPERTS = ("language_model.*.mlp.experts", "language_model.*.mlp.gate")
"""Experts and gates of the families that `hires-lmm upcycle` makes."""


@dataclass(frozen=True)
class TwoStages:
    """What a system does in another way than the others.

    Args:
        align_part (`str`): What learns in stage I.
        align_views (`str`): Views of stage I.
        tune_views (`str`): Views of stage II.
        align_tokens, tune_tokens (`int` or `list[int]`, *optional*): Budget of an image.
        tune_zero (`int`): DeepSpeed ZeRO stage of stage II.
    """

    align_part: str = "connector"
    align_views: str = "all"
    tune_views: str = "all"
    align_tokens: Any = None
    tune_tokens: Any = None
    tune_zero: int = 3


SYSTEMS: dict[str, TwoStages] = {
    "mqt": TwoStages(align_views="global", tune_views="global", align_tokens=256, tune_tokens=list(range(2, 257, 2))),
    "llava_uhd": TwoStages(align_views="global", tune_zero=2),
    "inf_llava": TwoStages(),
    "hires_llava": TwoStages(),
    "llava_mini": TwoStages(align_part="connector.adapter"),
    "mg_llava": TwoStages(align_views="global", tune_views="global"),
}
"""Preset and plan of the same name -> what differs.

Source:
    `mqt`: MQT-LLaVA, huggingface.co/papers/2405.19315, scripts/v1_5 (gordonhu608/MQT-LLaVA at 92c35d0). Stage II has
        two epochs; its number of tokens is drawn for each step, here alike on all processes.
    `llava_uhd`: LLaVA-UHD, huggingface.co/papers/2403.11703, train.sh (thunlp/LLaVA-UHD at 30a3bc3). Stage I sees the
        whole image alone.
    `inf_llava`: INF-LLaVA, huggingface.co/papers/2407.16198, its two scripts (WeihuangLin/INF-LLaVA at 4b2bde6); their
        batches are per device, 256 and 128 on eight. Stage I there trains what LLaVA calls the projector; whether the
        enhancement learns with it is not said: here it does.
    `hires_llava`: HiRes-LLaVA, huggingface.co/papers/2407.08706, has no public code, and no source that we read has
        its rates: those of LLaVA-1.5. What is new in the tower (`slice_restore`) is part of the connector here.
    `llava_mini`: LLaVA-Mini, huggingface.co/papers/2501.03895: stage I trains the projector before compressor and
        fuser exist, stage II all but the tower. No source that we read has its rates and batches: those of LLaVA-1.5.
    `mg_llava`: MG-LLaVA, huggingface.co/papers/2406.17770, mg_llava/config/vicuna (PhoenixZ810/MG-LLaVA at 27c269e);
        batches are per device, 256 and 128 on eight. Both towers stay frozen.
"""


def two_stages(column: str = "released", tower_rate: Any = None, system: str = "mqt") -> list[Stage]:
    """The two stages of a system: AdamW, a cosine schedule with a warm-up of 0.03, no weight decay, one epoch each.

    Args:
        column (`str`): `"released"`, the one set of numbers.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`, in stage II; frozen by default, as released.
        system (`str`): A key of `SYSTEMS`.

    Returns:
        `<system>/I`, the connector, and `<system>/II`, connector and language model. Stage I of `llava_mini` wants a
        model without `view_ops` and `token_ops`; `from_pretrained(its folder, config=..., output_loading_info=True)`
        with the configuration of the preset keeps what it learned and makes the rest anew.

    Raises:
        ValueError: If the column is unknown.
    """
    _check_column(column, system)
    own = SYSTEMS[system]
    tuned = dict.fromkeys(("connector", "language_model", "lm_head"), TUNE_RATE)
    align = Stage(
        f"{system}/I",
        {own.align_part: ALIGN_RATE},
        views=own.align_views,
        batch_size=ALIGN_BATCH,
        zero_stage=2,
        max_image_tokens=own.align_tokens,
    )
    return [
        align,
        replace(
            align,
            name=f"{system}/II",
            trainable={**tower_rates(tower_rate), **tuned},
            views=own.tune_views,
            batch_size=TUNE_BATCH,
            zero_stage=own.tune_zero,
            max_image_tokens=own.tune_tokens,
        ),
    ]


def moe_llava(column: str = "released", tower_rate: Any = None) -> list[Stage]:
    """MoE-LLaVA's three stages: the connector, connector and language model, and the experts of the upcycled model.

    Args:
        column, tower_rate: As in `two_stages`; the third stage leaves the tower alone.

    Returns:
        `moe_llava/I` and `moe_llava/II` for the dense model; `moe_llava/III`, experts and gates, for what
        `hires-lmm upcycle` makes of it.

    Raises:
        ValueError: If the column is unknown.

    Source: MoE-LLaVA, huggingface.co/papers/2401.15947, scripts/v1 (PKU-YuanGroup/MoE-LLaVA at 6cb5f66). Its third
        stage trains every feed-forward, those of dense layers too; here the experts alone.
    """
    _check_column(column, "moe_llava")
    align, tune = two_stages(column, tower_rate, "inf_llava")
    return [
        replace(align, name="moe_llava/I"),
        replace(tune, name="moe_llava/II", zero_stage=2),
        replace(tune, name="moe_llava/III", trainable=dict.fromkeys(EXPERTS, TUNE_RATE), zero_stage=2),
    ]


def llava_mod(column: str = "released", tower_rate: Any = None) -> list[Stage]:
    """Distillation from a larger model: AdamW, a cosine schedule with a warm-up of 0.03, one epoch each.

    Args:
        column (`str`): `"released"`, the one set of numbers.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`, in stage II; frozen by default, as released.

    Returns:
        `llava_mod/I`, the connector; `llava_mod/II`, connector and language model, which learn the teacher's
        distributions alone; `llava_mod/III`, the feed-forward layers and gates of the model with experts that
        `hires-lmm upcycle` makes of it, which learn distributions and answers; `llava_mod/IV`, the same layers, for a
        trainer of preferences whose reference is the teacher. II and III want the objective `mimic`. Batches are not
        published: the scripts have 8 a device.

    Raises:
        ValueError: If the column is unknown.

    Source: LLaVA-MoD, huggingface.co/papers/2408.15881, shells/train/qwen (shufangxun/LLaVA-MoD at 481ca57).
    """
    _check_column(column, "llava_mod")
    dense = dict.fromkeys(("connector", "language_model", "lm_head"), TUNE_RATE)
    sparse = "language_model.layers.*.mlp"
    only, both = {"generation": 0.0, "mimic": 1.0}, {"generation": 1.0, "mimic": 1.0}
    return [
        Stage("llava_mod/I", {"connector": ALIGN_RATE}, zero_stage=2),
        Stage("llava_mod/II", {**tower_rates(tower_rate), **dense}, loss_weights=only, zero_stage=2),
        Stage("llava_mod/III", {sparse: TUNE_RATE}, loss_weights=both, zero_stage=2),
        Stage("llava_mod/IV", {sparse: PREFERENCE_RATE}, zero_stage=2, noise=False),
    ]


def _check_column(column: str, plan: str) -> None:
    if column not in COLUMNS:
        raise ValueError(f"Unknown column {column!r} of the plan {plan!r}; known columns: {', '.join(COLUMNS)}.")
