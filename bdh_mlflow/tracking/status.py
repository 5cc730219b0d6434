"""What the first request to a store has found. Knows nothing of MLflow, which a training process does not import unless it must."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bdh_mlflow.config import TrackingConfig


@dataclass(frozen=True)
class KnownRun:
    """A run that the store has.   segment: number of the last process that worked on it.   started_at_ms: Unix time."""

    tags: Mapping[str, str]
    segment: int
    started_at_ms: int


@dataclass(frozen=True)
class StoreStatus:
    """Result of the first request to a store.   reachable: it answered.   run: the one to be continued, if the store has it."""

    tracking_uri: str
    reachable: bool
    run: KnownRun | None


def overruled(tracking: TrackingConfig) -> str | None:
    """What the environment says of the experiment, where the configuration says otherwise; None if nothing is overruled."""
    if os.environ.get("MLFLOW_RUN_ID"):
        return None  # its experiment is that of the run which `mlflow run` has made
    given = {name: os.environ.get(name) for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")}
    others = [f"{name}={value}" for name, value in given.items() if value and value != tracking.experiment]
    return f"{' and '.join(others)} overruled by tracking.experiment {tracking.experiment}" if others else None
