"""The optimizer and its learning rate.

AdamW with fp32 states, and a learning rate that is recomputed from the step each time rather than remembered; only `plateau`, which
listens to the validation loss, has a small state to save. Knows nothing of the loop.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bdh_mlflow.config import SchedulerConfig, TrainingConfig

PLATEAU_THRESHOLD = 1e-4  # relative fall of the loss that counts as improvement; torch's ReduceLROnPlateau


def build_optimizer(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters (every parameter of BDH is a matrix, so weight decay spares none), as the published training does."""
    return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


class LearningRate:
    """The learning rate of each update: linear warm-up to the peak, then the configured shape, never below min_lr."""

    def __init__(self, peak: float, scheduler: SchedulerConfig) -> None:
        self._peak = peak
        self._config = scheduler
        self._scale = 1.0
        self._best = math.inf
        self._bad_evaluations = 0

    def at(self, step: int) -> float:
        """Rate of the update that completes after `step` others (step counts from 0).

        warm-up of W updates: peak * (step + 1) / W.   After it, with k = step - W and K = decay_steps - W:
        cosine: min + (peak - min) * (1 + cos(pi k / K)) / 2;  linear: peak - (peak - min) * k / K;  both min_lr from decay_steps on.
        exponential: peak * gamma^k.   plateau: peak * factor^(cuts so far).   constant: peak.
        """
        c = self._config
        if step < c.warmup_steps:
            return self._peak * (step + 1) / c.warmup_steps
        k = step - c.warmup_steps
        if c.type == "constant":
            return self._peak
        if c.type == "exponential":
            return max(c.min_lr, self._peak * c.gamma**k)
        if c.type == "plateau":
            return max(c.min_lr, self._peak * self._scale)
        assert c.decay_steps is not None, "the configuration is resolved before it gets here"
        done = min(1.0, k / (c.decay_steps - c.warmup_steps))
        share = (1 + math.cos(math.pi * done)) / 2 if c.type == "cosine" else 1 - done
        return c.min_lr + (self._peak - c.min_lr) * share

    def observe(self, val_loss: float) -> None:
        """Hear a validation loss; plateau cuts the rate after more than `patience` evaluations without improvement."""
        if val_loss < self._best * (1 - PLATEAU_THRESHOLD):
            self._best, self._bad_evaluations = val_loss, 0
            return
        self._bad_evaluations += 1
        if self._bad_evaluations > self._config.patience:
            self._scale *= self._config.factor
            self._bad_evaluations = 0

    def state_dict(self) -> dict[str, Any]:
        """What `at` cannot compute from the step."""
        return {"scale": self._scale, "best": self._best, "bad_evaluations": self._bad_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._scale, self._best, self._bad_evaluations = state["scale"], state["best"], state["bad_evaluations"]
