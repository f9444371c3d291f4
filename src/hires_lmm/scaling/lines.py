"""Straight lines through logarithms: least squares and a robust fit, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np

from ..extras import import_extra


stats = import_extra("scipy.stats", "evaluation")
METHODS = ("least_squares", "theil_sen")
RESAMPLES = 2000
CONFIDENCE = 0.95
Interval = tuple[float, float]


@dataclass(frozen=True)
class LineFit:
    """`y = intercept + slope * x`; `zero` is the x at which y is 0 (NaN for a level line), intervals are of 95 %."""

    slope: float
    intercept: float
    slope_interval: Interval
    zero: float
    zero_interval: Interval
    r_squared: float
    residual_std: float


def log_points(name: str, values: Sequence[float], count: int | None = None) -> np.ndarray:
    """Logarithms of at least three positive numbers; `name` is what they are, for messages."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 3 or (count is not None and len(array) != count):
        expected = "at least 3" if count is None else str(count)
        raise ValueError(f"{name} must be {expected} numbers in a row, not of shape {array.shape}.")
    wrong = [value for value in array.tolist() if not isfinite(value) or value <= 0]
    if wrong:
        raise ValueError(
            f"{name} holds {wrong[0]!r}; a power law needs positive finite numbers. Leave that point out and say so."
        )
    return np.log(array)


def fit_line(x: np.ndarray, y: np.ndarray, method: str = "least_squares", seed: int = 0) -> LineFit:
    """A line: by `least_squares`, intervals by Student's t and Fieller, or `theil_sen`, the median of the slopes
    between all points, intervals by a bootstrap over points."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if len(np.unique(x)) < 2:
        raise ValueError("All points have the same x, so no line is determined; measure at another one.")
    fit = _least_squares if method == "least_squares" else _theil_sen
    slope, intercept = fit(x, y)
    residuals = y - intercept - slope * x
    spread = float(((y - y.mean()) ** 2).sum())
    std = sqrt(float((residuals**2).sum()) / (len(x) - 2))
    if method == "least_squares":
        intervals = _classical_intervals(x, slope, intercept, std)
    else:
        intervals = _bootstrap_intervals(x, y, seed)
    return LineFit(
        slope=slope,
        intercept=intercept,
        slope_interval=intervals[0],
        zero=_zero(slope, intercept),
        zero_interval=intervals[1],
        r_squared=1 - float((residuals**2).sum()) / spread if spread else float("nan"),
        residual_std=std,
    )


def _zero(slope: float, intercept: float) -> float:
    return -intercept / slope if slope else float("nan")


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    fit = stats.linregress(x, y)
    return float(fit.slope), float(fit.intercept)


def _theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # of its own interval, where many points are alike
        fit = stats.theilslopes(y, x, method="joint")
    return float(fit.slope), float(fit.intercept)


def _classical_intervals(x: np.ndarray, slope: float, intercept: float, std: float) -> tuple[Interval, Interval]:
    """Intervals of slope (Student) and of the zero of the line (Fieller)."""
    count, mean = len(x), float(x.mean())
    variance = std**2 / float(((x - mean) ** 2).sum())
    limit = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 2)) ** 2
    half = sqrt(limit * variance)
    level = intercept + slope * mean
    # Fieller: all z with (level + slope * z)^2 <= limit * (std^2 / count + variance * z^2), z counted from the mean
    square, linear, constant = slope**2 - limit * variance, level * slope, level**2 - limit * std**2 / count
    discriminant = linear**2 - square * constant
    if square <= 0 or discriminant < 0:
        return (slope - half, slope + half), (-float("inf"), float("inf"))
    root = sqrt(discriminant)
    ends = sorted(((-linear - root) / square + mean, (-linear + root) / square + mean))
    return (slope - half, slope + half), (ends[0], ends[1])


def _bootstrap_intervals(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[Interval, Interval]:
    """Percentile intervals over resampled points; samples with a single x are drawn again."""
    rng = np.random.default_rng(seed)
    slopes: list[float] = []
    zeros: list[float] = []
    while len(slopes) < RESAMPLES:
        chosen = rng.integers(0, len(x), len(x))
        if len(np.unique(x[chosen])) < 2:
            continue
        slope, intercept = _theil_sen(x[chosen], y[chosen])
        slopes.append(slope)
        zeros.append(_zero(slope, intercept))
    tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    low, high = np.percentile(slopes, tails)
    if low <= 0 <= high:
        return (float(low), float(high)), (-float("inf"), float("inf"))
    first, last = np.percentile(zeros, tails)
    return (float(low), float(high)), (float(first), float(last))
