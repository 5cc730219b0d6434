"""How a state becomes a checkpoint of a run: journal first, then the file, then its mirror, then retention."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Provenance, RunDirectory, Throttle
from bdh_mlflow.config import Config
from bdh_mlflow.errors import SaveError
from bdh_mlflow.text import Evaluation
from bdh_mlflow.tracking.tracker import Tracker


def save_into(
    run_dir: RunDirectory, tracker: Tracker, provenance: Provenance, config: Config, likely_run: str | None, note: Callable[[str], None]
) -> Callable[[dict[str, Any], Evaluation | None, Throttle], None]:
    """What a background writer calls with each state.

    The journal is synced first, so that whoever resumes from the checkpoint finds every point up to it.   likely_run: the MLflow run that
    the manifest names while the store has not answered.   note: called with a line when old checkpoints cannot be removed.
    """

    settings = config.replaced({"training.resume_from_checkpoint": None}).to_dict()  # from where is no part of what was reached

    def save(contents: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        started = time.perf_counter()
        run_dir.make()
        try:
            tracker.sync()
        except OSError as error:
            raise SaveError(f"{run_dir.path}: the journal cannot be written: {error}") from error
        run_id = tracker.identity.run_id if tracker.identity else likely_run
        state = {**contents, "config": settings}
        saved = run_dir.save(state, dataclasses.replace(provenance, mlflow_run_id=run_id), evaluation, throttle)
        tracker.metrics({"ckpt/save_s": time.perf_counter() - started}, saved.manifest.step)
        tracker.checkpoint(saved.path, evaluation)
        try:
            for old in checkpoint.expired(run_dir.path, config.training.keep_checkpoints, saved.manifest.step):
                checkpoint.remove(old)
        except OSError as error:  # pruning is a convenience
            note(f"{run_dir.path}: old checkpoints cannot be removed: {error}")

    return save
