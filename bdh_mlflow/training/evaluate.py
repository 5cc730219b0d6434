"""Validation loss of a model, with its training state left as it was."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bdh_mlflow.distributed import ALONE, Report, World


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: list[Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> float | None:
    """Mean loss over (B, T + 1) windows in nats per token; None if `stopped` became true on the way. Draws no random numbers.

    world: processes that each take every W-th batch; the losses are summed in the order of the batches, whoever computed them.
    """
    training = model.training
    model.eval()
    own = range(world.rank, len(batches), world.size)
    losses, done = torch.zeros(len(batches), dtype=torch.float64), 0
    try:
        for number in own:
            if stopped():
                break
            windows = batches[number].to(device).long()
            with autocast():
                _, loss = model(windows[:, :-1], windows[:, 1:])
            losses[number] = loss.item()
            done += 1
    finally:
        model.train(training)
    if not all(report.complete for report in world.exchange(Report(complete=float(done == len(own))))):
        return None
    total, tokens = 0.0, 0
    for loss, batch in zip(world.sum_exact(losses).tolist(), batches, strict=True):
        total += loss * batch[:, 1:].numel()
        tokens += batch[:, 1:].numel()
    return total / tokens
