# /// script
# dependencies = ["numpy", "matplotlib"]
# ///
"""Does alternating beat descending on both halves at once? The bilinear example of SliME, section 2.3.

    python examples/bilinear_alternation.py --out bilinear.png        (10 seconds on one core)

Two halves u, v are fitted to X = ab' + ba' with |a| = |b| = 1 by minimising |X - uv'|^2 / 2. X is the difference of
two rank-one parts, (a+b)(a+b)'/2 with weight 1 + a'b and (a-b)(a-b)'/2 with weight 1 - a'b; the heavier one is the
optimum, the lighter one is the second fixed point of the paper. The script runs

* simultaneous descent: both halves step along their gradients at the same old point,
* alternating descent: u steps, then v steps and sees the new u,
* exact alternation: u is solved for, then v,

from random starts, checks each against the paper's closed forms, and says where the runs end. The theorem is that
simultaneous descent *can* sit at the second fixed point; the runs say whether it *goes* there.

Source: huggingface.co/papers/2406.08487, section 2.3 and appendix C.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np


Pair = tuple[np.ndarray, np.ndarray]


def make_target(dimension: int, overlap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors a, b with a'b = `overlap`, and X = ab' + ba'."""
    a, b = np.zeros(dimension), np.zeros(dimension)
    a[0] = 1.0
    b[:2] = overlap, np.sqrt(1 - overlap**2)
    return a, b, np.outer(a, b) + np.outer(b, a)


def loss(x: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """|X - uv'|^2 / 2 of each row of u and v (n, d)."""
    return 0.5 * ((x - u[:, :, None] * v[:, None, :]) ** 2).sum((1, 2))


def squared(u: np.ndarray) -> np.ndarray:
    """|u|^2 of each row."""
    return (u * u).sum(1, keepdims=True)


def simultaneous_step(x: np.ndarray, u: np.ndarray, v: np.ndarray, rate: float) -> Pair:
    """Both halves step along their gradients at (u, v). Rows are independent runs; X is symmetric."""
    return u + rate * (v @ x - squared(v) * u), v + rate * (u @ x - squared(u) * v)


def alternating_step(x: np.ndarray, u: np.ndarray, v: np.ndarray, rate: float) -> Pair:
    """u steps, then v steps at the new u."""
    u = u + rate * (v @ x - squared(v) * u)
    return u, v + rate * (u @ x - squared(u) * v)


def exact_step(x: np.ndarray, u: np.ndarray, v: np.ndarray, rate: float) -> Pair:
    """u is the best for v, then v is the best for the new u; `rate` is not used."""
    u = v @ x / squared(v)
    return u, u @ x / squared(u)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, float], Pair]] = {
    "simultaneous": simultaneous_step,
    "alternating": alternating_step,
    "exact": exact_step,
}


def closed_form_step(tau_nu: np.ndarray, overlap: float, rate: float) -> np.ndarray:
    """The paper's simultaneous step for u = alpha a + beta b, v = beta a + alpha b, in the coordinates
    tau = (alpha + beta) / sqrt(2) and nu = (alpha - beta) / sqrt(2)."""
    tau, nu = tau_nu
    norm = (1 + overlap) * tau**2 + (1 - overlap) * nu**2
    return np.array([(1 + rate * (1 + overlap - norm)) * tau, (1 + rate * (1 - overlap - norm)) * nu])


def closed_form_exact(z: np.ndarray, overlap: float) -> np.ndarray:
    """The paper's exact alternation for z = (alpha, beta): z <- M^2 z / (|u|^2 |v|^2)."""
    m = np.array([[1, overlap], [overlap, 1]])
    half = m @ z / (z @ m @ z)
    return m @ half / (half @ m @ half)


def run(method: str, x: np.ndarray, u: np.ndarray, v: np.ndarray, rate: float, steps: int) -> tuple[Pair, np.ndarray]:
    """Follow a method from each row; returns the ends and the losses (steps + 1, n)."""
    losses = [loss(x, u, v)]
    for _ in range(steps):
        u, v = METHODS[method](x, u, v, rate)
        losses.append(loss(x, u, v))
    return (u, v), np.array(losses)


def ending(final: float, overlap: float) -> str:
    """Which fixed point a loss belongs to: what is left of X is the part that is not fitted."""
    left = {"optimum": 0.5 * (1 - abs(overlap)) ** 2, "saddle": 0.5 * (1 + abs(overlap)) ** 2}
    for name, value in left.items():
        if abs(final - value) < 1e-3:
            return name
    return "not there yet"


def closed_form_gap(overlap: float, rate: float, steps: int) -> float:
    """Largest distance between the vectors' runs and the closed forms, over both methods that have one."""
    a, b, x = make_target(16, overlap)
    z = np.array([0.3, -0.2])
    tau_nu, exact = np.array([z.sum(), z[0] - z[1]]) / np.sqrt(2), z
    u, v = z @ np.stack([a, b]), z @ np.stack([b, a])
    pairs: dict[str, Pair] = {"simultaneous": (u[None], v[None]), "exact": (u[None], v[None])}
    gap = 0.0
    for _ in range(steps):
        pairs = {name: METHODS[name](x, *pair, rate) for name, pair in pairs.items()}
        tau_nu, exact = closed_form_step(tau_nu, overlap, rate), closed_form_exact(exact, overlap)
        alpha, beta = tau_nu.sum() / np.sqrt(2), (tau_nu[0] - tau_nu[1]) / np.sqrt(2)
        gap = max(gap, np.abs(pairs["simultaneous"][0][0] - alpha * a - beta * b).max())
        gap = max(gap, np.abs(pairs["exact"][1][0] - exact[1] * a - exact[0] * b).max())
    return gap


def count_endings(overlap: float, starts: int, rate: float, steps: int, seed: int) -> dict[str, dict[str, int]]:
    """Method -> ending -> number of random starts in 16 dimensions."""
    rng = np.random.default_rng(seed)
    _, _, x = make_target(16, overlap)
    u, v = rng.standard_normal((2, starts, 16)) / 4
    counts: dict[str, dict[str, int]] = {}
    for name in METHODS:
        ends = [ending(final, overlap) for final in run(name, x, u, v, rate, steps)[1][-1]]
        counts[name] = {end: ends.count(end) for end in sorted(set(ends))}
    return counts


def draw(file: Path, overlap: float, rate: float, steps: int, seed: int) -> None:
    """Left: closed-form simultaneous runs in the (tau, nu) plane. Right: median loss of each method over 50 starts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rng = np.random.default_rng(seed)
    figure, (plane, curve) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for _ in range(30):
        path = [rng.uniform(-1.3, 1.3, 2)]
        for _ in range(steps):
            path.append(closed_form_step(path[-1], overlap, rate))
        plane.plot(*np.array(path).T, color="tab:blue", linewidth=0.7, alpha=0.7)
    optimum, saddle = ([[1, 0], [-1, 0]], [[0, 1], [0, -1]])[:: 1 if overlap > 0 else -1]
    plane.plot(*np.array(optimum).T, "o", color="tab:green", label="optimum")
    plane.plot(*np.array(saddle).T, "X", color="tab:red", label="second fixed point: a saddle")
    plane.set(xlabel="tau", ylabel="nu", title=f"simultaneous descent, a'b = {overlap:g}")
    plane.legend(loc="upper right", fontsize=8)
    _, _, x = make_target(16, overlap)
    u, v = rng.standard_normal((2, 50, 16)) / 4
    best = 0.5 * (1 - abs(overlap)) ** 2
    for name in METHODS:
        losses = np.median(run(name, x, u, v, rate, steps)[1], axis=1)
        curve.semilogy(np.maximum(losses - best, 1e-12), label=name)
    curve.set(xlabel="step", ylabel="loss above the optimum, median of 50 starts")
    curve.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bilinear_alternation.png"))
    parser.add_argument("--starts", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for overlap in (0.5, 0.1, -0.5):
        gap = closed_form_gap(overlap, options.rate, 100)
        print(f"a'b = {overlap:+.1f}: closed forms and vectors differ by at most {gap:.1e}")
        growth = 1 + 2 * options.rate * abs(overlap)
        print(
            f"  at the second fixed point a deviation grows by {growth:.3f} a step of simultaneous descent: a saddle"
        )
        for name, ends in count_endings(overlap, options.starts, options.rate, options.steps, options.seed).items():
            print(f"  {name:12s} " + ", ".join(f"{end} {count}/{options.starts}" for end, count in ends.items()))
    draw(options.out, 0.5, options.rate, options.steps, options.seed)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
