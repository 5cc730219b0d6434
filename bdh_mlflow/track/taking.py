"""How files become checkpoints of a run: taken at once, then behind the loop journal first, then the checkpoint, its mirror, retention."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Background, RunDirectory, SnapshotOrigin, Taken, Throttle
from bdh_mlflow.errors import SaveError
from bdh_mlflow.text import LoggedPoint
from bdh_mlflow.track import endings
from bdh_mlflow.tracking.tracker import Tracker


@dataclass(frozen=True)
class Place:
    """Where checkpoints go.   likely_run: the MLflow run while the store does not answer.   keep: newest that are kept, None for all."""

    directory: RunDirectory
    tracker: Tracker
    likely_run: str | None
    keep: int | None
    note: endings.Say


class Taking:
    """Takes the checkpoints of one run, one at a time.   origin: what their manifests say of where they come from."""

    def __init__(self, place: Place, origin: SnapshotOrigin) -> None:
        self._place, self._origin = place, origin
        self._background = Background()

    def compare_by(self, metric: str, *, higher_is_better: bool) -> None:
        """From now on the best is found by another metric."""
        self._origin = dataclasses.replace(self._origin, best=metric, higher_is_better=higher_is_better)

    def finish(self) -> None:
        """Wait for the one at hand.   Raises SaveError or InputError if it is none."""
        self._background.finish()

    def take(self, given: Path, step: int, *, written_once: bool) -> Taken:
        """The files as they are now, after the checkpoint before.   Raises SaveError or InputError, also of that one."""
        self.finish()
        return self._place.directory.take(given, step, written_once=written_once)

    def complete(self, taken: Taken, points: Sequence[LoggedPoint]) -> None:
        """Make a checkpoint of it behind the loop.   points: of its metrics among those of the run."""
        self._background.start(lambda throttle: self._complete(taken, points, throttle))

    def _complete(self, taken: Taken, points: Sequence[LoggedPoint], throttle: Throttle) -> None:
        place, began = self._place, time.perf_counter()
        run_dir = place.directory.path
        try:
            place.tracker.sync()
        except OSError as error:
            raise SaveError(f"{run_dir}: the journal cannot be written: {error}") from error
        identity = place.tracker.identity
        metrics = {p.key: p.value for p in points}
        saved = place.directory.complete(taken, self._origin, metrics, identity.run_id if identity else place.likely_run, throttle)
        place.tracker.metrics({"ckpt/save_s": time.perf_counter() - began}, taken.step)
        place.tracker.snapshot(saved.path, points)
        try:
            for old in checkpoint.expired(run_dir, place.keep, taken.step):
                checkpoint.remove(old)
        except OSError as error:  # pruning is a convenience
            place.note(f"{run_dir}: old checkpoints cannot be removed: {error}")
