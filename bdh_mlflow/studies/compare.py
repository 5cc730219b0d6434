"""Finished or running trainings read back: what differs in their settings, where they stand, their curves on equal axes, what they write.

Reads MLflow at full resolution, and writes there only in `keep`. One self-contained HTML page; its plots are pictures, which `pictures`
also gives one by one. Runs whose settings differ in the seed alone are drawn as one mean with a band.
"""

import base64
import contextlib
import difflib
import html
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlMetric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from numpy.typing import NDArray

from bdh_mlflow import files
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.run import SAMPLES
from bdh_mlflow.tracking.segments import FILE_NAME as SEGMENTS

CURVES = ("train/loss", "val/loss", "val/bpb")
LAST = ("val/bpb", "val/loss", "train/loss", "progress/tokens_seen", "perf/tokens_per_s", "perf/mfu_pct", "perf/step_ms", "mem/peak_gib")
AXES = ("step", "tokens", "active hours")
DRAWN_POINTS = 800  # of a curve; beyond that neighbours are averaged for the picture
MOST_SAMPLES = 4  # steps, and runs side by side
READERS = 8  # runs read at a time: most of the time a server is waited for
SAME_BUT_SEED = re.compile(r"training\.(seed|checkpoint_dir)|tracking\..*")
FILTER = re.compile(r"[=<>]|\b(I?LIKE|IN)\b")

Numbers = NDArray[np.float64]


class Point(NamedTuple):
    """Of a metric."""

    step: int
    at_ms: int
    value: float


@dataclass(frozen=True)
class Curve:
    """A metric by step, one value each.   steps, values: (n,).   at_ms: (n,), when each was measured."""

    steps: Numbers
    values: Numbers
    at_ms: Numbers

    def __len__(self) -> int:
        """Points."""
        return len(self.steps)


@dataclass(frozen=True)
class RunCurves:
    """One training.

    tokens_per_step: 0 where the run does not say.   segments: rows of `segments.json`.   samples: HTML of each, by step.
    """

    label: str
    run: Run
    curves: dict[str, Curve]
    tokens_per_step: float
    segments: list["Segment"]
    samples: dict[int, list[str]]

    def axis(self, name: str, metric: str) -> Numbers | None:
        """The places of a metric's curve on one of AXES; None where they are not known."""
        curve, own_count = self.curves[metric], metric.partition("/")[0]
        if name == "active hours":
            return self._active_hours(curve.at_ms)
        if own_count == "system":  # counted by samples
            return None
        if own_count == "by_tokens":  # counted by thousands of tokens
            return 1000 * curve.steps if name == "tokens" else None
        if name == "step":
            return curve.steps
        return curve.steps * self.tokens_per_step if self.tokens_per_step else None

    def _active_hours(self, at_ms: Numbers) -> Numbers:
        """Time in which a process worked on the run, without the gaps between segments."""
        hours = np.zeros_like(at_ms)
        spans: list[tuple[float, float]] = [(s.started_at_ms, s.ended_at_ms or s.last_seen_ms) for s in self.segments]
        spans = spans or [(self.run.info.start_time, np.inf)]
        spans[-1] = (spans[-1][0], np.inf)  # it may be running
        for start, end in spans:
            hours += np.clip(np.minimum(at_ms, end) - start, 0, None) / 3.6e6
        return hours


class Segment(NamedTuple):
    """A process that worked on a run; what is needed of its row in `segments.json`."""

    host: str
    started_at_ms: int
    ended_at_ms: int | None
    last_seen_ms: int
    downtime_s: float


@dataclass(frozen=True)
class Comparison:
    """Trainings side by side.

    metrics: those read, in the order of their pictures.   differing: settings that are not the same in all of them.   families: runs
    that differ in nothing but the seed, together.
    """

    runs: tuple[RunCurves, ...]
    metrics: tuple[str, ...]
    differing: tuple[str, ...]
    families: tuple[tuple[RunCurves, ...], ...] = field(default=())


def read(names: Sequence[str], config: TrackingConfig, more: Sequence[str] = ()) -> Comparison:
    """The runs that names stand for: ids, run names, `latest`, experiments, or filter strings on the configured experiment.

    more: metrics to draw beside CURVES.   Raises InputError for a name that stands for nothing and a metric no run has, with what is near.
    """
    client = store.connect(config)
    chosen = {run.info.run_id: run for name in names for run in _find(client, name, config.experiment)}
    metrics = tuple(dict.fromkeys((*CURVES, *more)))
    known = {key for run in chosen.values() for key in run.data.metrics}
    for metric in more:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they have {', '.join(sorted(known)) or 'none'}"
            raise InputError(f"metric {metric}: none of these runs has it; {hint}")
    with store.reported("points cannot be read"):
        told = {metric: _histories(client, [i for i, run in chosen.items() if metric in run.data.metrics], metric) for metric in metrics}
    with ThreadPoolExecutor(READERS) as pool:
        curves = ({metric: _curve(told[metric].get(run_id, [])) for metric in metrics} for run_id in chosen)
        runs = tuple(pool.map(_run_curves, chosen.values(), curves))
    keys = dict.fromkeys(key for r in runs for key in r.run.data.params if "." in key)
    shown = (key for key in keys if key != "tracking.run_name")  # it heads the column
    differing = tuple(key for key in shown if len({r.run.data.params.get(key) for r in runs}) > 1)
    families: dict[str, list[RunCurves]] = {}
    for r in runs:
        same = {key: value for key, value in sorted(r.run.data.params.items()) if "." in key and not SAME_BUT_SEED.fullmatch(key)}
        data = sorted(i.dataset.digest for i in (r.run.inputs.dataset_inputs if r.run.inputs else []))
        families.setdefault(json.dumps([same, data]) if same else r.run.info.run_id, []).append(r)
    return Comparison(runs, metrics, differing, tuple(tuple(family) for family in families.values()))


def rows(comparison: Comparison) -> list[list[str]]:
    """A table: status, history, last values, best validation, then the settings that differ; one column per run."""
    runs = comparison.runs
    table = [["status", *(r.run.info.status for r in runs)]]
    for key in LAST:
        if any(key in r.run.data.metrics for r in runs):
            table.append([f"last {key}", *(_number(r.run.data.metrics.get(key)) for r in runs)])
    table.append(["best val/loss", *(_best(r.curves["val/loss"]) for r in runs)])
    table.append(["best checkpoint", *(r.run.data.tags.get("bdh.best_checkpoint", "").rpartition("/")[2] for r in runs)])
    if any(len(r.segments) > 1 for r in runs):
        table.append(["segments", *(_history(r) for r in runs)])
    drift = [{k.removeprefix("drift."): v for k, v in r.run.data.tags.items() if k.startswith("drift.")} for r in runs]
    if any(drift):
        table.append(["changed on resume", *("; ".join(f"{k}: {v}" for k, v in d.items()) for d in drift)])
    table += [[key, *(r.run.data.params.get(key, "") for r in runs)] for key in comparison.differing]
    return table


def page(comparison: Comparison, drawn: Mapping[str, bytes]) -> str:
    """The report as one HTML page without anything to fetch.   drawn: its `pictures`."""
    head = "".join(f"<th>{html.escape(r.label)}</th>" for r in comparison.runs)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows(comparison)
    )
    plots = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in drawn.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>BDH runs compared</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#1c2733}"
        "h1{font-size:1.5em}h2{font-size:1.1em;margin:2em 0 .5em}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92em}"
        "th,td{padding:.3em .9em;text-align:left;border-bottom:1px solid #dde3ea;vertical-align:top;white-space:nowrap}"
        "tr th:first-child{position:sticky;left:0;background:#fff;font-weight:500;color:#51606f}thead th{background:#f2f5f8}"
        "pre{white-space:pre-wrap;width:26em;margin:0;font-size:.85em}b{background:#fff1c2;font-weight:400}img{max-width:100%}"
        "</style><h1>BDH runs compared</h1>"
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{plots}{_samples(comparison)}</html>"
    )


def pictures(comparison: Comparison) -> dict[str, bytes]:
    """A PNG per metric that any run has: on steps, on tokens and on the time in which the runs were worked on."""
    return {metric: _picture(comparison, metric) for metric in comparison.metrics if any(len(r.curves[metric]) for r in comparison.runs)}


def keep(comparison: Comparison, files: Sequence[Path], config: TrackingConfig) -> None:
    """The report as artifacts of the first run, under `compare/`.   Raises TrackingError."""
    client = store.connect(config)
    run_id = comparison.runs[0].run.info.run_id
    with store.reported(f"run {run_id}: the report cannot be kept there"):
        for file in files:
            client.log_artifact(run_id, str(file), "compare")


def _picture(comparison: Comparison, metric: str) -> bytes:
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    axes = figure.subplots(1, len(AXES), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, AXES, strict=True):
        for number, family in enumerate(comparison.families):
            _draw(axis, name, metric, family, f"C{number % 10}", number // 10 % 4)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=metric)
    drawn = axes[0].get_legend_handles_labels()
    if 0 < len(drawn[0]) <= 12:
        axes[-1].legend(*drawn, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _draw(axis: Axes, name: str, metric: str, family: tuple[RunCurves, ...], colour: str, style: int) -> None:
    """A run's curve; of several seeds the mean with a band from the lowest to the highest, at the steps that all of them have."""
    dash = ("-", "--", ":", "-.")[style]
    curves = [r.curves[metric] for r in family]
    common = sorted(set.intersection(*(set(c.steps) for c in curves)))
    if len(family) > 1 and len(common) > 1:
        places = [np.isin(c.steps, common) for c in curves]
        values = np.stack([c.values[p] for c, p in zip(curves, places, strict=True)])
        across = [r.axis(name, metric) for r in family]
        if any(x is None for x in across):
            return
        x = np.mean([x[p] for x, p in zip(across, places, strict=True) if x is not None], axis=0)
        at, mean, low, high = _thinned(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
        seeds = len({r.run.data.params.get("training.seed") for r in family})
        many = f"{seeds} seeds" if seeds == len(family) else f"{len(family)} runs"
        axis.plot(at, mean, dash, color=colour, label=_plain(f"{family[0].label}, {many}"))
        axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        return
    for r, curve in zip(family, curves, strict=True):
        place = r.axis(name, metric)
        if place is not None and len(curve):
            axis.plot(*_thinned(place, curve.values), dash, color=colour, label=_plain(r.label), marker="." if len(curve) < 40 else "")


def _plain(label: str) -> str:
    """As matplotlib shows it unchanged: no mathematics between dollar signs, no hidden first underscore."""
    return label.replace("$", r"\$").lstrip("_")


def _thinned(*columns: Numbers) -> list[Numbers]:
    """At most DRAWN_POINTS of each column, as means of neighbours."""
    size = -(-len(columns[0]) // DRAWN_POINTS)
    if size <= 1:
        return list(columns)
    edges = np.arange(0, len(columns[0]), size)
    counts = np.diff(np.append(edges, len(columns[0])))
    return [np.add.reduceat(column, edges) / counts for column in columns]


def _samples(comparison: Comparison) -> str:
    """What runs wrote at equal steps, side by side; the last steps that at least two of them (or the only one) have."""
    runs = [r for r in comparison.runs if r.samples][:MOST_SAMPLES]
    if not runs:
        return ""
    steps = sorted({step for r in runs for step in r.samples if sum(step in other.samples for other in runs) >= min(2, len(runs))})
    head = "".join(f"<th>{html.escape(r.label)}</th>" for r in runs)
    body = ""
    for step in steps[-MOST_SAMPLES:]:
        for row in itertools.zip_longest(*(r.samples.get(step, []) for r in runs), fillvalue=""):
            body += f"<tr><th>step {step}</th>" + "".join(f"<td><pre>{sample}</pre></td>" for sample in row) + "</tr>"
    return f'<h2>Samples</h2><div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _find(client: MlflowClient, name: str, experiment: str) -> list[Run]:
    with store.reported(f"run {name} cannot be read"):
        if run := store.find_run(client, name):
            return [run]
        found = client.get_experiment_by_name(experiment)
        own = _trainings(client, found.experiment_id) if found else []
        if name == "latest" and own:
            return own[:1]
        matches = [run for run in own if run.info.run_name == name]
        if len(matches) == 1:
            return matches
        other = client.get_experiment_by_name(name)
        if not matches and other is not None and (runs := _trainings(client, other.experiment_id)):
            return runs
        if not matches and FILTER.search(name):
            try:
                runs = _trainings(client, found.experiment_id, name) if found else []
            except MlflowException as error:
                raise InputError(f"{name}: no run has this name, and MLflow takes no such filter: {files.first_line(error)}") from None
            if not runs:
                raise InputError(f"{name}: no run of experiment {experiment} is like this")
            return runs
        experiments = [e.name for e in client.search_experiments()] if not matches else []
    if matches:
        raise InputError(f"{name}: {len(matches)} runs have this name, give an id: {', '.join(run.info.run_id for run in matches[:5])}")
    known = [str(run.info.run_name) for run in own]
    near = difflib.get_close_matches(name, [*known, *experiments, *["latest"] * bool(own)], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"experiment {experiment} has {', '.join(known[:10]) or 'no runs'}"
    raise InputError(f"{name}: no run, experiment or filter; {hint}")


def _trainings(client: MlflowClient, experiment_id: str, wanted: str = "") -> list[Run]:
    """Runs of an experiment that are trainings, not their segments or sweeps, newest first."""
    runs: list[Run] = []
    page = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"])
    runs += page
    while page.token:
        page = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=page.token)
        runs += page
    mine = [run for run in runs if "bdh.training" in run.data.tags or "training.seed" in run.data.params]
    return [run for run in mine if "bdh.continues" not in run.data.tags]


def _run_curves(run: Run, curves: dict[str, Curve]) -> RunCurves:
    tokens, segments, samples = 0.0, list[Segment](), dict[int, list[str]]()
    with contextlib.suppress(KeyError, ValueError):  # a run that does not say, or says it otherwise
        sizes = [int(run.data.params[f"training.{key}"]) for key in ("batch_size", "block_size", "gradient_accumulation_steps")]
        tokens = float(np.prod(sizes))
    if run.data.tags.get("bdh.segment", "1") != "1":
        with _absent_if_odd():
            segments = [Segment(*(row[key] for key in Segment._fields)) for row in _artifact(run, SEGMENTS)]
    if SAMPLES in run.data.tags.get("mlflow.loggedArtifacts", ""):
        with _absent_if_odd():
            rows = _artifact(run, SAMPLES)["data"]
            for step, prompt, written in rows:
                samples.setdefault(int(step), []).append(f"{html.escape(prompt)}<b>{html.escape(written)}</b>")
    return RunCurves(f"{run.info.run_name} ({run.info.run_id[:6]})", run, curves, tokens, segments, samples)


def _artifact(run: Run, path: str) -> Any:
    return json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{path}"))


def _absent_if_odd() -> contextlib.AbstractContextManager[None]:
    """A file that is not there (yet), half there or somebody else's: the comparison goes on without it."""
    return contextlib.suppress(MlflowException, OSError, ValueError, KeyError, TypeError, AttributeError)


def _histories(client: MlflowClient, run_ids: list[str], key: str) -> dict[str, list[Point]]:
    """All points of a metric, run by run.

    From a database of our own in one query, of columns: it would look through the points of all runs for each run again, and MLflow makes
    three objects of each row.
    """
    store = client._tracking_client.store
    if not isinstance(store, SqlAlchemyStore):
        with ThreadPoolExecutor(READERS) as pool:
            told = list(pool.map(lambda run_id: client.get_metric_history(run_id, key), run_ids))
        return {run_id: [Point(m.step, m.timestamp, m.value) for m in points] for run_id, points in zip(run_ids, told, strict=True)}
    found: dict[str, list[Point]] = {run_id: [] for run_id in run_ids}
    columns = SqlMetric.run_uuid, SqlMetric.step, SqlMetric.timestamp, SqlMetric.value, SqlMetric.is_nan
    with store.ManagedSessionMaker() as session:
        for run_id, step, at_ms, value, is_nan in session.query(*columns).filter(SqlMetric.key == key, SqlMetric.run_uuid.in_(run_ids)):
            found[run_id].append(Point(step, at_ms, np.nan if is_nan else value))
    return found


def _curve(points: list[Point]) -> Curve:
    by_step = {point.step: point for point in sorted(points, key=lambda point: point[:2])}  # of a step told twice, the later
    steps, at_ms, values = (np.array([point[i] for point in by_step.values()], dtype=float) for i in range(3))
    return Curve(steps, values, at_ms)


def _history(r: RunCurves) -> str:
    """Segments in words: how many, how long nobody worked on the run, on which machines."""
    if len(r.segments) < 2:
        return "1"
    down_s = sum(segment.downtime_s for segment in r.segments)
    hosts = ", ".join(dict.fromkeys(segment.host for segment in r.segments))
    return f"{len(r.segments)} ({hosts}), {down_s / 3600:.2f} h between them"


def _best(curve: Curve) -> str:
    if not np.isfinite(curve.values).any():
        return ""
    lowest = int(np.nanargmin(curve.values))
    return f"{curve.values[lowest]:.4f} at step {int(curve.steps[lowest])}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    digits = 4 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".")
