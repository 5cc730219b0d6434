"""What a training loop works with, described by small protocols: whoever builds the parts need not know the loop, nor it them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bdh_mlflow.distributed import ALONE, World
from bdh_mlflow.text import Evaluation, Sample
from bdh_mlflow.training.carry import Carry
from bdh_mlflow.training.passes import Item
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.strategy import Strategy

State = dict[str, Any]


class Schedule(Protocol):
    """Learning rate by step."""

    def at(self, step: int) -> float:
        """Rate of the update after `step` others."""

    def observe(self, val_loss: float) -> None:
        """Take note of a validation loss."""

    def state_dict(self) -> State:
        """What `at` cannot compute from the step."""

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`."""


class Stateful(Protocol):
    """Something whose state the next update depends on."""

    def state_dict(self) -> State:
        """All of it."""

    def load_state_dict(self, state: State) -> None:
        """Continue from `state`."""


class NumberFormats(Stateful, Protocol):
    """State of the number formats, FP8 scales for instance, which every pass changes."""

    def savepoint(self) -> Callable[[], None]:
        """Called between updates: the function returned brings back the state of now. As cheap as the formats allow."""


class Average(Stateful, Protocol):
    """A moving average of the weights."""

    def update(self, step: int) -> None:
        """An update was made, the `step`-th."""

    def in_place(self) -> AbstractContextManager[None]:
        """In the body the model has the average for weights."""


class Clip(Stateful, Protocol):
    """Clips the gradients of an update."""

    def __call__(self) -> Tensor:
        """Their norm before."""


class Tracker(Protocol):
    """Receives the points and samples of the run. Calls return at once and never fail."""

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        """Points of several curves.   Returns their time stamp, Unix time in ms."""

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """What the model writes."""

    def text(self, text: str, artifact: str) -> None:
        """A file of the run.   artifact: its path among them."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run."""


class Saver(Protocol):
    """Writes checkpoints in the background. An error of one save is raised by the next call."""

    def save(self, state: State, evaluation: Evaluation | None) -> None:
        """Save what `state` holds now; it may change as soon as this returns.   evaluation: of this very step, if there was one."""

    def check(self) -> None:
        """Raise what went wrong since the last call."""

    def finish(self) -> None:
        """Wait until everything is saved."""


class Progress(Protocol):
    """Shows the training to a user."""

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """An update was made."""

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Metrics were logged."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Ending:
    """How a run ended without failing: `finished`, or what stopped it (SIGTERM, pruned)."""

    reason: str
    step: int
    evaluation: Evaluation | None
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Stream:
    """Validation text of rows that read on: windows of one batch after the other.   bytes_per_token: of text."""

    windows: Sequence[Tensor]
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the loop works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    strategy: Strategy
    """What each process holds of the two, and how gradients are added up."""
    clip: Clip
    schedule: Schedule
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[Any]]
    formats: NumberFormats
    device: torch.device
    batches: Iterator[Item]
    validation: list[Tensor]
    bytes_per_token: float
    """Bytes of text that a token of the validation windows stands for, on average."""
    samples: Callable[[Callable[[], bool]], Sequence[Sample]]
    """Text that the model continues now; empty if it is asked to stop on the way."""
    observed: Callable[[], AbstractContextManager[dict[str, float]]]
    """Around an evaluation: further metrics of the model, complete at its end."""
    analyze: Callable[[int], None] | None = None
    """Looks at the model after a step where one is due, and logs what it finds."""
    peak_tokens_per_s: float
    """Speed if the machine did nothing but the model's useful arithmetic, at the fastest rate measured on it; 100 % of perf/mfu_pct."""
    average: Average | None
    """Kept beside the weights, if at all, and evaluated with them."""
    carry: Carry | None = None
    """States that rows carry from window to window, if they read on."""
    stream: Stream | None = None
    """Evaluated with and without the carried state."""
    saver: Saver
    tracker: Tracker
    progress: Progress
    stop: StopRequest = field(default_factory=StopRequest)
    world: World = ALONE
    """The processes that train together; the batches handed in are those of this one's passes."""

    def extras(self) -> Iterator[tuple[str, Stateful]]:
        """Parts with a state that only some trainings have, under its name in a checkpoint."""
        if self.average is not None:
            yield "ema_state_dict", self.average
        if self.clip.state_dict():
            yield "zclip_state_dict", self.clip
        if self.carry is not None:
            yield "carried_state", self.carry

    @property
    def saves_despite(self) -> bool:
        """Whether what is good can be saved when another rank has failed: nothing of it is held elsewhere."""
        return self.strategy.saves_despite and (self.carry is None or self.world.size == 1)
