"""Finished or running trainings read back: what differs in their settings, where they stand, their curves at equal steps and tokens.

Reads only MLflow. One self-contained HTML page; the plots are pictures in it.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from bdh_mlflow import tracking
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError

CURVES = ("train/loss", "val/loss", "val/bpb")
LAST = ("val/bpb", "val/loss", "train/loss", "progress/tokens_seen", "perf/tokens_per_s", "mem/peak_gib")

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunCurves:
    """One training.   curves: metric to (step, value) by step.   tokens_per_step: 0 where the run does not say."""

    label: str
    run: Run
    curves: dict[str, Curve]
    tokens_per_step: float


@dataclass(frozen=True)
class Comparison:
    """Trainings side by side.   differing: settings that are not the same in all of them."""

    runs: tuple[RunCurves, ...]
    differing: tuple[str, ...]


def read(names: Sequence[str], config: TrackingConfig) -> Comparison:
    """The runs named by id or by name in the configured experiment.   Raises InputError for one that is not there."""
    client = tracking.connect(config)
    runs = tuple(_curves(client, _find(client, name, config.experiment)) for name in dict.fromkeys(names))
    keys = dict.fromkeys(key for r in runs for key in r.run.data.params if "." in key)
    differing = tuple(key for key in keys if len({r.run.data.params.get(key) for r in runs}) > 1)
    return Comparison(runs, differing)


def rows(comparison: Comparison) -> list[list[str]]:
    """A table: status, last values, best validation, then the settings that differ; one column per run."""
    runs = comparison.runs
    table = [["status", *(r.run.info.status for r in runs)]]
    for key in LAST:
        table.append([f"last {key}", *(_number(r.run.data.metrics.get(key)) for r in runs)])
    table.append(["best val/loss", *(_best(r.curves["val/loss"]) for r in runs)])
    table += [[key, *(r.run.data.params.get(key, "") for r in runs)] for key in comparison.differing]
    return table


def page(comparison: Comparison) -> str:
    """The report as one HTML page without anything to fetch."""
    head = "".join(f"<th>{html.escape(r.label)}</th>" for r in comparison.runs)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(comparison))
    return (
        "<!doctype html><meta charset=utf-8><title>BDH runs compared</title>"
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}</style>"
        f"<h1>BDH runs compared</h1><table><tr><th></th>{head}</tr>{body}</table>"
        f'<p><img alt="curves" src="data:image/png;base64,{base64.b64encode(plot(comparison)).decode()}">'
    )


def plot(comparison: Comparison) -> bytes:
    """PNG: a row of axes per metric, on steps and on tokens."""
    figure = Figure(figsize=(13, 4 * len(CURVES)), layout="constrained")
    axes = figure.subplots(len(CURVES), 2, squeeze=False)
    for row, metric in zip(axes, CURVES, strict=True):
        for axis, name in zip(row, ("step", "tokens seen"), strict=True):
            for r in comparison.runs:
                scale = 1.0 if name == "step" else r.tokens_per_step
                points = r.curves[metric]
                if points and scale:
                    axis.plot([step * scale for step, _ in points], [value for _, value in points], label=r.label, marker=".")
            axis.set(xlabel=name, ylabel=metric)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _find(client: MlflowClient, name: str, experiment: str) -> Run:
    with tracking.reported(f"run {name} cannot be read"):
        if run := tracking.find_run(client, name):
            return run
        found = client.get_experiment_by_name(experiment)
        runs = client.search_runs([found.experiment_id]) if found else []
    matches = [run for run in runs if run.info.run_name == name]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(str(run.info.run_name) for run in runs[:10]) or "none"
    problem = f"{len(matches)} runs have this name, give an id" if matches else f"no such run; experiment {experiment} has {known}"
    raise InputError(f"{name}: {problem}")


def _curves(client: MlflowClient, run: Run) -> RunCurves:
    with tracking.reported(f"run {run.info.run_id} cannot be read"):
        curves = {key: _curve(client, run, key) for key in CURVES}
        seen = _curve(client, run, "progress/tokens_seen")
    tokens_per_step = seen[-1][1] / seen[-1][0] if seen else 0.0
    return RunCurves(f"{run.info.run_name} ({run.info.run_id[:6]})", run, curves, tokens_per_step)


def _curve(client: MlflowClient, run: Run, key: str) -> Curve:
    if key not in run.data.metrics:
        return []
    return sorted({m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}.items())


def _best(curve: Curve) -> str:
    if not curve:
        return ""
    step, value = min(curve, key=lambda point: point[1])
    return f"{value:.4f} at step {step}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}".rstrip("0").rstrip(".")
