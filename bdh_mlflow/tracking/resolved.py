"""What a resume target stands for, as `locate` finds it. Knows nothing of MLflow, so that processes which do not track can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdh_mlflow.checkpoint import Checkpoint, Saved
from bdh_mlflow.config import Config
from bdh_mlflow.errors import CheckpointError
from bdh_mlflow.tracking import journal

GRAMMAR = "latest, a path, a run id, runs:/RUN_ID[/checkpoints/.../checkpoint_N.pt] or an artifact URI; RUN:N for its step N"
"""What names a checkpoint, in words (see `locate`)."""


@dataclass(frozen=True)
class Located:
    """What a target names.   found: a verified checkpoint of either sort, or a file with weights of another program.   Others: as in
    `ResolvedCheckpoint`.
    """

    found: Saved | Path
    notes: tuple[str, ...]
    named_run: str | None = None


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """What a target stands for.

    checkpoint: None for a warm start.   state: contents of the file.   notes: what was skipped, and why.   named_run: the MLflow run that
    the target names, None if it names none.
    """

    path: Path
    checkpoint: Checkpoint | None
    state: dict[str, Any]
    notes: tuple[str, ...]
    named_run: str | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the checkpoint: the one named, else the one it was saved under, else the one its journal has got since."""
        if self.checkpoint is None or self.named_run:
            return self.named_run
        return run_of(self.checkpoint)

    def config(self) -> Config:
        """The configuration that it was trained with.   Raises CheckpointError for weights without one, ConfigError for a malformed one."""
        if self.checkpoint is None or "format" not in self.state:
            raise CheckpointError(f"{self.path}: bare weights without a configuration; train from it first (a warm start)")
        return Config.from_saved(self.state["config"], self.path, self.checkpoint.manifest.written_by)

    @property
    def address(self) -> str:
        """Where it is for others: the artifact of its run, or its path where it has none."""
        if self.checkpoint is None or self.run_id is None:
            return str(self.path)
        return f"runs:/{self.run_id}/{self.checkpoint.manifest.artifact_path}"


def run_of(found: Saved) -> str | None:
    """The MLflow run of a checkpoint: the one it was saved under, else the one its journal has got since."""
    state = journal.delivered(found.path.parent)
    return found.manifest.mlflow_run_id or (state.run_id if state else None)
