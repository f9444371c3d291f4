"""How far two continuations move apart with their length, measured on a language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BranchDivergence:
    """Curves over the length n = 1, 2, ..., N.

    Args:
        distance (`np.ndarray` of shape `(N,)`): Root of the mean over pairs of |delta_1 + ... + delta_n|^2.
        dependency (`np.ndarray` of shape `(N,)`): g(n), the mean cosine between different delta_t up to n, over pairs;
            NaN at n = 1, where there is only one.
        eta (`float`): The largest |delta_t| of all.
        num_pairs (`int`): Pairs that were measured.
    """

    distance: np.ndarray
    dependency: np.ndarray
    eta: float
    num_pairs: int

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)`: 1, 2, ..., N."""
        return np.arange(1, len(self.distance) + 1)

    @property
    def bound(self) -> np.ndarray:
        """`(N,)`: eta * root of n + (n^2 - n) g(n).

        It bounds the distance where cosines between different deltas are not negative; where n + (n^2 - n) g(n) is
        below 0 the bound is 0.
        """
        n = self.lengths.astype(np.float64)
        return self.eta * np.sqrt(np.maximum(n + (n**2 - n) * np.nan_to_num(self.dependency), 0))

    def linear_from(self, epsilon: float = 0.1) -> int | None:
        """Where growth is linear in n: the smallest n from which on n / ((n^2 - n) g(n)) stays below epsilon.

        Source: the first threshold of huggingface.co/papers/2412.18387, "the ratio of the two parts of the bound". The
        text does not say which quotient: this one, independent part over dependent part, is our reading.
        """
        n = self.lengths.astype(np.float64)
        shared = (n**2 - n) * np.nan_to_num(self.dependency)
        with np.errstate(divide="ignore", invalid="ignore"):
            holds = (shared > 0) & (n / shared < _checked_epsilon(epsilon))
        return _first_lasting(holds, 1)

    def stable_from(self, epsilon: float = 1e-3) -> int | None:
        """Where the dependency has settled: the smallest n from which on |g(n + 1) - g(n)| stays below epsilon.

        Source: the second threshold of huggingface.co/papers/2412.18387; "from which on" is our reading.
        """
        changes = np.abs(np.diff(self.dependency[1:]))
        return _first_lasting(changes < _checked_epsilon(epsilon), 2)

    def distance_at(self, tokens: Sequence[int]) -> list[float]:
        """The distances at some lengths from 1 to N, for `fit_distance_law`."""
        outside = [length for length in tokens if not 1 <= length <= len(self.distance)]
        if outside:
            raise ValueError(
                f"The curve has lengths 1 to {len(self.distance)}, not {outside[0]}; measure longer continuations."
            )
        return [float(self.distance[length - 1]) for length in tokens]


@dataclass(frozen=True)
class _Sums:
    """What is kept of each pair: |sum of deltas|^2 and |sum of unit deltas|^2 minus their number, `(P, N)`, and the
    largest |delta| `(P,)`."""

    squares: np.ndarray
    cosines: np.ndarray
    largest: np.ndarray


def divergence_of_deltas(deltas: np.ndarray | torch.Tensor) -> BranchDivergence:
    """The curves of given differences.

    Args:
        deltas (`(P, N, D)`): delta_t = f(x_t) - f(y_t) of each pair at each position.

    Source: huggingface.co/papers/2412.18387, eqs. 1 to 18 as far as its text fixes them.
    """
    tensor = torch.as_tensor(deltas)
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(f"deltas has the shape {tuple(tensor.shape)}, expected (pairs, lengths, width).")
    return _join([_sum_up(tensor)])


def _sum_up(deltas: torch.Tensor) -> _Sums:
    """The sums of some pairs, in double precision."""
    deltas = deltas.double()
    norms = deltas.norm(dim=-1)
    units = torch.where(norms[..., None] > 0, deltas / norms[..., None].clamp(min=1e-300), 0.0)
    squares = deltas.cumsum(dim=1).square().sum(dim=-1)
    cosines = units.cumsum(dim=1).square().sum(dim=-1) - (norms > 0).double().cumsum(dim=1)
    return _Sums(squares.cpu().numpy(), cosines.cpu().numpy(), norms.amax(dim=1).cpu().numpy())


def _join(parts: list[_Sums]) -> BranchDivergence:
    squares = np.concatenate([part.squares for part in parts])
    cosines = np.concatenate([part.cosines for part in parts])
    n = np.arange(1, squares.shape[1] + 1, dtype=np.float64)
    dependency = np.full(len(n), np.nan)
    dependency[1:] = cosines.mean(axis=0)[1:] / (n**2 - n)[1:]
    largest = max(float(part.largest.max()) for part in parts)
    return BranchDivergence(np.sqrt(squares.mean(axis=0)), dependency, largest, len(squares))


def _checked_epsilon(epsilon: float) -> float:
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r} must be positive.")
    return epsilon


def _first_lasting(holds: np.ndarray, first: int) -> int | None:
    """The length (the first entry has length `first`) from which on all entries hold."""
    broken = np.flatnonzero(~holds)
    start = int(broken[-1]) + 1 if len(broken) else 0
    return first + start if start < len(holds) else None


@torch.inference_mode()
def branch_divergence(
    model: Any,
    pairs: Sequence[tuple],
    tokenizer: Any = None,
    prefix: Any = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> BranchDivergence:
    """Measure how two continuations move apart with their length.

    f is the last hidden state of the model, after its last norm and without its head; x_t and y_t are the two
    continuations, each read with everything before it.

    Args:
        model: Any causal language model of transformers, in evaluation mode.
        pairs (sequence of `tuple`): Two continuations each, as texts or as token ids.
        tokenizer (*optional*): For texts; special tokens are not added.
        prefix (*optional*): Text or ids before all continuations; its positions are not counted.
        max_length (`int`, *optional*): Positions of each continuation that are read; by default those of the shortest.
        batch_size (`int`): Pairs that the model reads at once.
        progress (`Callable`, *optional*): Called with pairs done, pairs in all and a description.

    Returns:
        The curves; every length is a mean over the same pairs.

    Raises:
        ValueError: If there are no pairs, a continuation is empty or shorter than `max_length`, or texts come without
            a tokenizer.
    """
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("pairs must be a list of pairs of continuations, at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    branches = [[_to_ids(branch, tokenizer) for branch in pair] for pair in pairs]
    head = [] if prefix is None else _to_ids(prefix, tokenizer)
    shortest = min(range(len(pairs)), key=lambda index: min(map(len, branches[index])))
    available = min(map(len, branches[shortest]))
    length = available if max_length is None else max_length
    if not 1 <= length <= available:
        raise ValueError(
            f"Pair {shortest} has a continuation of {available} tokens, but {length} are asked for; leave the pair "
            "out, or pass a max_length from 1 to that."
        )
    parts = []
    for start in range(0, len(branches), batch_size):
        if progress is not None:
            progress(start, len(branches), "pairs")
        batch = branches[start : start + batch_size]
        rows = [head + branch[:length] for pair in batch for branch in pair]
        states = model.base_model(input_ids=torch.tensor(rows, device=model.device)).last_hidden_state
        states = states[:, len(head) :].unflatten(0, (len(batch), 2)).double()
        parts.append(_sum_up(states[:, 0] - states[:, 1]))
    if progress is not None:
        progress(len(branches), len(branches), "pairs")
    return _join(parts)


def _to_ids(branch: Any, tokenizer: Any) -> list[int]:
    if not isinstance(branch, str):
        return [int(token) for token in branch]
    if tokenizer is None:
        raise ValueError(f"The continuation {branch[:40]!r} is a text; pass tokenizer, or token ids.")
    return list(tokenizer(branch, add_special_tokens=False)["input_ids"])
