"""Runs made by hand, of which every number is known."""

from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

SIZES = {"training.batch_size": 2, "training.block_size": 8, "training.gradient_accumulation_steps": 1}
BEGAN_MS = 1_700_000_000_000


def made_run(
    store: MlflowClient, name: str, losses: list[float], tags: dict[str, str] | None = None, *, late_ms: int = 0, **params: Any
) -> str:
    """A run with one train/loss per step, one step per hour.   late_ms: its start after BEGAN_MS."""
    found = store.get_experiment_by_name("bdh")
    run = store.create_run(found.experiment_id if found else store.create_experiment("bdh"), run_name=name, start_time=BEGAN_MS + late_ms)
    given = {**SIZES, "training.seed": 0, **{key.replace("__", "."): value for key, value in params.items()}}
    points = [Metric("train/loss", value, BEGAN_MS + 3_600_000 * (i + 1), i + 1) for i, value in enumerate(losses)]
    labels = [RunTag(key, value) for key, value in (tags or {}).items()]
    store.log_batch(run.info.run_id, points, [Param(key, str(value)) for key, value in given.items()], labels)
    return str(run.info.run_id)
