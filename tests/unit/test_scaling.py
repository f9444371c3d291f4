"""The scaling law on the paper's own tables, and branch divergence on processes whose curve is known."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hires_lmm.scaling import (
    branch_divergence,
    divergence_of_deltas,
    fit_distance_law,
    fit_scaling_law,
    plot_divergence,
    plot_laws,
)
from hires_lmm.scaling.lines import fit_line


TABLES = json.loads((Path(__file__).parents[1] / "fixtures" / "scaling_tables.json").read_text())
PRINTED = [
    (name, column, pair)
    for name, columns in TABLES["table1_c_alpha"].items()
    for column, pair in columns.items()
    if pair is not None
]
TOKENS = [1, 8, 16, 32, 64, 128, 256, 384, 512, 768]


# --- Table 1


def scores_of(name: str, column: str) -> tuple[list[int], list[float]]:
    scores = TABLES["scores"][column][name]
    return [int(tokens) for tokens in scores], list(scores.values())


def reference_line(tokens, scores) -> tuple[float, float]:
    """alpha and ln c by the normal equations."""
    matrix = np.stack([np.log(tokens), np.ones(len(tokens))], axis=1)
    slope, intercept = np.linalg.solve(matrix.T @ matrix, matrix.T @ np.log(scores))
    return -slope, -intercept / slope


@pytest.mark.parametrize("name, column, pair", PRINTED, ids=lambda value: str(value)[:24])
def test_table_1_from_its_own_scores(name: str, column: str, pair: list[str]):
    """alpha to all printed digits; c to all printed digits that scores with three decimals determine."""
    tokens, scores = scores_of(name, column)
    fit = fit_scaling_law(tokens, scores)
    assert f"{fit.alpha:.4f}" == pair[1]
    assert (fit.alpha, fit.log_c) == pytest.approx(reference_line(tokens, scores), rel=1e-9)
    printed = float(pair[0])
    last_digit = 0.5 * 10 ** (math.floor(math.log10(printed)) - 4) / printed
    rounding = 0.0
    for index in range(len(scores)):  # how far ln c moves when one score moves by half of its last digit
        moved = [score + 0.0005 * (place == index) for place, score in enumerate(scores)]
        rounding += abs(reference_line(tokens, moved)[1] - reference_line(tokens, scores)[1])
    assert abs(fit.log_c - math.log(printed)) <= last_digit + rounding
    assert rounding < 0.06  # so at least the exponent and the first digit of c are pinned
    if rounding < last_digit:
        assert f"{fit.c:.4e}" == pair[0]


def test_table_1_in_numbers():
    """7 of the 35 c agree in all five digits as printed; the largest deviation of ln c is below one percent."""
    fits = [(fit_scaling_law(*scores_of(name, column)), pair) for name, column, pair in PRINTED]
    assert sum(f"{fit.c:.4e}" == pair[0] for fit, pair in fits) == 7
    assert max(abs(fit.log_c - math.log(float(pair[0]))) for fit, pair in fits) < 0.01
    assert sum(fit.alpha > 0 for fit, _ in fits) == 1  # RealWorldQA without the question


# --- the fit


def test_an_exact_law_is_recovered_by_both_methods():
    scores = [(3e-5 / n) ** -0.4 for n in TOKENS]
    for method in ("least_squares", "theil_sen"):
        fit = fit_scaling_law(TOKENS, scores, method)
        assert (fit.alpha, fit.c) == pytest.approx((-0.4, 3e-5), rel=1e-6)
        assert fit.alpha_interval == pytest.approx((-0.4, -0.4), rel=1e-6)
        assert fit.r_squared == pytest.approx(1) and fit.residual_std == pytest.approx(0, abs=1e-9)
        assert fit.predict([10, 1000]) == pytest.approx([(3e-5 / 10) ** -0.4, (3e-5 / 1000) ** -0.4])


def test_a_few_odd_points_move_least_squares_and_not_theil_sen():
    scores = [10 * n**0.3 for n in TOKENS]
    scores[-1] /= 20
    scores[4] *= 3
    assert abs(fit_scaling_law(TOKENS, scores).alpha + 0.3) > 0.1
    robust = fit_scaling_law(TOKENS, scores, "theil_sen")
    assert robust.alpha == pytest.approx(-0.3, abs=1e-9)
    assert robust.alpha_interval[0] <= -0.3 <= robust.alpha_interval[1]
    assert robust == fit_scaling_law(TOKENS, scores, "theil_sen")


@pytest.mark.parametrize("degrees, student", [(1, 12.706205), (2, 4.302653), (8, 2.306004), (30, 2.042272)])
def test_the_interval_of_a_slope_is_as_wide_as_the_tables_of_student_say(degrees, student):
    x = np.linspace(-1, 1, degrees + 2)
    y = 3 * x + np.random.default_rng(0).normal(size=len(x))
    fit = fit_line(x, y)
    error = fit.residual_std / np.sqrt((x**2).sum())
    assert fit.slope_interval == pytest.approx((fit.slope - student * error, fit.slope + student * error), rel=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    x, log_c, hits = np.log(TOKENS), 2.0, np.zeros(2)
    for _ in range(400):
        scores = np.exp(-0.5 * log_c + 0.5 * x + rng.normal(0, 0.3, len(x)))
        fit = fit_scaling_law(TOKENS, scores)
        pairs = ((fit.alpha_interval, -0.5), (fit.c_interval, np.exp(log_c)))
        hits += [low <= truth <= high for (low, high), truth in pairs]
    assert (np.abs(hits / 400 - 0.95) < 0.035).all()  # three standard deviations


def test_c_is_unbounded_where_alpha_may_be_zero():
    fit = fit_scaling_law([1, 10, 100, 1000], [5, 6, 4, 5.5])
    assert fit.alpha_interval[0] < 0 < fit.alpha_interval[1]
    assert fit.c_interval == (0.0, math.inf)
    assert fit.to_dict()["c_interval"] == [0.0, None]
    level = fit_scaling_law([1, 10, 100], [5, 5, 5])
    assert level.alpha == 0 and math.isnan(level.c) and level.predict(50) == pytest.approx(5)
    assert json.loads(json.dumps(level.to_dict(), allow_nan=False))["c"] is None


@pytest.mark.parametrize(
    "tokens, scores, method, words",
    [
        ([1, 2], [1, 2], "least_squares", "tokens must be at least 3"),
        ([1, 2, 3], [1, 2], "least_squares", "scores must be 3 numbers"),
        ([1, 2, 3], [1, 0, 2], "least_squares", r"scores holds 0.0; a power law needs positive"),
        ([1, 2, float("nan")], [1, 1, 2], "least_squares", "tokens holds nan"),
        ([4, 4, 4], [1, 1, 2], "theil_sen", "same x"),
        ([1, 2, 3], [1, 2, 3], "magic", "method='magic' is unknown; choose one of least_squares, theil_sen"),
    ],
)
def test_wrong_points(tokens, scores, method, words):
    with pytest.raises(ValueError, match=words):
        fit_scaling_law(tokens, scores, method)


def test_scores_against_distance():
    distances = [1.0, 2.0, 5.0, 9.0]
    fit = fit_distance_law(distances, [7 * d**0.25 for d in distances])
    assert (fit.beta, fit.scale) == pytest.approx((0.25, 7))
    assert json.loads(json.dumps(fit.to_dict()))["distances"] == distances
    # distance as the root of n: alpha = -beta / 2
    law = fit_scaling_law(TOKENS, [7 * math.sqrt(n) ** 0.25 for n in TOKENS])
    assert law.alpha == pytest.approx(-0.125)


# --- branch divergence of known processes


def loops(deltas: np.ndarray) -> tuple[list[float], list[float]]:
    """Distance and dependency written out with loops."""
    pairs, length, _ = deltas.shape
    distances, dependencies = [], []
    for n in range(1, length + 1):
        distances.append(math.sqrt(sum(float(np.sum(deltas[p, :n].sum(axis=0) ** 2)) for p in range(pairs)) / pairs))
        cosines = [
            float(deltas[p, s] @ deltas[p, t] / np.linalg.norm(deltas[p, s]) / np.linalg.norm(deltas[p, t]))
            for p in range(pairs)
            for s in range(n)
            for t in range(n)
            if s != t
        ]
        dependencies.append(sum(cosines) / len(cosines) if cosines else math.nan)
    return distances, dependencies


def test_curves_are_the_definitions():
    deltas = np.random.default_rng(0).normal(0.3, 1, (3, 7, 4))
    curve = divergence_of_deltas(deltas)
    distances, dependencies = loops(deltas)
    assert curve.distance == pytest.approx(distances)
    assert curve.dependency[1:] == pytest.approx(dependencies[1:]) and math.isnan(curve.dependency[0])
    assert curve.eta == pytest.approx(max(np.linalg.norm(delta) for pair in deltas for delta in pair))
    assert curve.num_pairs == 3 and curve.lengths.tolist() == list(range(1, 8))
    assert curve.bound[3] == pytest.approx(curve.eta * math.sqrt(4 + 12 * dependencies[3]))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_independent_differences_grow_as_the_root_of_n():
    deltas = unit(np.random.default_rng(0).normal(size=(400, 64, 32)))
    curve = divergence_of_deltas(deltas)
    assert curve.distance == pytest.approx(np.sqrt(curve.lengths), rel=0.05)
    assert np.abs(curve.dependency[8:]).max() < 0.01
    assert curve.bound[8:] == pytest.approx(np.sqrt(curve.lengths[8:]), rel=0.1)
    assert curve.linear_from(0.1) is None


def test_equal_differences_grow_linearly():
    direction = unit(np.random.default_rng(0).normal(size=(5, 1, 8)))
    curve = divergence_of_deltas(np.repeat(2 * direction, 20, axis=1))
    assert curve.distance == pytest.approx(2.0 * curve.lengths)
    assert curve.dependency[1:] == pytest.approx(np.ones(19))
    assert curve.bound == pytest.approx(curve.distance)
    assert curve.linear_from(0.095) == 12  # 1 / (n - 1) < 0.095 from n = 12
    assert curve.stable_from(1e-3) == 2


def test_an_autoregressive_process_has_its_known_dependency():
    """Unit vectors with E cos(delta_s, delta_t) = r^|s - t|: a sign that flips with probability (1 - r) / 2."""
    rng, r, length = np.random.default_rng(0), 0.8, 40
    signs = np.cumprod(np.where(rng.random((4000, length)) < (1 - r) / 2, -1, 1), axis=1)
    direction = unit(rng.normal(size=(4000, 1, 6)))
    curve = divergence_of_deltas(signs[..., None] * direction)
    for n in (2, 5, 10, 40):
        mean_cosine = sum(r ** abs(s - t) for s in range(n) for t in range(n) if s != t) / (n * n - n)
        assert curve.dependency[n - 1] == pytest.approx(mean_cosine, abs=0.02)
        assert curve.distance[n - 1] == pytest.approx(math.sqrt(n + (n * n - n) * mean_cosine), rel=0.03)
    assert (curve.distance <= curve.bound + 1e-9).all()


def test_curves_can_be_read_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curve = divergence_of_deltas(np.random.default_rng(0).normal(size=(4, 9, 3)))
    assert curve.distance_at([1, 9]) == [curve.distance[0], curve.distance[8]]
    with pytest.raises(ValueError, match="lengths 1 to 9, not 10"):
        curve.distance_at([3, 10])
    with pytest.raises(ValueError, match="epsilon=0 must be positive"):
        curve.stable_from(0)
    with pytest.raises(ValueError, match=r"expected \(pairs, lengths, width\)"):
        divergence_of_deltas(np.zeros((3, 4)))
    assert plot_divergence(curve, tmp_path / "curve.svg").stat().st_size > 5000
    fit = fit_scaling_law(TOKENS, [n**0.2 for n in TOKENS])
    assert "alpha = -0.200" in plot_laws({"right answers": fit}, tmp_path / "law.svg").read_text()


# --- branch divergence of models


class Walker(nn.Module):
    """A model whose state at a position is the table row of its token plus a tenth of the sum of the rows before."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
        self.device = torch.device("cpu")
        self.calls = []

    @property
    def base_model(self):
        return self

    def forward(self, input_ids):
        self.calls.append(tuple(input_ids.shape))
        rows = self.table[input_ids]
        return SimpleNamespace(last_hidden_state=rows + 0.1 * (rows.cumsum(dim=1) - rows))


def token_pairs(count: int, length: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(0, 20, length + rng.integers(0, 3)).tolist() for _ in range(2)) for _ in range(count)]


def test_a_model_is_read_behind_the_prefix_in_batches():
    model, pairs, prefix = Walker(), token_pairs(7, 12), [3, 1, 4]
    length = min(len(branch) for pair in pairs for branch in pair)

    def states(branch: list[int]) -> np.ndarray:
        rows = [model.table[token].detach().double().numpy() for token in prefix + branch]
        return np.stack([row + 0.1 * sum(rows[:index], np.zeros(6)) for index, row in enumerate(rows)])[3:]

    deltas = np.stack([states(first[:length]) - states(second[:length]) for first, second in pairs])
    distances, dependencies = loops(deltas)
    seen = []

    def note(done: int, total: int, text: str) -> None:
        seen.append((done, total))

    curve = branch_divergence(model, pairs, prefix=prefix, batch_size=3, progress=note)
    assert model.calls == [(6, 3 + length), (6, 3 + length), (2, 3 + length)]
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]
    assert curve.distance == pytest.approx(distances, rel=1e-5)
    assert curve.dependency[1:] == pytest.approx(dependencies[1:], abs=1e-5)
    single = branch_divergence(model, pairs, prefix=prefix, batch_size=1)
    assert single.distance == pytest.approx(curve.distance, rel=1e-6)
    assert single.eta == pytest.approx(curve.eta)
    short = branch_divergence(model, pairs, prefix=prefix, max_length=5)
    assert short.distance == pytest.approx(curve.distance[:5], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_language_models_of_transformers(family: str):
    from transformers import AutoModelForCausalLM

    from builders import randomise, tiny_text_config

    model = randomise(AutoModelForCausalLM.from_config(tiny_text_config(family))).eval()
    pairs = [([5, 6, 7, 8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17], [18, 19, 20, 21])]
    curve = branch_divergence(model, pairs, prefix=[22, 23])
    deltas = []
    for pair in pairs:
        outputs = [
            model(torch.tensor([[22, 23, *branch[:4]]]), output_hidden_states=True).hidden_states[-1][0, 2:]
            for branch in pair
        ]
        deltas.append((outputs[0] - outputs[1]).detach().numpy())
    distances, _ = loops(np.stack(deltas))
    assert curve.distance == pytest.approx(distances, rel=1e-4)


def test_texts_and_wrong_pairs():
    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 20 for letter in text]}

    model = Walker()
    by_text = branch_divergence(model, [("abcd", "efgh")], tokenizer, prefix="xy")
    by_ids = branch_divergence(model, [([ord(c) % 20 for c in "abcd"], [ord(c) % 20 for c in "efgh"])], prefix=[0, 1])
    assert by_text.distance == pytest.approx(by_ids.distance)
    for pairs, options, words in [
        ([], {}, "at least one"),
        ([([1], [2], [3])], {}, "list of pairs"),
        ([("ab", "cd")], {}, "'ab' is a text; pass tokenizer"),
        ([([1, 2, 3], [1, 2, 3]), ([1, 2], [3, 4, 5])], {"max_length": 3}, "Pair 1 has a continuation of 2 tokens"),
        ([([], [1])], {}, "Pair 0 has a continuation of 0 tokens"),
        ([([1], [2])], {"batch_size": 0}, "batch_size=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            branch_divergence(model, pairs, **options)
