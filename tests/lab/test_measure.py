from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridkv_lab.measure import Trace, by_position, compare, histogram, join, summarize, worst


def logits(n: int, vocabulary: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))


def trace(n: int = 50, noise: float = 0.1) -> Trace:
    reference = logits(n)
    following = torch.arange(n) % 11
    return compare(reference, reference + noise * logits(n, seed=1), following, 100)


def test_divergence_and_probabilities_are_those_of_torch() -> None:
    reference, candidate = logits(7), logits(7, seed=1)
    following = torch.tensor([0, 3, 10, 2, 2, 9, 5])
    found = compare(reference, candidate, following, 40)
    p, q = torch.distributions.Categorical(logits=reference), torch.distributions.Categorical(logits=candidate)
    np.testing.assert_allclose(found.kld, torch.distributions.kl_divergence(p, q), rtol=1e-4)
    np.testing.assert_allclose(found.nll, -q.log_prob(following), rtol=1e-5)
    np.testing.assert_allclose(found.reference_nll, -p.log_prob(following), rtol=1e-5)
    np.testing.assert_allclose(
        found.delta_p, q.log_prob(following).exp() - p.log_prob(following).exp(), rtol=1e-3, atol=1e-7
    )
    assert found.same_top.tolist() == (reference.argmax(-1) == candidate.argmax(-1)).float().tolist()
    assert found.position.tolist() == list(range(40, 47))


def test_a_token_that_the_reference_excludes_adds_nothing() -> None:
    reference = logits(1)
    reference[0, 3] = -torch.inf
    candidate = reference.clone()
    assert compare(reference, candidate, torch.tensor([0]), 0).kld[0] == 0
    candidate[0, 3] = 0.0
    assert 0 < compare(reference, candidate, torch.tensor([0]), 0).kld[0] < math.inf


def test_equal_logits_differ_by_nothing() -> None:
    same = summarize(compare(logits(9), logits(9), torch.zeros(9, dtype=torch.long), 0))
    assert (same.kld_mean, same.kld_max, same.rms_delta_p, same.ratio, same.same_top) == (0, 0, 0, 1, 1)


def test_summary() -> None:
    found = trace()
    figures = summarize(found)
    assert figures.n_tokens == 50
    assert figures.perplexity == pytest.approx(math.exp(found.nll.mean()))
    assert figures.ratio == pytest.approx(math.exp(found.nll.mean() - found.reference_nll.mean()), rel=1e-6)
    assert figures.kld_mean_se == pytest.approx(found.kld.std(ddof=1) / math.sqrt(50), rel=1e-5)
    assert figures.kld_median <= figures.kld_p95 <= figures.kld_p99 <= figures.kld_p999 <= figures.kld_max
    assert figures.rms_delta_p == pytest.approx(math.sqrt((found.delta_p**2).mean()), rel=1e-5)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    reference, candidate = logits(6), logits(6, seed=1)
    following = torch.zeros(6, dtype=torch.long)
    clean = compare(reference[:4], candidate[:4], following[:4], 0)
    candidate[4, 2], candidate[5] = torch.nan, torch.inf
    figures, expected = summarize(compare(reference, candidate, following, 0)), summarize(clean)
    assert (figures.n_tokens, figures.n_non_finite) == (6, 2)
    assert figures.kld_mean == pytest.approx(expected.kld_mean)
    assert figures.perplexity == pytest.approx(expected.perplexity)


def test_nothing_finite_is_no_figure() -> None:
    figures = summarize(compare(logits(3), logits(3) * torch.nan, torch.zeros(3, dtype=torch.long), 0))
    assert figures.n_non_finite == 3
    assert math.isnan(figures.kld_mean)
    assert math.isnan(figures.perplexity)


def test_positions_cover_all_tokens_once() -> None:
    buckets = by_position(trace(50), 160)
    assert sum(n for _, _, n in buckets) == 50
    assert [first for first, _, _ in buckets] == list(range(100, 150, 5))
    kld = trace(50).kld
    assert buckets[0][1] == pytest.approx(kld[:5].mean(), rel=1e-5)


def test_histogram_counts_all_tokens() -> None:
    found = histogram(trace(50))
    assert sum(n for _, n in found) == 50
    nothing = histogram(trace(5, noise=0.0))
    assert nothing[0] == (-9.0, 5)


def test_worst_comes_first_and_what_is_not_finite_before_it() -> None:
    found = trace(20)
    found.kld[7] = np.nan
    first, second, *_ = worst(found)
    assert first[0] == 7
    assert second[1] == np.nanmax(found.kld)


def test_join_keeps_the_order() -> None:
    both = join([trace(3), trace(4)])
    assert both.n == 7
    assert both.position.tolist() == [100, 101, 102, 100, 101, 102, 103]
