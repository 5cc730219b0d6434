"""A moving average of the weights, evaluated beside them: less noisy than the last update, at the cost of one more copy in memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after each update, from the weights at the start.

    The decay grows to its value as min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that the beginning
    is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), [p.detach() for p in self._parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """In the body the model has the average for weights; afterwards its own again, to the bit."""
        with torch.no_grad():
            own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, Any]:
        """The average by name of parameter."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; an empty one, of a training without an average, leaves it at the weights of now."""
        source = state or {name: parameter.detach() for name, parameter in self._parameters.items()}
        for name, tensor in self._average.items():
            tensor.copy_(source[name])

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
