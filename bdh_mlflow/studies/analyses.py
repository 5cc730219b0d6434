"""Analyses among the artifacts of runs: logged there, and read back."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException

from bdh_mlflow.analysis.results import TAG, Finding, path_of
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.artifacts import Artifacts


class Shown(NamedTuple):
    """The last analysis of a kind.   figure: SVG.   says: its result in words."""

    step: int
    figure: bytes
    says: str


def log(found: Finding, run_id: str, step: int, config: TrackingConfig) -> None:
    """Log an analysis to a run.   step: of the checkpoint.   Raises TrackingError."""
    client, now_ms = store.connect(config), int(1000 * time.time())
    with store.reported(f"run {run_id}: the analysis cannot be logged"):
        run = client.get_run(run_id)
        artifacts = Artifacts(run.info.artifact_uri, client.tracking_uri)
        for path, text in found.files(step).items():
            artifacts.put_text(text, path)
        metrics = [Metric(key, value, now_ms, step) for key, value in found.metrics.items()]
        latest = max(step, _step(run.data.tags.get(f"{TAG}{found.name}", "")))
        client.log_batch(run_id, metrics, tags=[RunTag(f"{TAG}{found.name}", str(latest))], synchronous=True)


def _step(tag: str) -> int:
    return int(tag) if tag.isdecimal() else -1


def last(client: MlflowClient, run: Run) -> Mapping[str, Shown]:
    """The last analysis of each kind that a run has, by name; one whose files are missing or malformed counts as absent."""
    shown: dict[str, Shown] = {}
    for key, step in run.data.tags.items():
        if key.startswith(TAG) and _step(step) >= 0:
            name = key.removeprefix(TAG)
            artifacts = Artifacts(run.info.artifact_uri, client.tracking_uri)
            with contextlib.suppress(MlflowException, OSError, ValueError, KeyError, TypeError):
                said = str(json.loads(artifacts.read(path_of(name, int(step), "json")))["says"])
                shown[name] = Shown(int(step), artifacts.read(path_of(name, int(step), "svg")), said)
    return shown
