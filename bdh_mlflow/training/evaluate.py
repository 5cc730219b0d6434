"""Validation loss of a model, with its training state left as it was."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: list[Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over (B, T + 1) windows in nats per token; None if `stopped` became true on the way. Draws no random numbers."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in batches:
            if stopped():
                return None
            windows = batch.to(device).long()
            with autocast():
                _, loss = model(windows[:, :-1], windows[:, 1:])
            total += loss.item() * windows[:, 1:].numel()
            tokens += windows[:, 1:].numel()
    finally:
        model.train(training)
    return total / tokens
