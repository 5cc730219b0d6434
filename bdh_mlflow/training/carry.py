"""The state that the rows of an update carry from one window to the next: truncated backpropagation through time over a coherent text.

Row b of pass p reads on where it ended, in whatever process that pass is computed. States are constants when they are read, and new tensors
afterwards, so an update that fails leaves those of before.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bdh_mlflow.distributed import World
from bdh_mlflow.errors import ResumeError


class Recurrent(Protocol):
    """What a model remembers of the text before.   layers: replaced by the model with what comes after, (rows, ...) each."""

    layers: list[Tensor]

    def detached(self) -> "Recurrent":
        """The same as constants."""


class Carry:
    """The states of this process's passes.

    fresh: makes that of so many rows which have read nothing.   rows: of a pass.   passes: of an update, of all processes.
    """

    def __init__(self, fresh: Callable[[int], Recurrent], rows: int, passes: int, world: World) -> None:
        self.fresh = fresh
        self._rows, self._passes, self._world = rows, passes, world
        self._states = {number: fresh(rows) for number in world.passes(passes)}
        self._next: dict[int, Recurrent] = {}

    def begin(self, number: int) -> Recurrent:
        """What pass `number` reads, and puts its own in place of."""
        return self._states[number].detached()

    def end(self, number: int, state: Recurrent) -> None:
        """What pass `number` has left; valid with `commit`."""
        self._next[number] = state.detached()

    def commit(self) -> None:
        """The update was made, or skipped: rows are where its windows ended."""
        self._states |= self._next
        self._next = {}

    def state_dict(self) -> dict[str, Any]:
        """layers: (rows of all passes, ...) each, on rank 0; all call it."""
        own = [torch.cat(parts) for parts in zip(*(state.layers for state in self._states.values()), strict=True)]
        return {"layers": [self._world.concatenated(layer) for layer in own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; an empty one, of a training that carried none, leaves rows that have read nothing.

        Raises ResumeError for states of another network or of other rows.
        """
        own = next(iter(self._states.values())).layers
        expected = [(self._rows * self._passes, *layer.shape[1:]) for layer in own]
        if state and (found := [tuple(layer.shape) for layer in state["layers"]]) != expected:
            raise ResumeError(f"the checkpoint's carried_state has the shapes {found}; this configuration needs {expected}")
        for number in self._states:
            fresh = self._states[number] = self.fresh(self._rows)
            for depth, layer in enumerate(state.get("layers", [])):
                fresh.layers[depth].copy_(layer[number * self._rows : (number + 1) * self._rows])
