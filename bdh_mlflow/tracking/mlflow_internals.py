"""What this package uses of MLflow beyond its documented interface, so that an update of MLflow is checked in one place.

Each function here has a test that fails when MLflow changes what it relies on.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.models import SqlMetric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

REQUESTS = 8  # at a time; most of each is waiting for the server


class MetricPoint(NamedTuple):
    """A value of a metric.   at_ms: Unix time in ms."""

    step: int
    at_ms: int
    value: float


def metric_histories(client: MlflowClient, run_ids: Sequence[str], key: str) -> dict[str, list[MetricPoint]]:
    """All points of a metric, run by run, in no order.

    A database is read directly, with one query for all runs: through `get_metric_history` it would search the points of all runs once per
    run, and MLflow would make three objects of each point.
    """
    store = client._tracking_client.store
    if not isinstance(store, SqlAlchemyStore):
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = pool.map(lambda run_id: client.get_metric_history(run_id, key), run_ids)
            return {
                run_id: [MetricPoint(m.step, m.timestamp, m.value) for m in points] for run_id, points in zip(run_ids, answers, strict=True)
            }
    found: dict[str, list[MetricPoint]] = {run_id: [] for run_id in run_ids}
    columns = SqlMetric.run_uuid, SqlMetric.step, SqlMetric.timestamp, SqlMetric.value, SqlMetric.is_nan
    with store.ManagedSessionMaker() as session:
        for run_id, step, at_ms, value, is_nan in session.query(*columns).filter(SqlMetric.key == key, SqlMetric.run_uuid.in_(run_ids)):
            found[run_id].append(MetricPoint(step, at_ms, float("nan") if is_nan else value))
    return found
