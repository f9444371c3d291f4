"""How scores grow with the number of visual tokens, and with the distance between branches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite
from typing import Any

import numpy as np

from .lines import Interval, LineFit, fit_line, log_points


@dataclass(frozen=True)
class ScalingFit:
    """The law `S(n) = (c / n)^alpha`.

    Args:
        alpha (`float`): The exponent; negative where more tokens score higher.
        c (`float`): The number of tokens at which the law gives 1; 0 or infinite beyond the range of floats.
        log_c (`float`): Its natural logarithm; NaN for scores that do not change.
        alpha_interval, c_interval, log_c_interval (`tuple[float, float]`): 95 % intervals.
        r_squared, residual_std (`float`): Of ln S, see `LineFit`.
        method (`str`): How it was fitted.
        tokens, scores (`tuple[float, ...]`): The points.
        log_scale (`float`): ln S at one token; `alpha * log_c` where that is defined.
    """

    alpha: float
    c: float
    log_c: float
    alpha_interval: Interval
    c_interval: Interval
    log_c_interval: Interval
    r_squared: float
    residual_std: float
    method: str
    tokens: tuple[float, ...]
    scores: tuple[float, ...]
    log_scale: float

    def predict(self, tokens: Any) -> np.ndarray:
        """The law at other numbers of tokens: an array of scores."""
        return np.exp(self.log_scale - self.alpha * np.log(np.asarray(tokens, dtype=np.float64)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; what is not finite becomes None."""
        return _json_values(asdict(self))


@dataclass(frozen=True)
class DistanceFit:
    """The law `S = scale * distance^beta`.

    Args:
        beta (`float`): The exponent.
        scale (`float`): The score at distance 1.
        r_squared, residual_std (`float`): Of ln S, see `LineFit`.
        distances, scores (`tuple[float, ...]`): The points.
    """

    beta: float
    scale: float
    beta_interval: Interval
    r_squared: float
    residual_std: float
    method: str
    distances: tuple[float, ...]
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; what is not finite becomes None."""
        return _json_values(asdict(self))


def fit_scaling_law(
    tokens: Sequence[float], scores: Sequence[float], method: str = "least_squares", seed: int = 0
) -> ScalingFit:
    """Fit `S(n) = (c / n)^alpha` to scores, by a line through their logarithms.

    Args:
        tokens (sequence of `float`): Numbers of visual tokens, at least three; one may come several times (seeds).
        scores (sequence of `float`): The score at each; positive.
        method (`str`): `"least_squares"`, as the paper; `"theil_sen"`, which a few odd points do not move.
        seed (`int`): Of the bootstrap of `"theil_sen"`.

    Returns:
        The fit with 95 % intervals. `c` is where the line crosses ln S = 0, so its value depends on the unit of the
        scores (the paper's are percent or points), and it is unbounded where alpha may be 0.

    Raises:
        ValueError: If points are missing or not positive, or the method is unknown.

    Source: "Scaling Capability in Token Space", huggingface.co/papers/2412.18387, Table 1. The intervals and the
    robust fit are ours.
    """
    x = log_points("tokens", tokens)
    line = fit_line(x, log_points("scores", scores, len(x)), method, seed)
    low, high = line.slope_interval
    return ScalingFit(
        alpha=-line.slope,
        c=_exp(line.zero),
        log_c=line.zero,
        alpha_interval=(-high, -low),
        c_interval=(_exp(line.zero_interval[0]), _exp(line.zero_interval[1])),
        log_c_interval=line.zero_interval,
        r_squared=line.r_squared,
        residual_std=line.residual_std,
        method=method,
        tokens=tuple(float(value) for value in tokens),
        scores=tuple(float(value) for value in scores),
        log_scale=line.intercept,
    )


def fit_distance_law(
    distances: Sequence[float], scores: Sequence[float], method: str = "least_squares", seed: int = 0
) -> DistanceFit:
    """Fit `S = scale * distance^beta`, by a line through logarithms.

    Args:
        distances (sequence of `float`): Distances between branches at some numbers of tokens, see
            `BranchDivergence.distance_at`; at least three.

    Returns:
        The fit. While the distance grows as the root of n, alpha = -beta / 2; while it grows as n, alpha = -beta.

    Source: huggingface.co/papers/2412.18387, eq. 23: performance is taken to be proportional to distance^beta.
    """
    x = log_points("distances", distances)
    line: LineFit = fit_line(x, log_points("scores", scores, len(x)), method, seed)
    return DistanceFit(
        beta=line.slope,
        scale=_exp(line.intercept),
        beta_interval=line.slope_interval,
        r_squared=line.r_squared,
        residual_std=line.residual_std,
        method=method,
        distances=tuple(float(value) for value in distances),
        scores=tuple(float(value) for value in scores),
    )


def _exp(value: float) -> float:
    """The exponential, infinite beyond the range of floats."""
    return float("inf") if value > 709 else exp(value)


def _json_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
