"""A trainer on a bench: a toy model, and lists as tracker, disk and screen."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.distributed import ALONE
from bdh_mlflow.errors import SaveError
from bdh_mlflow.text import Evaluation, Sample
from bdh_mlflow.training.clipping import Clipping
from bdh_mlflow.training.parts import Parts
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.strategy import Replicated
from bdh_mlflow.training.trainer import Trainer

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A bigram model with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, 8))
        self.dropout = nn.Dropout(0.2)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.dropout(self.table[idx] + 1)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) if targets is not None else None


class Item(NamedTuple):
    tokens: Tensor
    position: dict[str, Any]
    epoch: float


def items(start: int = 0) -> Iterator[Item]:
    for i in range(start, 10_000):
        tokens = torch.randint(0, 8, (2, 5), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
        yield Item(tokens, {"next": i + 1}, i / 10)


@dataclass
class Recorder:
    """Tracker and progress in one."""

    points: list[tuple[str, int, float]] = field(default_factory=list)
    written: list[tuple[Sequence[Sample], int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int) -> int:
        self.points += [(key, step, value) for key, value in values.items()]
        return 1000 * step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        self.written.append((samples, step))

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        self.steps.append(step)

    def point(self, values: Mapping[str, float], step: int) -> None: ...

    def note(self, text: str) -> None: ...

    def steps_of(self, key: str) -> list[int]:
        return [step for k, step, _ in self.points if k == key]

    def values_of(self, key: str) -> list[float]:
        return [value for k, _, value in self.points if k == key]


@dataclass
class Disk:
    """Keeps states in a list; fails at a given step, as a background write does: at the next call."""

    saved: list[tuple[dict[str, Any], float | None]]
    full_at: int | None = None
    attempts: list[int] = field(default_factory=list)
    error: Exception | None = None

    def save(self, state: dict[str, Any], evaluation: Evaluation | None) -> None:
        self.finish()
        self.attempts.append(state["step"])
        if state["step"] == self.full_at:
            self.error = SaveError("disk full")
        else:
            self.saved.append((copy.deepcopy(state), evaluation.loss if evaluation else None))

    def check(self) -> None:
        if self.error:
            raise self.error

    def finish(self) -> None:
        self.check()


SAMPLES = [Sample("def ", "f(x):"), Sample("class ", "A:")]


class FallingRate:
    """A schedule, and number formats without a state."""

    def __init__(self) -> None:
        self.observed: list[float] = []

    def at(self, step: int) -> float:
        return 0.1 / (step + 1)

    def observe(self, val_loss: float) -> None:
        self.observed.append(val_loss)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def savepoint(self) -> Callable[[], None]:
        return lambda: None


@dataclass
class Bench:
    trainer: Trainer
    model: Toy
    log: Recorder
    disk: Disk
    stop: StopRequest
    rate: FallingRate

    @property
    def saved(self) -> list[tuple[dict[str, Any], float | None]]:
        return self.disk.saved

    @property
    def saved_steps(self) -> list[int]:
        return [state["step"] for state, _ in self.saved]


def bench(
    *,
    batches: Iterator[Item] | None = None,
    scaler: bool = False,
    model: Toy | None = None,
    full_at: int | None = None,
    parts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Bench:
    torch.manual_seed(0)
    model, log, disk, rate = model or Toy(), Recorder(), Disk([], full_at), FallingRate()
    stop = (parts or {}).get("stop") or StopRequest(begun=True)
    config = TrainingConfig(**{"max_iters": 10, "log_freq": 4, "test_freq": 5, "checkpoint_freq": 6, **settings})

    defaults = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), fused=True),
        "schedule": rate,
        "scaler": torch.amp.GradScaler("cpu", enabled=scaler),
        "autocast": nullcontext,
        "formats": rate,
        "device": CPU,
        "batches": batches or items(),
        "validation": [item.tokens for item, _ in zip(items(5000), range(3), strict=False)],
        "bytes_per_token": 1.0,
        "samples": lambda stopped: SAMPLES,
        "observed": lambda: nullcontext({"seen": 1.0}),
        "peak_tokens_per_s": 1e6,
        "average": None,
        "saver": disk,
        "tracker": log,
        "progress": log,
        "stop": stop,
    }
    given = {**defaults, **(parts or {})}
    strategy = given.setdefault("strategy", Replicated(model, given["optimizer"], given.get("world", ALONE)))
    given.setdefault("clip", Clipping(strategy.clip, config.grad_clip, config.grad_clip_z))
    return Bench(Trainer(Parts(**given), config), model, log, disk, stop, rate)
