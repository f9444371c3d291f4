"""Straight lines through logarithms: least squares and a robust fit, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, gamma, isfinite, pi, sqrt

import numpy as np


METHODS = ("least_squares", "theil_sen")
RESAMPLES = 2000
CONFIDENCE = 0.95
MOST = 1e12
"""No quantile is looked for beyond it."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class LineFit:
    """`y = intercept + slope * x`.

    Args:
        slope, intercept (`float`): The line.
        slope_interval (`tuple[float, float]`): 95 % interval of the slope.
        zero (`float`): The x at which y is 0; NaN for a level line.
        zero_interval (`tuple[float, float]`): 95 % interval of it; unbounded where the slope may be 0.
        r_squared (`float`): Share of the variance of y that the line explains; NaN where y does not vary.
        residual_std (`float`): Standard deviation of the residuals, with two degrees of freedom taken off.
    """

    slope: float
    intercept: float
    slope_interval: Interval
    zero: float
    zero_interval: Interval
    r_squared: float
    residual_std: float


def log_points(name: str, values: Sequence[float], count: int | None = None) -> np.ndarray:
    """Logarithms of positive numbers.

    Args:
        name (`str`): What they are, for messages.
        values (sequence of `float`): The numbers, at least three.
        count (`int`, *optional*): How many there must be.

    Returns:
        `(n,)` float64.

    Raises:
        ValueError: If there are too few, too many, or one is not positive and finite.
    """
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
    """Fit a line.

    Args:
        x, y (`np.ndarray` of shape `(n,)`): Points, n at least 3.
        method (`str`): `"least_squares"`, intervals by Student's t and Fieller; `"theil_sen"`: median of the slopes
            between all points, intervals by a bootstrap over points.
        seed (`int`): Of the bootstrap.

    Returns:
        The fit.

    Raises:
        ValueError: If the method is unknown or x has less than two values.
    """
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
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean())


def _theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    first, second = np.triu_indices(len(x), 1)
    differs = x[first] != x[second]
    first, second = first[differs], second[differs]
    slope = float(np.median((y[second] - y[first]) / (x[second] - x[first])))
    return slope, float(np.median(y - slope * x))


def _classical_intervals(x: np.ndarray, slope: float, intercept: float, std: float) -> tuple[Interval, Interval]:
    """Intervals of slope (Student) and of the zero of the line (Fieller)."""
    count, mean = len(x), float(x.mean())
    variance = std**2 / float(((x - mean) ** 2).sum())
    limit = student_quantile(count - 2) ** 2
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


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence.

    Args:
        degrees (`int`): Degrees of freedom, at least 1.
        confidence (`float`): In (0, 1).

    Returns:
        The quantile, to about ten digits.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    scale = 2 / sqrt(pi) * _gamma_quotient(degrees)

    def inside(limit: float) -> float:
        end = atan(limit / sqrt(degrees))
        return scale * end / 2 * float(weights @ np.cos(end / 2 * (nodes + 1)) ** (degrees - 1))

    low, high = 0.0, 1.0
    while inside(high) < confidence and high < MOST:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return (low + high) / 2


def _gamma_quotient(degrees: int) -> float:
    """Gamma((d + 1) / 2) / Gamma(d / 2), by its recursion in steps of two."""
    quotient, at = (gamma(1.0) / gamma(0.5), 1) if degrees % 2 else (gamma(1.5) / gamma(1.0), 2)
    while at < degrees:
        quotient *= (at + 1) / at
        at += 2
    return quotient
