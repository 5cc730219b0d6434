"""Progress of a training run: a live bar on a terminal, plain lines in a file or pipe. Knows only steps and metrics."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bdh_mlflow.cli.output import Unfailing, console_on
from bdh_mlflow.training.parts import Progress as TrainingProgress


class PlainLines:
    """A line for each logged point and evaluation, flushed at once: for files and pipes.

    clock: seconds from any fixed moment on.
    """

    def __init__(self, out: TextIO, max_iters: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._eta = _Eta(max_iters, clock)

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """An optimizer update was made."""
        self._eta.advance(step)

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Metrics were logged."""
        self.note(f"step {step}/{self._eta.max_iters}  {_summary(values)}  ETA {self._eta.left()}")

    def note(self, text: str) -> None:
        """Print a message."""
        print(text, file=self._out, flush=True)


class LiveBar:
    """A bar with loss, speed and remaining time; messages scroll by above it: for terminals."""

    def __init__(self, console: Console, max_iters: int) -> None:
        self._eta = _Eta(max_iters, time.monotonic)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=max_iters, loss="-", speed="-", eta="-", visible=False)

    @property
    def bar(self) -> Progress:
        """The live display."""
        return self._bar

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """An optimizer update was made."""
        self._eta.advance(step)
        speed, eta = f"{tokens_per_s:,.0f}", self._eta.left()
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", speed=speed, eta=eta, visible=True)

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Metrics were logged."""
        self.note(f"step {step}/{self._eta.max_iters}  {_summary(values)}")

    def note(self, text: str) -> None:
        """Print a message."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def watching(out: TextIO, max_iters: int) -> Iterator[TrainingProgress]:
    """Display a training run of `max_iters` steps on `out`, as suits it."""
    safe = cast("TextIO", out if isinstance(out, Unfailing) else Unfailing(out))
    console = console_on(safe)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainLines(safe, max_iters)
        return
    live = LiveBar(console, max_iters)
    with live.bar:
        yield live


class _Eta:
    """Remaining time, from the mean time per step since this process's first update (which may compile), evaluations and saves included."""

    def __init__(self, max_iters: int, clock: Callable[[], float]) -> None:
        self.max_iters = max_iters
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._step = 0

    def advance(self, step: int) -> None:
        self._first = self._first or (step, self._clock())
        self._step = step

    def left(self) -> str:
        if self._first is None or self._step == self._first[0]:
            return "-"
        step_s = (self._clock() - self._first[1]) / (self._step - self._first[0])
        hours, rest_s = divmod(round(step_s * (self.max_iters - self._step)), 3600)
        return f"{hours}:{rest_s // 60:02d}:{rest_s % 60:02d}"


_SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "val/loss": ("validation loss", "{:.4f}"),
    "val/bpb": ("bits per byte", "{:.3f}"),
    "optim/lr": ("lr", "{:.2e}"),
    "optim/grad_norm": ("gradient norm", "{:.3f}"),
    "perf/tokens_per_s": ("tokens/s", "{:,.0f}"),
}


def _summary(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {form.format(values[key])}" for key, (name, form) in _SHOWN.items() if key in values)
