"""Runs of `track` for tests: with a sender in this process that is in a hurry, and what arrived of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from bdh_mlflow.track import Settings
from bdh_mlflow.track.begin import begin
from bdh_mlflow.track.tracked import Run
from bdh_mlflow.tracking.records import OnMessage
from bdh_mlflow.tracking.sender import ThreadSender
from tests.tracking.tracked import HURRY


def thread_sender(folder: Callable[[], Path], uri: str, on_message: OnMessage) -> ThreadSender:
    return ThreadSender(folder, uri, on_message, replace(HURRY, server_exit_s=0.2, claim_s=0.5))


def tracked(resume: str | Path | None = None, notes: list[str] | None = None, params: dict[str, Any] | None = None, **settings: Any) -> Run:
    """A run without a process of its own.   settings: of `Settings`."""
    chosen = Settings(**{"experiment": "any", "system_metrics": False, **settings})
    return begin(chosen, params or {}, resume, (notes if notes is not None else []).append, thread_sender)


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def write(path: Path, content: bytes = b"state") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
