"""The report of a comparison: one HTML page that loads nothing from elsewhere, and its plots as PNG files.

The frame of the page is `compare.html` in this folder. Text from runs reaches it through `element`, which escapes it.
"""

import base64
import html
import io
import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.studies.compare import Comparison, rows
from bdh_mlflow.studies.curves import Numbers, RunCurves
from bdh_mlflow.text import verbatim
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.artifacts import Artifacts

PLOTTED_POINTS = 800  # per curve; neighbours are averaged in longer ones
MAX_LEGEND = 12  # curves; more would cover the plot
MARKED_POINTS = 40  # a curve with fewer shows each point
MAX_SAMPLES = 4  # steps, and runs side by side
MAX_ANALYSES = 6  # runs side by side
DASHES = ("-", "--", ":", "-.")
COLOURS = 10  # of matplotlib's cycle


def write(comparison: Comparison, path: Path) -> list[Path]:
    """Write the page to `path` and each plot beside it.   Returns all files, the page first."""
    drawn, files = plots(comparison), [path]
    path.write_text(page(comparison, drawn), encoding="utf-8")
    for metric, png in drawn.items():
        files.append(path.with_name(f"{path.stem}_{metric.replace('/', '_')}.png"))
        files[-1].write_bytes(png)
    return files


def log(comparison: Comparison, files: Sequence[Path], config: TrackingConfig) -> None:
    """Store files as artifacts of the first run, under `compare/`.   Raises TrackingError."""
    client = store.connect(config)
    run = comparison.runs[0].run.info
    with store.reported(f"run {run.run_id}: the report cannot be stored there"):
        artifacts = Artifacts(run.artifact_uri, client.tracking_uri)
        for file in files:
            artifacts.put(file, "compare")


class Html(str):
    """Text that is HTML already; any other text is escaped before it becomes part of a page."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str) -> Html:
    """An HTML element.   content: put side by side; text that is not `Html` is escaped, and so are attributes."""
    inner = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    words = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>" if name == "img" else f"<{name}{words}>{inner}</{name}>")


def page(comparison: Comparison, drawn: Mapping[str, bytes]) -> str:
    """The report as one HTML page.   drawn: its `plots`."""
    frame = resources.files("bdh_mlflow.studies").joinpath("compare.html").read_text(encoding="utf-8")
    body = [element("tr", element("th", row[0]), *(element("td", cell) for cell in row[1:])) for row in rows(comparison)]
    settings = _table((r.label for r in comparison.runs), body)
    images = [element("h2", metric) + element("img", alt=metric, src=_data_url(png)) for metric, png in drawn.items()]
    parts = {"plots": "\n".join(images), "analyses": _analyses(comparison), "samples": _samples(comparison)}
    return string.Template(frame).substitute(settings=settings, **parts)


def plots(comparison: Comparison) -> dict[str, bytes]:
    """A PNG per metric that any run has: over each of `axes`."""
    return {metric: _plot(comparison, metric) for metric in comparison.metrics if any(len(r.curves[metric]) for r in comparison.runs)}


def axes(comparison: Comparison) -> tuple[str, ...]:
    """Over what curves are drawn: steps, tokens, bytes of text where not every token is one, and hours in training."""
    vocabularies = any(r.bytes_per_token != 1 for r in comparison.runs)
    return ("step", "tokens", *["bytes of text"] * vocabularies, "active hours")


def averaged(*columns: Numbers) -> list[Numbers]:
    """Columns (n,) with at most PLOTTED_POINTS rows: means of equally many neighbours (fewer in the last row)."""
    size = -(-len(columns[0]) // PLOTTED_POINTS)
    if size <= 1:
        return list(columns)
    edges = np.arange(0, len(columns[0]), size)
    counts = np.diff(np.append(edges, len(columns[0])))
    return [np.add.reduceat(column, edges) / counts for column in columns]


def _table(labels: Iterable[str], body: Sequence[Html]) -> Html:
    head = element("thead", element("tr", element("th"), *(element("th", label) for label in labels)))
    return element("div", element("table", head, element("tbody", *body)), class_="wide")


def _data_url(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _analyses(comparison: Comparison) -> str:
    """The last analyses of the runs, each kind side by side. A figure is an image, in which nothing of its file is run."""
    shown, body = comparison.runs[:MAX_ANALYSES], []
    for name in sorted({name for r in shown for name in r.analyses}):
        cells = []
        for r in shown:
            if found := r.analyses.get(name):
                image = element("img", alt=f"{name} of {r.label}", src=_data_url(found.figure, "svg+xml"))
                cells.append(element("td", element("p", f"step {found.step}: {found.says}"), image))
            else:
                cells.append(element("td"))
        body.append(element("tr", element("th", name), *cells))
    return element("h2", "Analyses") + _table((r.label for r in shown), body) if body else ""


def _samples(comparison: Comparison) -> str:
    """What models generated at equal steps, side by side; the last steps that at least two runs (or the only one) have."""
    runs = [r for r in comparison.runs if r.samples][:MAX_SAMPLES]
    if not runs:
        return ""
    steps = sorted({step for r in runs for step in r.samples if sum(step in other.samples for other in runs) >= min(2, len(runs))})
    body = []
    for step in steps[-MAX_SAMPLES:]:
        for row in itertools.zip_longest(*(r.samples.get(step, []) for r in runs)):
            cells = [element("pre", sample.prompt, element("b", sample.written)) if sample else element("pre") for sample in row]
            body.append(element("tr", element("th", f"step {step}"), *(element("td", cell) for cell in cells)))
    return element("h2", "Samples") + _table((r.label for r in runs), body)


class _Style(NamedTuple):
    color: str
    linestyle: str


def _plot(comparison: Comparison, metric: str) -> bytes:
    drawn_over = axes(comparison)
    figure = Figure(figsize=(5 * len(drawn_over), 4.4), layout="constrained")
    panels = figure.subplots(1, len(drawn_over), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, drawn_over, strict=True):
        for number, family in enumerate(comparison.families):
            style = _Style(f"C{number % COLOURS}", DASHES[number // COLOURS % len(DASHES)])
            if not _draw_mean(panel, axis, metric, family, style):
                _draw_runs(panel, axis, metric, family, style)
        panel.set(xlabel=axis)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=metric)
    drawn = panels[0].get_legend_handles_labels()
    if 0 < len(drawn[0]) <= MAX_LEGEND:
        panels[-1].legend(*drawn, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _draw_runs(panel: Axes, axis: str, metric: str, family: tuple[RunCurves, ...], style: _Style) -> None:
    for r in family:
        x, curve = r.axis(axis, metric), r.curves[metric]
        if x is not None and len(curve):
            marker = "." if len(curve) < MARKED_POINTS else ""
            x, y = averaged(x, curve.values)
            panel.plot(x, y, style.linestyle, color=style.color, label=verbatim(r.label), marker=marker)


def _draw_mean(panel: Axes, axis: str, metric: str, family: tuple[RunCurves, ...], style: _Style) -> bool:
    """Several seeds as their mean, with a band from the lowest to the highest, at the steps that all of them have.

    Returns False where there are no several seeds with several common steps.
    """
    curves = [r.curves[metric] for r in family]
    common = sorted(set.intersection(*(set(c.steps) for c in curves)))
    if len(family) < 2 or len(common) < 2:
        return False
    places = [np.isin(c.steps, common) for c in curves]
    values = np.stack([c.values[p] for c, p in zip(curves, places, strict=True)])
    known = [x[p] for r, p in zip(family, places, strict=True) if (x := r.axis(axis, metric)) is not None]
    if len(known) < len(family):
        return True  # nothing to draw on this axis
    x, mean, low, high = averaged(np.mean(known, axis=0), values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    seeds = len({r.settings.get("training.seed") for r in family})
    count = f"{seeds} seeds" if seeds == len(family) else f"{len(family)} runs"
    panel.plot(x, mean, style.linestyle, color=style.color, label=verbatim(f"{family[0].label}, {count}"))
    panel.fill_between(x, low, high, color=style.color, alpha=0.2, linewidth=0)
    return True
