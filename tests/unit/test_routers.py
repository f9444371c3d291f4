"""Scores and keep rules of the router against plain references."""

import pytest
import torch

from hires_lmm.modeling.routers_hires_lmm import (
    cosine_scores,
    keep_budget,
    keep_threshold,
    saliency_scores,
)


def test_saliency_is_one_minus_the_cosine_to_the_mean():
    features = torch.randn(9, 5)
    mean = features.mean(0)
    wanted = [1 - float(f @ mean / (f.norm() * mean.norm())) for f in features]
    torch.testing.assert_close(saliency_scores(features), torch.tensor(wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_saliency_does_not_depend_on_lengths(size):
    features = torch.randn(9, 5)
    torch.testing.assert_close(saliency_scores(size * features), saliency_scores(features), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", [torch.ones(7), torch.tensor([1.0, 0, 1, 1, 0, 0, 1])])
def test_cosine_sums_over_the_readable_text(weights):
    features, text = torch.randn(9, 5), torch.randn(7, 5)
    wanted = torch.zeros(9)
    for i in range(9):
        for j in range(7):
            wanted[i] += weights[j] * torch.cosine_similarity(features[i], text[j], dim=0)
    torch.testing.assert_close(cosine_scores(features, text, weights), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("image, words", [(1e-4, 1), (1, 1e-4), (1e4, 1e-4)])
def test_cosine_does_not_depend_on_lengths(image, words):
    features, text = torch.randn(9, 5), torch.randn(7, 5)
    wanted = cosine_scores(features, text, torch.ones(7))
    found = cosine_scores(image * features, words * text, torch.ones(7))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_cosine_of_zero_vectors_is_zero_not_nan():
    scores = cosine_scores(torch.zeros(3, 4), torch.zeros(2, 4), torch.ones(2))
    assert scores.tolist() == [0, 0, 0]
    assert not saliency_scores(torch.zeros(3, 4)).isnan().any()


def test_cosine_cost_is_linear():
    """No tensor of size image x text may appear: 20,000 x 20,000 floats would need 1.6 GB."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        cosine_scores(torch.randn(20_000, 8), torch.randn(20_000, 8), torch.ones(20_000))
    assert max(event.cpu_memory_usage for event in profile.function_events) < 50_000_000


@pytest.mark.parametrize("budget", [0, 1, 4, 8])
def test_budget_keeps_the_highest(budget):
    scores = torch.tensor([0.3, 0.9, -1.0, 0.5, 0.2, 0.8, 0.1, 0.4])
    kept = keep_budget(scores, budget)
    ranked = sorted(range(8), key=lambda index: -float(scores[index]))
    assert kept.nonzero()[:, 0].tolist() == sorted(ranked[:budget])


def test_equal_scores_keep_the_earlier_token():
    assert keep_budget(torch.zeros(6), 2).tolist() == [True, True, False, False, False, False]
    assert keep_threshold(torch.zeros(8), 0.5, 1.0).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("budget", [-1, 4])
def test_impossible_budget_names_both_numbers(budget):
    with pytest.raises(ValueError, match=f"Cannot keep {budget} of 3"):
        keep_budget(torch.zeros(3), budget)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_threshold_keeps_the_smallest_set_that_exceeds_gamma(gamma, temperature):
    scores = torch.randn(40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    kept = keep_threshold(scores, gamma, temperature)
    mass = torch.exp(scores / temperature) / torch.exp(scores / temperature).sum()
    chosen, total = set(), 0.0
    for index in sorted(range(40), key=lambda i: -float(mass[i])):
        chosen.add(index)
        total += float(mass[index])
        if total > gamma:
            break
    assert set(kept.nonzero()[:, 0].tolist()) == chosen


def test_threshold_always_keeps_one():
    assert keep_threshold(torch.tensor([100.0, 0.0, 0.0]), 0.01, 1.0).tolist() == [True, False, False]
    assert keep_threshold(torch.zeros(0), 0.5, 1.0).shape == (0,)
