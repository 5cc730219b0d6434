"""Is a distribution of degrees a power law? Maximum likelihood, and likelihood ratios against an exponential and a log-normal.

Method: Clauset, Shalizi and Newman, "Power-law distributions in empirical data", SIAM Review 51 (2009): the tail from k_min on, k_min where
the fit is nearest to the data (Kolmogorov-Smirnov), alternatives compared on the same tail by Vuong's test.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import minimize, minimize_scalar

SMALLEST_TAIL = 25  # values, for a fit to say anything


class Against(NamedTuple):
    """A power law against another distribution.   ratio: of log-likelihoods, above 0 for the power law.   p: for no difference."""

    ratio: float
    p: float

    def __str__(self) -> str:
        return f"{self.ratio:+.1f}, p {self.p:.2g}"


class Fit(NamedTuple):
    """A power law p(k) ~ k^-exponent from k_min on.   tail: values that are.   All NaN for too few."""

    exponent: float
    k_min: int
    tail: int
    exponential: Against
    lognormal: Against

    def cells(self) -> list[str]:
        """In words, for a table."""
        if np.isnan(self.exponent):
            return ["-", "too few", str(self.tail), "-", "-"]
        return [str(self.k_min), f"{self.exponent:.2f}", str(self.tail), str(self.exponential), str(self.lognormal)]


UNKNOWN = Against(float("nan"), float("nan"))


def fit(values: NDArray[np.int64]) -> Fit:
    """Fit the tail of whole numbers; those below 1 do not count."""
    values = values[values > 0]
    best: tuple[float, int, float] | None = None
    for k_min in np.unique(values):
        tail = values[values >= k_min]
        if len(tail) < SMALLEST_TAIL or tail.max() == k_min:
            break
        exponent = _exponent(tail, int(k_min))
        distance = _distance(tail, int(k_min), exponent)
        if best is None or distance < best[0]:
            best = distance, int(k_min), exponent
    if best is None:
        return Fit(float("nan"), 0, len(values), UNKNOWN, UNKNOWN)
    _, k_min, exponent = best
    tail = values[values >= k_min].astype(float)
    own = -exponent * np.log(tail) - np.log(special.zeta(exponent, k_min))
    return Fit(exponent, k_min, len(tail), _against(own, _exponential(tail, k_min)), _against(own, _lognormal(tail, k_min)))


def _exponent(tail: NDArray[np.int64], k_min: int) -> float:
    logs = np.log(tail).sum()

    def loss(exponent: float) -> float:
        return float(exponent * logs + len(tail) * np.log(special.zeta(exponent, k_min)))

    return float(minimize_scalar(loss, bounds=(1.01, 12.0), method="bounded").x)


def _distance(tail: NDArray[np.int64], k_min: int, exponent: float) -> float:
    """Between the distribution functions of data and fit, the largest."""
    each = np.unique(tail)
    fitted = 1 - special.zeta(exponent, each + 1) / special.zeta(exponent, k_min)
    seen = np.searchsorted(np.sort(tail), each, side="right") / len(tail)
    return float(np.abs(fitted - seen).max())


def _exponential(tail: NDArray[np.float64], k_min: int) -> NDArray[np.float64]:
    """Log-likelihoods of the best p(k) ~ exp(-rate k), k = k_min, k_min + 1, ..."""
    rate = np.log1p(1 / max(float((tail - k_min).mean()), 1e-9))
    return np.asarray(-rate * (tail - k_min) + np.log(-np.expm1(-rate)))


def _lognormal(tail: NDArray[np.float64], k_min: int) -> NDArray[np.float64]:
    """Log-likelihoods of the best log-normal, each whole number having the mass of half a unit around it, cut off below k_min."""

    def each(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        place, log_width = parameters
        frozen = stats.norm(place, np.exp(log_width))
        mass = frozen.cdf(np.log(tail + 0.5)) - frozen.cdf(np.log(tail - 0.5))
        whole = frozen.sf(np.log(k_min - 0.5))
        return np.asarray(np.log(np.maximum(mass, 1e-300)) - np.log(max(whole, 1e-300)))

    logs = np.log(tail)
    begin = np.array([logs.mean(), np.log(max(float(logs.std()), 0.1))])
    best = minimize(lambda parameters: -float(each(parameters).sum()), begin, method="Nelder-Mead", bounds=[(-20, 20), (-3, 3)])
    return each(best.x)


def _against(own: NDArray[np.float64], other: NDArray[np.float64]) -> Against:
    difference = own - other
    spread = float(difference.std())
    if spread < 1e-12:
        return Against(0.0, 1.0)
    ratio = float(difference.sum() / (spread * np.sqrt(len(difference))))
    return Against(ratio, float(special.erfc(abs(ratio) / np.sqrt(2))))
