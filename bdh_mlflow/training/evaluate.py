"""Validation loss of a model, with its training state left as it was."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdh_mlflow.distributed import ALONE, Report, World


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures mean losses over (B, T + 1) windows in nats per token; None if `stopped` became true on the way. Draws no random numbers.

    world: processes that share the windows; the losses are summed in the order of the batches, whoever computed them.
    """

    model: nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    stopped: Callable[[], bool] = lambda: False
    world: World = ALONE

    def loss(self, batches: Sequence[Tensor]) -> float | None:
        """Each window for itself. Each process takes every W-th batch."""
        return self._mean(batches, range(self.world.rank, len(batches), self.world.size))

    def carried_loss(self, batches: Sequence[Tensor], state: Any) -> float | None:
        """Each row reads on where it ended in the batch before. Rank 0 alone computes, as each batch needs the one before.

        state: of rows that have read nothing; afterwards that of the last windows.
        """
        return self._mean(batches, range(0 if self.world.rank else len(batches)), state)

    @torch.no_grad()
    def _mean(self, batches: Sequence[Tensor], own: range, *state: Any) -> float | None:
        model, training = self.model, self.model.training
        model.eval()
        losses, done = torch.zeros(len(batches), dtype=torch.float64), 0
        try:
            for number in own:
                if self.stopped():
                    break
                windows = batches[number].to(self.device).long()
                with self.autocast():
                    _, loss = model(windows[:, :-1], windows[:, 1:], *state)
                losses[number] = loss.item()
                done += 1
        finally:
            model.train(training)
        if not all(report.complete for report in self.world.exchange(Report(complete=float(done == len(own))))):
            return None
        total, tokens = 0.0, 0
        for loss, batch in zip(self.world.sum_exact(losses).tolist(), batches, strict=True):
            total += loss * batch[:, 1:].numel()
            tokens += batch[:, 1:].numel()
        return total / tokens
