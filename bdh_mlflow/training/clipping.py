"""How large the gradients of an update may be: a fixed norm, and besides it ZClip (arXiv:2504.02507), which clips outliers."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

WARMUP = 25  # norms that the first mean and variance are of; arXiv:2504.02507, section 4
KEPT = 0.97  # of mean and variance at each norm, alpha of the paper


class Clipping:
    """Clips the gradients of each update.   clip: to a norm, returning the one before.   largest: 0 for none.   most: of ZClip, 0 off."""

    def __init__(self, clip: Callable[[float], Tensor], largest: float, most: float) -> None:
        self._clip, self._largest = clip, largest or math.inf
        self._zclip = ZClip(most) if most else None

    def __call__(self) -> Tensor:
        """Clip; returns the norm before. An outlier is clipped once more, which needs its norm here and now."""
        norm = self._clip(self._largest)
        if self._zclip is not None and math.isfinite(value := float(norm)) and (limit := self._zclip.limit(value)) < self._largest:
            self._clip(limit)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Of ZClip; empty without it."""
        return self._zclip.state_dict() if self._zclip is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        if self._zclip is not None:
            self._zclip.load_state_dict(state)


class ZClip:
    """The limits of norms that are outliers.

    With mean m and variance s^2 of the norms so far, as moving averages: a norm g whose z = (g - m) / s is above `most` is clipped to
    m + s most^2 / z. The averages take in the clipped norm, so that a burst of outliers does not become the rule.   most: standard
    deviations; the paper's is 2.5.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def limit(self, norm: float) -> float:
        """The largest norm for gradients of this one, which is taken in; infinity where it is no outlier.   norm: finite."""
        if len(self._first) < WARMUP:
            self._first.append(norm)
            if len(self._first) == WARMUP:
                self._mean = math.fsum(self._first) / WARMUP
                self._variance = math.fsum((each - self._mean) ** 2 for each in self._first) / WARMUP
            return math.inf
        deviation, limit = math.sqrt(self._variance), math.inf
        if deviation > 0 and (z := (norm - self._mean) / deviation) > self._most:
            limit = self._mean + self._most**2 / z * deviation
        taken = min(norm, limit)
        self._mean = KEPT * self._mean + (1 - KEPT) * taken
        self._variance = KEPT * self._variance + (1 - KEPT) * (taken - self._mean) ** 2
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance, and the norms that the first ones were of."""
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; an empty one, of a training without it, begins anew."""
        if state:
            self._first, self._mean, self._variance = list(state["first"]), state["mean"], state["variance"]
