"""Rules call the tokens outliers that their definitions do, on exact norms and on the histogram."""

import numpy as np
import pytest
import torch

from register_adapter.artifacts import RULES, Threshold, apply_rule, resolve_rule
from register_adapter.artifacts.rules.histogram import (
    BINS,
    RELATIVE_ERROR,
    NormHistogram,
    bin_centres,
    bin_edges,
    bins_of,
    nearest_edge,
    weighted_quantile,
)
from register_adapter.artifacts.rules.mixture import fit_mixture


def norms(kind="plain", size=20_000, seed=0):
    rng = np.random.default_rng(seed)
    bulk = rng.lognormal(3.0, 0.25, size)
    if kind == "two modes":  # objects before a smooth background: two modes, neither of them rare
        bulk[: size // 3] *= 2.2
    if kind == "tail":
        bulk *= 1 + 0.3 * rng.pareto(3.0, size)
    if kind in ("high", "both"):
        bulk[: size // 50] = rng.lognormal(5.2, 0.1, size // 50)
    if kind in ("low", "both"):
        bulk[-(size // 40) :] = rng.lognormal(1.0, 0.15, size // 40)
    return rng.permutation(bulk).astype(np.float32)


def naive(rule, values):
    """Each rule's own definition, written out on the raw norms."""
    values = values.astype(np.float64)
    logs = np.log(values)
    distance = np.abs(logs - np.median(logs)) / (1.4826 * np.median(np.abs(logs - np.median(logs))))
    return {
        "fixed": lambda: values > 150,
        "fixed:60": lambda: values > 60,
        "sigma": lambda: values > values.mean() + 3 * values.std(),
        "sigma:2": lambda: values > values.mean() + 2 * values.std(),
        "two_sided_sigma:2": lambda: np.abs(values - values.mean()) > 2 * values.std(),
        "percentile": lambda: values > np.percentile(values, 98),
        "two_sided_percentile:95": lambda: (
            (values > np.percentile(values, 97.5)) | (values < np.percentile(values, 2.5))
        ),
        "mad": lambda: (logs > np.median(logs)) & (distance > 6),
        "two_sided_mad:4": lambda: distance > 4,
    }[rule]()


SIMPLE = (
    *("fixed", "fixed:60", "sigma", "sigma:2", "two_sided_sigma:2", "percentile", "two_sided_percentile:95", "mad"),
    "two_sided_mad:4",
)


@pytest.mark.parametrize("kind", ["plain", "high", "low", "tail"])
@pytest.mark.parametrize("rule", SIMPLE)
def test_the_same_tokens_are_outliers_as_by_the_definition(rule, kind):
    values = norms(kind)
    expected = naive(rule, values)
    threshold = apply_rule(rule, torch.from_numpy(values).reshape(100, -1))
    assert np.array_equal(threshold.outliers(values.astype(np.float64)), expected)
    assert threshold.separated == bool(expected.any())


@pytest.mark.parametrize("kind", ["plain", "high", "low", "tail"])
@pytest.mark.parametrize("rule", [*SIMPLE, "auto"])
def test_on_the_histogram_lines_move_by_no_more_than_its_bins_allow(rule, kind):
    values = torch.from_numpy(norms(kind))
    exact = apply_rule(rule, values)
    counts = torch.bincount(bins_of(values), minlength=BINS).double().numpy()
    sketched = resolve_rule(rule)(bin_centres(), counts)
    assert sketched.separated == exact.separated
    # A line k MADs of log-norms off moves with the median, and k times with the MAD.
    bins = {"mad": 1 + 6 * 1.4826, "two_sided_mad:4": 1 + 4 * 1.4826}.get(rule, 2.5)
    for sketched_line, exact_line in ((sketched.high, exact.high), (sketched.low, exact.low)):
        assert sketched_line == exact_line or abs(np.log(sketched_line / exact_line)) <= bins * np.log1p(RELATIVE_ERROR)


def test_quantiles_of_the_histogram_are_within_its_relative_error():
    for kind in ("plain", "high", "low", "tail"):
        values = torch.from_numpy(norms(kind, size=5001))
        histogram = NormHistogram(torch.device("cpu"))
        for part in values.split(777):
            histogram.add(part, torch.bincount(bins_of(part), minlength=BINS))
        summary = histogram.summary()
        exact = values.double().numpy()
        for q, value in summary["quantiles"].items():
            assert value == pytest.approx(np.quantile(exact, float(q)), rel=RELATIVE_ERROR)
        assert summary["quantiles"]["0"] == exact.min()
        assert summary["quantiles"]["1"] == exact.max()
        assert summary["mean"] == pytest.approx(exact.mean(), rel=1e-9)
        assert summary["std"] == pytest.approx(exact.std(), rel=1e-6)
        assert summary["count"] == sum(summary["counts"]) == len(exact)
        assert np.array_equal(np.histogram(exact, summary["edges"])[0], summary["counts"])


def test_norms_out_of_range_are_counted_at_the_ends():
    values = torch.tensor([0.0, 1e-9, 1.0, 1e9, torch.inf])
    assert bins_of(values).tolist() == [0, 0, nearest_edge(1.0), BINS - 1, BINS - 1]
    assert bin_edges()[nearest_edge(1.0)] == 1.0
    assert (nearest_edge(0.0), nearest_edge(float("inf"))) == (0, BINS)


@pytest.mark.parametrize("q", [0.0, 0.013, 0.25, 0.5, 0.98, 1.0])
def test_a_weighted_quantile_is_numpys_of_the_repeated_values(q):
    values, weights = np.array([1.0, 2.0, 5.0, 9.0]), np.array([3.0, 0.0, 4.0, 2.0])
    expected = np.quantile(np.repeat(values, weights.astype(int)), q)
    assert weighted_quantile(values, weights, q) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["plain", "two modes", "tail"])
@pytest.mark.parametrize("rule", ["auto", "mixture"])
@pytest.mark.parametrize("size", [300, 5000, 100_000])
def test_one_kind_of_token_is_not_taken_for_two(kind, rule, size):
    for seed in range(5 if size < 100_000 else 2):
        threshold = apply_rule(rule, norms(kind, size, seed))
        assert not threshold.separated, threshold.reason
        assert (threshold.low, threshold.high) == (0, float("inf"))
        assert threshold.reason


@pytest.mark.parametrize("size", [1000, 50_000])
@pytest.mark.parametrize("kind", ["high", "low", "both"])
def test_a_second_mode_is_found_on_its_side(kind, size):
    values = norms(kind, size)
    threshold = apply_rule("auto", values)
    assert threshold.separated
    assert (threshold.high < float("inf"), threshold.low > 0) == (kind != "low", kind != "high")
    assert (values > threshold.high).sum() == pytest.approx(size // 50 if kind != "low" else 0, rel=0.02)
    assert (values < threshold.low).sum() == pytest.approx(size // 40 if kind != "high" else 0, rel=0.02)


@pytest.mark.parametrize("kind", ["high", "low"])
def test_the_mixture_finds_a_second_mode_too(kind):
    values = norms(kind)
    threshold = apply_rule("mixture", values)
    assert threshold.separated, threshold.reason
    expected = len(values) // (50 if kind == "high" else 40)
    assert threshold.outliers(values).sum() == pytest.approx(expected, abs=0.02 * expected)


def test_the_mixture_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.mixture")
    logs = np.sort(np.log(norms("high", 4000).astype(np.float64)))
    mixture = fit_mixture(logs, np.ones_like(logs))
    theirs = sklearn.GaussianMixture(2, n_init=3, random_state=0, tol=1e-8, max_iter=500).fit(logs[:, None])
    order = np.argsort(theirs.means_[:, 0])
    assert mixture.means == pytest.approx(theirs.means_[order, 0], abs=1e-3)
    assert mixture.shares == pytest.approx(theirs.weights_[order], abs=1e-3)
    assert mixture.stds == pytest.approx(np.sqrt(theirs.covariances_[order, 0, 0]), rel=0.01)
    assert mixture.bic == pytest.approx(theirs.bic(logs[:, None]), rel=1e-4)


@pytest.mark.parametrize("values", [[3.0], [2.0] * 50, [0.0] * 9, [0.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("rule", list(RULES))
def test_no_rule_stumbles_over_odd_norms(rule, values):
    threshold = apply_rule(rule, np.array(values))
    assert isinstance(threshold, Threshold)
    assert threshold.low <= threshold.high
    if rule in ("auto", "mixture"):
        assert not threshold.separated


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nothing", "unknown rule"),
        ("auto:3", "takes no number"),
        ("sigma:x", "is not a number"),
        ("sigma:-1", "out of range"),
        ("percentile:100", "out of range"),
        ("two_sided_auto", "unknown rule"),
    ],
)
def test_wrong_rules_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        resolve_rule(rule)


def test_a_rule_of_ones_own():
    def mine(values, weights):
        return Threshold("mine", high=float(values[-1]) / 2, separated=True)

    assert apply_rule(mine, np.array([1.0, 8.0])).high == 4
