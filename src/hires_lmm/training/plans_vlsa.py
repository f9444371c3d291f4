"""The plan of VLSA, and one a row of its ablation: perceiver, reconstruction and cognition without each other."""

from .stages import Stage


ALIGN, ADAPT, TUNE, TOWER, DENOISER = 1e-3, 1e-4, 1e-5, 2e-6, 1e-5
"""Learning rates of the connector in stages I, II and of everything in III; of the tower; of the denoiser."""

EPIGONE_PART, DENOISER_PART = "objectives.reconstruction.epigone", "objectives.reconstruction.denoiser"
COGNITION = {"pixels": 0.5, "codebook": 0.5}
"""Rates of the two tasks in stage III: how many samples get a question of each."""

COLUMNS = ("llama3_8b",)


def vlsa(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """All of VLSA; row 6 of its ablation. For the preset `vlsa` and the objective `reconstruction`.

    Args:
        column (`str`): `"llama3_8b"`, the language model of the paper.
        tower_rate (`float`, *optional*): Learning rate of the vision tower in stages II and III; 2e-6 by default.

    Returns:
        Three stages: I connector and Epigone; II denoiser and tower too; III everything, with cognition tasks.

    Raises:
        ValueError: If the column is unknown.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S; data: 558K, LLaVAR 422K, 790K. The paper gives neither learning
    rates nor batch sizes: those of SliME's Table 7 for the same language model, LLaVA-NeXT's for the tower, ours for
    stage II and the denoiser. In stage I it names the perceiver alone; the projector behind it is new too and learns
    with it. The rates of the cognition tasks and their place in stage III are ours.
    """
    return _stages("vlsa", column, tower_rate, has_reconstruction=True, has_cognition=True)


def vlsa_baseline(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """Row 1: LLaVA-NeXT under the same schedule. For the preset `llava_next`.

    Args:
        column (`str`): As in `vlsa`.
        tower_rate (`float`, *optional*): As in `vlsa`.
    """
    return _stages("vlsa_baseline", column, tower_rate)


def vlsa_low_resolution(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """Row 2: the low-resolution view only. For the preset `vlsa` without view operations.

    Args:
        column (`str`): As in `vlsa`.
        tower_rate (`float`, *optional*): As in `vlsa`.
    """
    return _stages("vlsa_low_resolution", column, tower_rate, views="global")


def vlsa_perceiver(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """Row 3: the perceiver alone. For the preset `vlsa`.

    Args:
        column (`str`): As in `vlsa`.
        tower_rate (`float`, *optional*): As in `vlsa`.
    """
    return _stages("vlsa_perceiver", column, tower_rate)


def vlsa_reconstruction(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """Row 4: perceiver and reconstruction. For the preset `vlsa`.

    Args:
        column (`str`): As in `vlsa`.
        tower_rate (`float`, *optional*): As in `vlsa`.
    """
    return _stages("vlsa_reconstruction", column, tower_rate, has_reconstruction=True)


def vlsa_cognition(column: str = "llama3_8b", tower_rate: float | None = None) -> list[Stage]:
    """Row 5: LLaVA-NeXT and cognition alignment alone. For the preset `llava_next`.

    Args:
        column (`str`): As in `vlsa`.
        tower_rate (`float`, *optional*): As in `vlsa`.
    """
    return _stages("vlsa_cognition", column, tower_rate, has_cognition=True)


def _stages(
    plan: str,
    column: str,
    tower_rate: float | None,
    views: str = "all",
    has_reconstruction: bool = False,
    has_cognition: bool = False,
) -> list[Stage]:
    """The three stages with what a row of the ablation has."""
    if column not in COLUMNS:
        raise ValueError(f"Unknown column {column!r} of the plan; known columns: {', '.join(COLUMNS)}.")
    tower = {"vision_tower": TOWER if tower_rate is None else tower_rate}
    weights = {"reconstruction": 1.0} if has_reconstruction else {}

    def objective(epigone: float, denoiser: float | None) -> dict[str, float]:
        rates = {EPIGONE_PART: epigone} if denoiser is None else {EPIGONE_PART: epigone, DENOISER_PART: denoiser}
        return rates if has_reconstruction else {}

    language = {"language_model": TUNE, "lm_head": TUNE}
    rates = {
        "I": {"connector": ALIGN, **objective(ALIGN, None)},
        "II": {**tower, "connector": ADAPT, **objective(ADAPT, DENOISER)},
        "III": {**tower, "connector": TUNE, **language, **objective(TUNE, DENOISER)},
    }
    return [
        Stage(
            f"{plan}/{number}",
            parts,
            views=views,
            loss_weights=dict(weights),
            batch_size=128 if number == "III" else 256,
            zero_stage=3 if number == "III" else 2,
            cognition=dict(COGNITION) if has_cognition and number == "III" else None,
        )
        for number, parts in rates.items()
    ]
