"""One run read back from MLflow: settings in their declared types, curves and their axes, segments, samples.

Files that are missing or malformed count as absent: a run may be young, or logged by another program.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from numpy.typing import NDArray
from pydantic import ValidationError

from bdh_mlflow.config import SECTIONS, Problem
from bdh_mlflow.config.reading import value_of, with_overrides
from bdh_mlflow.studies import analyses
from bdh_mlflow.studies.analyses import Shown
from bdh_mlflow.text import Sample
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.mlflow_internals import MetricPoint
from bdh_mlflow.tracking.samples import SAMPLES
from bdh_mlflow.tracking.segments import FILE_NAME as SEGMENTS

LARGEST = sys.float_info.max  # what MLflow's databases store for infinity
DRAWN = 1e300  # larger values overflow where a plot adds them up
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A metric by step, one value each.   steps, values: (n,).   at_ms: (n,), when each was measured, Unix time in ms."""

    steps: Numbers
    values: Numbers
    at_ms: Numbers

    @classmethod
    def of(cls, points: list[MetricPoint]) -> "Curve":
        """The curve through points in any order; of several at one step the latest counts. What cannot be drawn is NaN: a gap."""
        by_step = {point.step: point for point in sorted(points, key=lambda point: point[:2])}
        steps, at_ms, values = (np.array([point[i] for point in by_step.values()], dtype=float) for i in range(3))
        return cls(steps, np.where(np.abs(values) < DRAWN, values, np.nan), at_ms)

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    def lowest(self) -> tuple[int, float] | None:
        """Step and value of the lowest point, None without a finite one."""
        finite = np.where(np.isfinite(self.values), self.values, np.inf)
        if not len(self) or not np.isfinite(finite).any():
            return None
        place = int(np.argmin(finite))
        return int(self.steps[place]), float(self.values[place])


class Segment(NamedTuple):
    """A process that trained a run: the columns of `segments.json` that are used here."""

    host: str
    started_at_ms: int
    ended_at_ms: int | None
    last_seen_ms: int
    downtime_s: float


@dataclass(frozen=True)
class RunCurves:
    """One training.

    settings: its config by dotted key, in declared types.   tokens_per_step: 0 where they do not say.   bytes_per_token: of the validation
    text; 1 before there were vocabularies, 0 where it is not known.   segments: rows of
    `segments.json`, empty for a run that was never resumed.   samples: what the model generated, by step.   analyses: the last one of each
    kind, by name.
    """

    label: str
    run: Run
    settings: dict[str, Any]
    curves: dict[str, Curve]
    tokens_per_step: float
    bytes_per_token: float
    segments: list[Segment]
    samples: dict[int, list[Sample]]
    analyses: Mapping[str, Shown] = dataclasses.field(default_factory=dict)

    def axis(self, name: str, metric: str) -> Numbers | None:
        """x values of a metric's curve on the axis step, tokens, bytes of text or active hours; (n,), None where they are not known."""
        curve, family = self.curves[metric], metric.partition("/")[0]
        if name == "active hours":
            return self._active_hours(curve.at_ms)
        if family == "system":  # its steps count samples
            return None
        if name == "step":
            return None if family in ("by_tokens", "by_bytes") else curve.steps
        tokens, of_text = self._per_step(family)
        unit = tokens if name == "tokens" else of_text
        return curve.steps * unit if unit else None

    def _per_step(self, family: str) -> tuple[float, float]:
        """Tokens, and bytes of text, that a step of the points of a family stands for; 0 where they are not known."""
        if family == "by_bytes":
            return (1000 / self.bytes_per_token if self.bytes_per_token else 0.0), 1000.0
        tokens = 1000.0 if family == "by_tokens" else self.tokens_per_step
        return tokens, tokens * self.bytes_per_token

    def _active_hours(self, at_ms: Numbers) -> Numbers:
        """Hours in which a process trained the run, without the gaps between segments."""
        hours = np.zeros_like(at_ms)
        spans: list[tuple[float, float]] = [(s.started_at_ms, s.ended_at_ms or s.last_seen_ms) for s in self.segments]
        spans = spans or [(self.run.info.start_time, np.inf)]
        spans[-1] = (spans[-1][0], np.inf)  # the last one may still be running
        for start, end in spans:
            hours += np.clip(np.minimum(at_ms, end) - start, 0, None) / 3.6e6
        return hours


def read_run(client: MlflowClient, run: Run, curves: dict[str, Curve]) -> RunCurves:
    """A run with its curves, and what its params and small artifacts say."""
    settings = {key: setting(key, text) for key, text in run.data.params.items() if "." in key}
    tokens, segments, samples = 0.0, list[Segment](), dict[int, list[Sample]]()
    sizes = [settings.get(f"training.{key}") for key in ("batch_size", "block_size", "gradient_accumulation_steps")]
    if all(isinstance(size, int) for size in sizes):
        tokens = float(math.prod(size for size in sizes if size is not None))
    if run.data.tags.get("bdh.segment", "1") != "1":
        with _absent_if_malformed():
            segments = [Segment(*(row[key] for key in Segment._fields)) for row in _json_artifact(client, run, SEGMENTS)]
    if SAMPLES in run.data.tags.get(MLFLOW_LOGGED_ARTIFACTS, ""):
        with _absent_if_malformed():
            for step, prompt, written in _json_artifact(client, run, SAMPLES)["data"]:
                samples.setdefault(int(step), []).append(Sample(str(prompt), str(written)))
    label, each = f"{run.info.run_name} ({run.info.run_id[:6]})", _bytes_per_token(run, settings)
    return RunCurves(label, run, settings, curves, tokens, each, segments, samples, analyses.last(client, run))


def _bytes_per_token(run: Run, settings: Mapping[str, Any]) -> float:
    if (text := run.data.tags.get("bdh.bytes_per_token")) is None:
        return 1.0 if settings.get("tokenizer.type", "byte") == "byte" else 0.0
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)) and number > 0:
            return number
    return 0.0


@functools.cache
def setting(key: str, text: str) -> Any:
    """The value of a logged param: `3e-4` and `0.0003` are one learning rate.

    Read as an override on the command line is, by the declared type; where a key is not known or the text does not fit, as plain YAML.
    """
    problems: list[Problem] = []
    section, _, name = key.partition(".")
    tree = with_overrides({}, [f"{key}={text}"], problems).get(section, {})
    if not problems:
        try:
            value = dataclasses.asdict(SECTIONS[section](**tree))
            for part in name.split(".", 1):
                value = value[part]
        except (ValidationError, KeyError):
            pass
        else:
            return value
    return _plain(text)


def _plain(text: str) -> Any:
    value = value_of(text)
    if isinstance(value, str | float):
        with contextlib.suppress(ValueError, OverflowError):  # a run may be logged by another program
            number = float(value)
            return int(number) if number.is_integer() else number if math.isfinite(number) else text
    return value


def _json_artifact(client: MlflowClient, run: Run, path: str) -> Any:
    return json.loads(Artifacts(run.info.artifact_uri, client.tracking_uri).read(path))


def _absent_if_malformed() -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(MlflowException, OSError, ValueError, KeyError, TypeError, AttributeError)
