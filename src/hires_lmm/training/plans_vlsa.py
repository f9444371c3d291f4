"""The plan of VLSA, and one a row of its ablation: perceiver, reconstruction and cognition without each other."""

from typing import Any

from .stages import Stage, tower_rates


ALIGN, ADAPT, TUNE, TOWER, DENOISER = 1e-3, 1e-4, 1e-5, 2e-6, 1e-5
"""Learning rates of the connector in stages I, II and of everything in III; of the tower; of the denoiser."""

EPIGONE_PART, DENOISER_PART = "objectives.reconstruction.epigone", "objectives.reconstruction.denoiser"
COGNITION = {"pixels": 0.5, "codebook": 0.5}
"""Rates of the two tasks in stage III: how many samples get a question of each."""

COLUMNS = ("llama3_8b",)

ROWS: dict[str, dict[str, bool]] = {
    "vlsa_baseline": {},
    "vlsa_low_resolution": {"low_resolution": True},
    "vlsa_perceiver": {},
    "vlsa_reconstruction": {"reconstruction": True},
    "vlsa_cognition": {"cognition": True},
    "vlsa": {"reconstruction": True, "cognition": True},
}
"""Rows of the ablation, in its order. For the preset `vlsa`; `vlsa_baseline` (LLaVA-NeXT under the same schedule) and
`vlsa_cognition` for `llava_next`; `vlsa_low_resolution` for `vlsa` without view operations."""


def vlsa(column: str = "llama3_8b", tower_rate: Any = None, row: str = "vlsa") -> list[Stage]:
    """A row of VLSA's ablation; by default all of VLSA, its row 6, which needs the objective `reconstruction`.

    Args:
        column (`str`): `"llama3_8b"`, the language model of the paper.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`, in stages II and III; 2e-6 by default.
        row (`str`): A key of `ROWS`.

    Returns:
        Three stages: I connector and Epigone; II denoiser and tower too; III everything, with cognition tasks.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S; data: 558K, LLaVAR 422K, 790K. The paper gives neither learning
    rates nor batch sizes: those of SliME's Table 7 for the same language model, LLaVA-NeXT's for the tower, ours for
    stage II and the denoiser. In stage I it names the perceiver alone; the projector behind it is new too and learns
    with it. The rates of the cognition tasks and their place in stage III are ours.
    """
    if column not in COLUMNS:
        raise ValueError(f"Unknown column {column!r} of the plan; known columns: {', '.join(COLUMNS)}.")
    has = ROWS[row]
    tower = tower_rates(TOWER if tower_rate is None else tower_rate)
    language = {"language_model": TUNE, "lm_head": TUNE}
    objective = [{EPIGONE_PART: ALIGN}, {EPIGONE_PART: ADAPT, DENOISER_PART: DENOISER}]
    objective = [*objective, {EPIGONE_PART: TUNE, DENOISER_PART: DENOISER}] if "reconstruction" in has else [{}] * 3
    rates = {
        "I": {"connector": ALIGN, **objective[0]},
        "II": {**tower, "connector": ADAPT, **objective[1]},
        "III": {**tower, "connector": TUNE, **language, **objective[2]},
    }
    return [
        Stage(
            f"{row}/{number}",
            parts,
            views="global" if "low_resolution" in has else "all",
            loss_weights={"reconstruction": 1.0} if "reconstruction" in has else {},
            batch_size=128 if number == "III" else 256,
            zero_stage=3 if number == "III" else 2,
            cognition=dict(COGNITION) if "cognition" in has and number == "III" else None,
        )
        for number, parts in rates.items()
    ]
