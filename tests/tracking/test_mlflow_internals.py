"""Private parts of MLflow that the package uses still do what it relies on."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from bdh_mlflow.tracking import mlflow_internals
from scripts.servers import serving


def logged(client: MlflowClient, values: list[float]) -> str:
    experiment = client.get_experiment_by_name("bdh")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("bdh"))
    client.log_batch(run.info.run_id, [Metric("train/loss", value, 1000 + i, i) for i, value in enumerate(values)])
    return str(run.info.run_id)


def check_histories(client: MlflowClient) -> None:
    runs = [logged(client, values) for values in ([3.0, float("nan"), 2.0, float("inf")], [1.0], [])]
    client.log_metric(runs[0], "train/loss", 1.5, timestamp=2000, step=1)
    client.log_metric(runs[0], "val/loss", 9.0, step=1)
    histories = mlflow_internals.metric_histories(client, runs, "train/loss")
    assert [len(histories[run_id]) for run_id in runs] == [5, 1, 0]
    for run_id in runs:
        given = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, "train/loss")]
        assert sorted(repr(tuple(point)) for point in histories[run_id]) == sorted(map(repr, given))


def test_metric_histories_of_a_database_are_those_that_the_client_gives(store: MlflowClient) -> None:
    check_histories(store)


@pytest.mark.slow
def test_metric_histories_of_a_server_are_those_that_the_client_gives(empty_store: Path, tmp_path: Path) -> None:
    with serving(empty_store, tmp_path / "server") as server:
        check_histories(server.client)
