"""Analyses of a run, read back."""

from mlflow import MlflowClient

from bdh_mlflow.analysis.results import Finding
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.studies import analyses


def test_the_last_one_is_read_back_and_a_missing_one_counts_as_absent(store: MlflowClient) -> None:
    run = store.create_run(store.create_experiment("bdh"))
    config = TrackingConfig()
    for step in (3, 9):
        found = Finding("activity", f"seen at {step}", [], {"analysis/active_x_l0": 0.5}, {"step": step}, "<svg/>")
        analyses.log(found, run.info.run_id, step, config)
    store.set_tag(run.info.run_id, "bdh.analysis.graph", "9")
    store.set_tag(run.info.run_id, "bdh.analysis.other", "no step")
    shown = analyses.last(store, store.get_run(run.info.run_id))
    assert shown == {"activity": analyses.Shown(9, b"<svg/>", "seen at 9")}
    points = store.get_metric_history(run.info.run_id, "analysis/active_x_l0")
    assert [point.step for point in points] == [3, 9]
