"""Counts of active neurons over forward passes, and the metrics made of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdh_mlflow.model.layer import ACTIVITY_STRIDE, Activity


class Counts:
    """Of L layers with H heads of N neurons.   layers: added to by the layers, one each."""

    def __init__(self, layers: int, heads: int, neurons: int, device: torch.device) -> None:
        self.layers = [Activity(*torch.zeros(2, heads, neurons, device=device)) for _ in range(layers)]
        self._tokens = 0

    def begin(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """A forward pass begins: a hook.   inputs: ids (B, T) first."""
        rows, tokens = inputs[0].shape
        self._tokens += rows * len(range(0, tokens, ACTIVITY_STRIDE))

    def facts(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What `BDH.observed` gives; nothing where no token was counted."""
        counts = summed(torch.stack([torch.stack(each) for each in self.layers]).cpu().double()).float()
        tokens = int(summed(torch.tensor(self._tokens, dtype=torch.float64)))
        found = {}
        for depth, activity in enumerate(counts):
            for name, each in zip(Activity._fields, activity, strict=True):
                if tokens:
                    found[f"bdh/active_{name}_l{depth}"] = each.mean().item() / tokens
                    found[f"bdh/dead_{name}_l{depth}"] = (each == 0).float().mean().item()
        return found
