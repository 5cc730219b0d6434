"""The passes of an update: the random numbers that each may draw, and the order in which their gradients are summed.

Both are functions of a pass's number in its update, so that it does not matter which process computes it.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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
