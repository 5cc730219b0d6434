"""A tracked run: what a training loop calls. Each call is a line in the journal, files are copied, and the rest happens behind the loop."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self, SupportsFloat, SupportsIndex

from bdh_mlflow import checkpoint, redact
from bdh_mlflow.checkpoint.manifest import is_inside
from bdh_mlflow.errors import InputError, SaveError
from bdh_mlflow.files import reason_of
from bdh_mlflow.text import LoggedPoint, Sample, is_storable, shortened
from bdh_mlflow.track.open import OpenRun
from bdh_mlflow.track.settings import LONGEST_NAME, checked_name, checked_path, checked_samples, checked_step, checked_values, flat
from bdh_mlflow.tracking.records import RunIdentity

ARTIFACTS = "artifacts"
"""Folder in the run directory with our copies of what `Run.artifact` was given."""


LONGEST_FILE_NAME = 255  # bytes


class Run(OpenRun):
    """A run of MLflow that a loop of any kind logs to.   Made by `track.run`.

    Calls may come from any thread of the process that began it; in a process that is forked from it they are refused. Every call raises
    InputError for what it cannot take and once the run has ended. A context manager: leaving it ends the run as the body ended.
    """

    def metrics(self, values: Mapping[str, SupportsFloat], step: SupportsIndex) -> None:
        """Points of several metrics.   values: anything that `float` takes.   step: completed updates, or whatever the curve's axis is.

        Steps may come in any order. A resumed run keeps what it has at a step already: a replayed point is not logged twice.
        """
        at, numbers = checked_step(step), checked_values(values)
        for key in numbers.keys() - self._last.keys():
            checked_name("metric", key)
        with self._recording():
            if numbers:
                self._log(numbers, at)

    def params(self, values: Mapping[str, object]) -> None:
        """Settings of the run; mappings in it are flattened with dots.

        MLflow takes each once: what the run has already stays, and a tag `drift.<name>` says what it was to become.
        """
        given = flat(values)
        with self._recording():
            new = {key: value for key, value in given.items() if key not in self._params}
            changed = {key: value for key, value in given.items() if self._params.get(key, value) != value}
            self._params |= new
            if new:
                self._tracker.params(new)
            if changed:
                self._tracker.tags({f"drift.{key}"[:LONGEST_NAME]: f"{self._params[key]} -> {value}" for key, value in changed.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run; later values replace earlier ones."""
        if not isinstance(values, Mapping):
            raise InputError(f"tags: {values!r} is no mapping of names to text")
        given = {checked_name("tag", key): str(value) for key, value in values.items()}
        with self._recording():
            self._tracker.tags(given)

    def samples(self, samples: Iterable[Sample | tuple[str, str]], step: SupportsIndex) -> None:
        """What a language model writes: pairs of a prompt and its continuation, shown as a table of the run."""
        given, at = checked_samples(samples), checked_step(step)
        with self._recording():
            if given:
                self._tracker.samples(given, at)

    def text(self, text: str, artifact: str) -> None:
        """A small text file among the artifacts.   artifact: its path there; a later one replaces an earlier one of the name."""
        artifact = _checked_place(artifact)
        if not isinstance(text, str):
            raise InputError(f"text of {artifact}: {shortened(repr(text), 100)} is no text")
        with self._recording():
            self._tracker.text(text, artifact)

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """A file, or a folder with its files, for the artifacts.   folder: where it goes among them.

        It is copied into the run directory before this returns, and uploaded behind the loop.   Raises SaveError if it cannot be copied.
        """
        given = checked_path(path)
        place = PurePosixPath(_checked_place(f"{folder}/{given.name}" if folder else given.name))
        beside = f"{ARTIFACTS}/{place}"
        with self._changing:
            self._check_open()
            try:
                checkpoint.copy_of(given, self._parts.directory.folder / beside, self._parts.directory.folder)
            except OSError as error:
                raise SaveError(f"{given}: not copied: {reason_of(error)}") from error
            self._tracker.artifact(beside, str(place))

    def checkpoint(
        self, path: str | Path, step: SupportsIndex, metrics: Mapping[str, SupportsFloat] | None = None, *, written_once: bool = False
    ) -> None:
        """A file or folder of any kind that its owner has written, as the checkpoint of a step; a later one of the step replaces it.

        It is copied into the run directory before this returns; digests, manifest, mirror and retention follow behind the loop, after those
        of the checkpoint before, which this waits for.   metrics: of this checkpoint, by one of which `Settings.best` finds the best; they
        become points of the run at this step, unless the last points of their curves have these values.   written_once: nobody will write
        into these files again (to delete or replace them is no writing): they are linked at once and copied behind the loop. Raises
        SaveError, also of the checkpoint before.
        """
        began, given, at, numbers = time.perf_counter(), checked_path(path), checked_step(step), checked_values(metrics or {})
        for key in numbers:
            checked_name("metric", key)
        with self._changing:
            self._check_open()
            taken = self._taking.take(given, at, written_once=written_once)
            self._step = max(self._step, at)
            self._taking.complete(taken, self._points(numbers, at))
        self._tracker.metrics({"ckpt/blocked_ms": 1e3 * (time.perf_counter() - began)}, at)

    def compare_by(self, metric: str, *, higher_is_better: bool = False) -> None:
        """From now on find the best checkpoint by a metric of theirs, instead of `Settings.best`."""
        self._taking.compare_by(checked_name("metric", metric), higher_is_better=higher_is_better)

    def try_checkpoint(self, path: str | Path, step: int, metrics: Mapping[str, SupportsFloat]) -> bool:
        """For a trainer whose files are written once, and whose training is worth more than their mirror: a failure is a note.

        Returns whether the checkpoint was taken.
        """
        with self.noting("the checkpoint before"):
            self.wait()
        with self.noting(f"step {step}"):
            self.checkpoint(path, step, metrics, written_once=True)
            return True
        return False

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """While something is recorded, the run does not end.   Raises InputError if it has."""
        with self._appending:
            self._check_open()
            yield

    def _points(self, numbers: Mapping[str, float], step: int) -> list[LoggedPoint]:
        """Points of the run with these values: the last of their curves, where these have them, else logged at this step.

        Lightning counts the steps of a validation from 0 and those of a checkpoint from 1.
        """
        new = {key: value for key, value in numbers.items() if (last := self._last.get(key)) is None or last.value != value}
        if new:
            self._log(new, step)
        return [self._last[key] for key in numbers]

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        self._step = max(self._step, step)
        at_ms = self._tracker.metrics(numbers, step)
        self._last |= {key: LoggedPoint(key, value, step, at_ms) for key, value in numbers.items()}


class NullRun:
    """A run that keeps nothing, with the methods of one: for the other processes of a group, or a trial without tracking."""

    id: str | None = None
    identity: RunIdentity | None = None
    resumed_from: Path | None = None
    directory: Path | None = None
    first_step = 0
    ended = marked = False
    stop_requested: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def metrics(self, values: Mapping[str, SupportsFloat], step: SupportsIndex) -> None:
        """Nothing."""

    def params(self, values: Mapping[str, object]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""

    def samples(self, samples: Iterable[Sample | tuple[str, str]], step: SupportsIndex) -> None:
        """Nothing."""

    def text(self, text: str, artifact: str) -> None:
        """Nothing."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Nothing."""

    def checkpoint(
        self, path: str | Path, step: SupportsIndex, metrics: Mapping[str, SupportsFloat] | None = None, *, written_once: bool = False
    ) -> None:
        """Nothing."""

    def wait(self, patience_s: float | None = None) -> RunIdentity | None:
        """There is no run."""
        return None

    def mark(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """Nothing."""

    def end(self, status: str | None = None) -> None:
        """Nothing."""

    def compare_by(self, metric: str, *, higher_is_better: bool = False) -> None:
        """Nothing."""


def _checked_place(artifact: object) -> str:
    """A path among the artifacts.   Raises InputError."""
    good = isinstance(artifact, str) and is_inside(artifact) and is_storable(artifact) and redact.masked(artifact) == artifact
    if not isinstance(artifact, str) or not good or max(len(os.fsencode(part)) for part in artifact.split("/")) > LONGEST_FILE_NAME:
        raise InputError(f"artifact {shortened(repr(artifact), 100)}: accepted: a relative path with `/`, without `..`")
    return artifact
