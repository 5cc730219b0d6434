"""Exponents are recovered, and other distributions told apart."""

import numpy as np

from bdh_mlflow.analysis.powerlaw import fit


def test_the_exponent_of_a_power_law_is_found() -> None:
    values = np.random.default_rng(0).zipf(2.5, 5000)
    found = fit(values)
    assert abs(found.exponent - 2.5) < 0.1
    assert found.exponential.ratio > 2
    assert found.exponential.p < 0.05


def test_an_exponential_is_not_taken_for_one() -> None:
    values = np.random.default_rng(0).geometric(0.1, 5000)
    found = fit(values)
    assert found.exponential.ratio < 0
    assert found.lognormal.ratio < 0


def test_counts_of_a_public_report_have_the_exponent_of_its_reference() -> None:
    """powerlaw#61: 2.59 from 1 on by Clauset's own program, where an approximation found 3.81 from 6 on."""
    counts = {1: 233, 2: 33, 3: 13, 4: 10, 5: 2, 6: 3, 7: 2, 8: 2, 9: 1, 11: 1, 15: 1, 18: 1}
    found = fit(np.repeat(list(counts), list(counts.values())))
    assert (round(found.exponent, 2), found.k_min) == (2.59, 1)


def test_too_few_values_are_said() -> None:
    assert fit(np.array([1, 2, 3])).cells()[1] == "too few"
    assert fit(np.full(100, 3)).cells()[1] == "too few", "all the same"
