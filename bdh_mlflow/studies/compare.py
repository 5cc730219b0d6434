"""Finished or running trainings side by side: which settings differ, where each stands, which belong together.

Reads every point of MLflow, not a sample of them, and writes nothing; `report` draws what is read here. Runs whose settings differ in the
seed alone are one family.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from bdh_mlflow import files
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.studies.curves import LARGEST, Curve, RunCurves, read_run
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.mlflow_internals import metric_histories

CURVES = ("train/loss", "val/loss", "val/bpb")
LAST = ("val/bpb", "val/loss", "train/loss", "progress/tokens_seen", "perf/tokens_per_s", "perf/mfu_pct", "perf/step_ms", "mem/peak_gib")
READERS = 8  # runs read at a time; most of it is waiting for the server
SEED_OR_PLACE = re.compile(r"training\.(seed|checkpoint_dir)|tracking\..*|dataset\.(parquet_dir|source)")
"""Settings in which the runs of one family may differ."""
FILTER = re.compile(r"[=<>]|\b(I?LIKE|IN)\b")
"""What only a filter string contains, not a run's name or id."""


@dataclass(frozen=True)
class Comparison:
    """Trainings side by side.

    metrics: those read, in the order in which they are plotted.   differing: settings whose value is not the same in all runs.   families:
    the runs, those that differ in nothing but the seed together.
    """

    runs: tuple[RunCurves, ...]
    metrics: tuple[str, ...]
    differing: tuple[str, ...]
    families: tuple[tuple[RunCurves, ...], ...] = field(default=())


def read(names: Sequence[str], config: TrackingConfig, more: Sequence[str] = ()) -> Comparison:
    """The runs that are named: by id, run name, `latest`, experiment, or a filter string on the configured experiment.

    more: metrics to plot besides CURVES.   Raises InputError for a name without a run and a metric that no run has, with the nearest known.
    """
    client = store.connect(config)
    chosen = {run.info.run_id: run for name in names for run in _find(client, name, config.experiment)}
    metrics = tuple(dict.fromkeys((*CURVES, *more)))
    _check_metrics(more, chosen.values())
    with store.reported("points cannot be read"):
        points = {
            metric: metric_histories(client, [i for i, run in chosen.items() if metric in run.data.metrics], metric) for metric in metrics
        }
    with ThreadPoolExecutor(READERS) as pool:
        curves = ({metric: Curve.of(points[metric].get(run_id, [])) for metric in metrics} for run_id in chosen)
        runs = tuple(pool.map(lambda run, curves: read_run(client, run, curves), chosen.values(), curves))
    keys = dict.fromkeys(key for r in runs for key in r.settings if key != "tracking.run_name")  # the name heads the column
    differing = tuple(key for key in keys if len({_comparable(r.settings[key]) if key in r.settings else "" for r in runs}) > 1)
    families: dict[str, list[RunCurves]] = {}
    for r in runs:
        same = {key: value for key, value in r.settings.items() if not SEED_OR_PLACE.fullmatch(key)}
        data = sorted(i.dataset.digest for i in (r.run.inputs.dataset_inputs if r.run.inputs else []))
        families.setdefault(_comparable([same, data]) if same else r.run.info.run_id, []).append(r)
    return Comparison(runs, metrics, differing, tuple(tuple(family) for family in families.values()))


def rows(comparison: Comparison) -> list[list[str]]:
    """A table: status, history, last values, best validation, then the settings that differ; one column per run."""
    runs = comparison.runs
    table = [["status", *(r.run.info.status for r in runs)]]
    for key in LAST:
        if any(key in r.run.data.metrics for r in runs):
            table.append([f"last {key}", *(_number(r.run.data.metrics.get(key)) for r in runs)])
    table.append(["best val/loss", *(_lowest(r.curves["val/loss"]) for r in runs)])
    table.append(["best checkpoint", *(r.run.data.tags.get("bdh.best_checkpoint", "").rpartition("/")[2] for r in runs)])
    if any(len(r.segments) > 1 for r in runs):
        table.append(["segments", *(_segments(r) for r in runs)])
    drift = [{k.removeprefix("drift."): v for k, v in r.run.data.tags.items() if k.startswith("drift.")} for r in runs]
    if any(drift):
        table.append(["changed on resume", *("; ".join(f"{k}: {v}" for k, v in d.items()) for d in drift)])
    table += [[key, *(_cell(r.settings, key) for r in runs)] for key in comparison.differing]
    return table


def _comparable(value: Any) -> str:
    """A text that is the same for the same values alone, also where Python finds 1 and True equal."""
    return json.dumps(value, sort_keys=True, default=str)


def _cell(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key, "")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check_metrics(wanted: Sequence[str], runs: Iterable[Run]) -> None:
    known = {key for run in runs for key in run.data.metrics}
    for metric in wanted:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they have {', '.join(sorted(known)) or 'none'}"
            raise InputError(f"metric {metric}: none of these runs has it; {hint}")


def _find(client: MlflowClient, name: str, experiment: str) -> list[Run]:
    with store.reported(f"run {name} cannot be read"):
        if run := store.find_run(client, name):
            return [run]
        found = client.get_experiment_by_name(experiment)
        trainings = _trainings(client, found.experiment_id) if found else []
        if name == "latest" and trainings:
            return trainings[:1]
        matches = [run for run in trainings if run.info.run_name == name]
        if len(matches) == 1:
            return matches
        other = client.get_experiment_by_name(name)
        if not matches and other is not None and (runs := _trainings(client, other.experiment_id)):
            return runs
        if not matches and FILTER.search(name):
            return _filtered(client, found.experiment_id if found else None, name, experiment)
        experiments = [e.name for e in client.search_experiments()] if not matches else []
    if matches:
        raise InputError(f"{name}: {len(matches)} runs have this name, give an id: {', '.join(run.info.run_id for run in matches[:5])}")
    known = [str(run.info.run_name) for run in trainings]
    near = difflib.get_close_matches(name, [*known, *experiments, *["latest"] * bool(trainings)], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"experiment {experiment} has {', '.join(known[:10]) or 'no runs'}"
    raise InputError(f"{name}: no run, experiment or filter; {hint}")


def _filtered(client: MlflowClient, experiment_id: str | None, wanted: str, experiment: str) -> list[Run]:
    try:
        runs = _trainings(client, experiment_id, wanted) if experiment_id else []
    except MlflowException as error:
        raise InputError(f"{wanted}: no run has this name, and MLflow rejects it as a filter: {files.first_line(error)}") from None
    if not runs:
        raise InputError(f"{wanted}: no run of experiment {experiment} matches")
    return runs


def _trainings(client: MlflowClient, experiment_id: str, wanted: str = "") -> list[Run]:
    """Runs of an experiment that are trainings, newest first: neither segments of one nor sweeps.   wanted: a filter string."""
    runs: list[Run] = []
    page = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"])
    runs += page
    while page.token:
        page = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=page.token)
        runs += page
    trainings = [run for run in runs if "bdh.training" in run.data.tags or "training.seed" in run.data.params]
    return [run for run in trainings if "bdh.continues" not in run.data.tags]


def _segments(r: RunCurves) -> str:
    """How many processes trained the run, on which machines, and how long none did."""
    if len(r.segments) < 2:
        return "1"
    down_s = sum(segment.downtime_s for segment in r.segments)
    hosts = ", ".join(dict.fromkeys(segment.host for segment in r.segments))
    return f"{len(r.segments)} ({hosts}), {down_s / 3600:.2f} h between them"


def _lowest(curve: Curve) -> str:
    lowest = curve.lowest()
    return f"{lowest[1]:.4f} at step {lowest[0]}" if lowest else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not abs(value) < LARGEST:
        return "not finite"
    digits = 4 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".")
