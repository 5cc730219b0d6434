"""What each process holds of weights, gradients and optimizer states, and how an update's gradients are added up over the processes.

`Replicated`: everything; gradients are added in the order of one process, so that its numbers are theirs. `Sharded` (FSDP2): a share of
everything; weights are gathered for an update and gradients scattered by torch, in an order of its own. What is saved is the same file.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from bdh_mlflow.distributed import Report, Summed, World
from bdh_mlflow.training.optim import load_named_state, named_state
from bdh_mlflow.training.passes import Sums, TreeSum

State = dict[str, Any]


class Strategy(Sums, Protocol):
    """How the processes share an update.   saves_despite: whether what is good can be saved when another rank has failed."""

    saves_despite: bool

    def clip(self, largest: float) -> Tensor:
        """Clip the gradients to a global norm; returns the norm before, which every process finds the same."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """In the body each process has all weights, and may use them as often as it likes."""

    def state(self) -> tuple[State, State]:
        """State of model and optimizer, whole, on rank 0; all call it."""

    def load(self, model_state: State, optimizer_state: State) -> None:
        """Continue from what `state` gave, of any strategy and number of processes."""


class Replicated:
    """Every process holds everything."""

    loss_factor = 1.0
    saves_despite = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self._model, self._optimizer, self._world = model, optimizer, world

    def begin(self) -> None:  # noqa: D102 - as Strategy, here and below
        self._gradients = TreeSum(self._model.parameters())

    def before_backward(self, last: bool) -> None:  # noqa: D102
        pass

    def after_backward(self) -> None:  # noqa: D102
        self._gradients.add()

    def reduce(self, losses: Tensor) -> Summed:  # noqa: D102
        self._gradients.finish()
        return self._world.sum_gradients(list(self._model.parameters()), losses)

    def clip(self, largest: float) -> Tensor:  # noqa: D102
        return nn.utils.clip_grad_norm_(self._model.parameters(), largest)

    def whole(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102
        return contextlib.nullcontext()

    def state(self) -> tuple[State, State]:  # noqa: D102
        return self._model.state_dict(), named_state(self._optimizer, self._model)

    def load(self, model_state: State, optimizer_state: State) -> None:  # noqa: D102
        self._model.load_state_dict(model_state)
        load_named_state(self._optimizer, self._model, optimizer_state)


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Divide a model's parameters among the processes; its optimizer is built after that.

    One unit: the layer's weights are used at every depth, so there is nothing to gather for one depth only. A projection (H, D, N) is cut
    along its neurons: there are more of them than processes, unlike heads.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False, shard_placement_fn=lambda p: Shard(p.dim() - 1 if p.dim() == 3 else 0))


class Sharded:
    """Every process holds a share: FSDP2, for a model that `shard` has divided."""

    saves_despite = False  # the whole state is gathered from all

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self._model, self._optimizer, self._world = model, optimizer, world
        self.loss_factor = float(world.size)  # gradients are averaged over the processes

    def begin(self) -> None:
        """An exchange, because a rank without data would let the others wait in the backward pass, where nobody tells them why."""
        self._world.exchange(Report())

    def before_backward(self, last: bool) -> None:  # noqa: D102
        self._model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def after_backward(self) -> None:  # noqa: D102
        pass

    def reduce(self, losses: Tensor) -> Summed:
        """The gradients are there; the losses are gathered."""
        everywhere = torch.zeros(self._world.size, len(losses), dtype=torch.float64)
        everywhere[self._world.rank] = losses.double().cpu()
        gathered = self._world.sum_exact(everywhere).flatten().to(losses)
        return Summed(gathered, losses.new_zeros(0))

    def clip(self, largest: float) -> Tensor:  # noqa: D102
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:  # noqa: D102
        self._model.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self._model.reshard()  # type: ignore[operator]

    def state(self) -> tuple[State, State]:  # noqa: D102
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return (
            states.get_model_state_dict(self._model, options=options),
            states.get_optimizer_state_dict(self._model, self._optimizer, options=options),
        )

    def load(self, model_state: State, optimizer_state: State) -> None:  # noqa: D102
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True)
        states.set_model_state_dict(self._model, model_state, options=options)
        states.set_optimizer_state_dict(self._model, self._optimizer, optimizer_state, options=options)
