"""What an analysis gives: tables, a figure, numbers to log, and what it was made of."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bdh_mlflow.text import verbatim

FOLDER = "analysis"
"""Among the artifacts of a run."""
TAG = "bdh.analysis."
"""With the name of an analysis: the step of the last one."""


def path_of(name: str, step: int, kind: str) -> str:
    """A file of an analysis among the artifacts of a run."""
    return f"{FOLDER}/{name}/step_{step}.{kind}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """What one analysis found.

    name: of its files, and first part of its metrics.   figure: SVG, None where there is nothing to draw.   metrics: numbers that are
    comparable over steps and runs.   made_of: sizes, seeds and thresholds.   says: the result in a sentence or two.   data: all numbers.
    """

    name: str
    says: str
    tables: Sequence[Table]
    metrics: Mapping[str, float]
    made_of: Mapping[str, Any]
    figure: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def files(self, step: int) -> dict[str, str]:
        """Its files among the artifacts of a run, by path.   step: completed updates of the model."""
        drawn = {} if self.figure is None else {path_of(self.name, step, "svg"): self.figure}
        return {**drawn, path_of(self.name, step, "json"): self.to_json()}

    def to_json(self) -> str:
        """Everything but the figure."""
        tables = [{"title": t.title, "header": list(t.header), "rows": [list(row) for row in t.rows]} for t in self.tables]
        tree = {"says": self.says, "made_of": self.made_of, "metrics": self.metrics, "tables": tables, "data": self.data}
        return json.dumps(_finite(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(tree: Any) -> Any:
    """The same tree with null for numbers that JSON has no words for."""
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def figure(width: float, height: float, title: str, made_of: Mapping[str, Any]) -> Figure:
    """An empty figure whose last line says what it was made of.   width, height: inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(verbatim(title))
    made.supxlabel(verbatim("; ".join(f"{name} {value}" for name, value in made_of.items())), fontsize="x-small", color="0.4")
    return made


def svg(made: Figure) -> str:
    """A figure as text, the same for the same numbers."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "bdh", "svg.fonttype": "none"}):
        made.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
