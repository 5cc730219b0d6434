"""The passes of an update: the random numbers that each may draw, and the order in which their gradients are summed.

Both are functions of a pass's number in its update, so that it does not matter which process computes it. `Passes` computes those of one
process and adds up the gradients of all.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bdh_mlflow.distributed import Report, Summed, World
from bdh_mlflow.training.carry import Carry


class Item(Protocol):
    """A batch: tokens (B, T + 1), where the next update starts, and how many passes over the data are behind it."""

    @property
    def tokens(self) -> Tensor:  # noqa: D102
        ...

    @property
    def position(self) -> dict[str, Any]:  # noqa: D102
        ...

    @property
    def epoch(self) -> float:  # noqa: D102
        ...


def seed_pass(seed: int, step: int, number: int) -> None:
    """Seed torch's generators, of all devices, for one forward and backward pass.

    What a pass draws (dropout masks) is thereby a function of the training's seed, the updates completed before it and its number in the
    update. No generator has a state to save, to bring back after a failed update, or to hand to another process.
    """
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class TreeSum:
    """Sums the gradients of passes 0, 1, 2, ... in a fixed binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + ...), missing passes left out.

    The sum of 2^k passes whose first number is a multiple of 2^k is a node of the tree, so a process that computes those alone needs
    nothing of the others before they are added. Holds at most log2(passes) sums besides the gradients of the pass at hand.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums: list[tuple[int, list[Tensor]]] = []  # (level, gradients), levels falling: a binary counter

    def add(self) -> None:
        """Take the gradients that the backward pass has left in the parameters; a parameter has one in every pass or in none."""
        if not self._sums:
            self._parameters = [p for p in self._parameters if p.grad is not None]
        level, gradients = 0, [_taken(p) for p in self._parameters]
        while self._sums and self._sums[-1][0] == level:
            gradients = _added(self._sums.pop()[1], gradients)
            level += 1
        self._sums.append((level, gradients))

    def finish(self) -> None:
        """Leave the sum in the parameters, as their gradients."""
        total = self._sums.pop()[1]
        while self._sums:
            total = _added(self._sums.pop()[1], total)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "in every pass or in none"
    return gradient


def _added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def reduction(passes: int, processes: int, sharded: bool) -> str:
    """In which order the gradients of an update are summed, in words. A power of two of passes a process keeps the order of one process."""
    own = passes // processes
    if sharded:
        return f"in turn over the passes of each of {processes} processes, then by torch's reduce-scatter (FSDP2)"
    if processes == 1 or own & (own - 1) == 0:
        return "tree over the passes"
    return f"tree over the passes of each of {processes} processes, then over the processes"


class Computed(NamedTuple):
    """What the passes of an update leave, besides the gradients in the parameters.   batch: the last one of this process."""

    batch: Item
    summed: Summed
    reports: list[Report]


class Sums(Protocol):
    """How gradients are added up over passes and processes.   loss_factor: of a pass's loss, besides 1 / passes."""

    loss_factor: float

    def begin(self) -> None:
        """The data of this process's passes have been read."""

    def before_backward(self, last: bool) -> None:
        """Before a pass.   last: of this process in this update."""

    def after_backward(self) -> None:
        """A pass's gradients are computed."""

    def reduce(self, losses: Tensor) -> Summed:
        """Right after an exchange: leave the gradients of all passes.   losses: (own passes,) fp32."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Computes the gradients of updates.   count: passes of an update, of all processes.   seed: of the training.

    carry: states that rows carry from one update's window to the next one's, if they do.
    """

    model: nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler
    device: torch.device
    batches: Iterator[Item]
    world: World
    sums: Sums
    count: int
    seed: int
    carry: Carry | None = None

    def compute(self, step: int) -> Computed:
        """Forward and backward, then the sum over all processes.   step: updates before this one."""
        started = time.perf_counter()
        own = self.world.passes(self.count)
        batches = [next(self.batches) for _ in own]
        data_s = time.perf_counter() - started
        self.model.train()
        self.sums.begin()
        losses = [self._pass(step, number, batch, last=number == own[-1]) for number, batch in zip(own, batches, strict=True)]
        if self.world.size > 1 and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the seconds below would be those of launching
        compute_s = time.perf_counter() - started - data_s
        reports = self.world.exchange(Report(compute_s=compute_s, data_s=data_s, peak_gib=peak_gib(self.device)))
        return Computed(batches[-1], self.sums.reduce(torch.stack(losses)), reports)

    def _pass(self, step: int, number: int, batch: Item, *, last: bool) -> Tensor:
        """Its loss, still on the device."""
        self.sums.before_backward(last)
        seed_pass(self.seed, step, number)
        windows = batch.tokens.to(self.device, non_blocking=True).long()
        state = () if self.carry is None else (self.carry.begin(number),)
        with self.autocast():
            _, loss = self.model(windows[:, :-1], windows[:, 1:], *state)
        if self.carry is not None:
            self.carry.end(number, *state)
        self.scaler.scale(self.sums.loss_factor * loss / self.count).backward()
        self.sums.after_backward()
        return torch.detach(loss)


def peak_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: of the device for CUDA, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
