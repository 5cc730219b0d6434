"""What may be said of a tracked run, and of what is logged to it; everything is checked here."""

import dataclasses
import functools
import json
import operator
import os
import re
import typing
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.config.places import store_uri
from bdh_mlflow.config.settings import LONGEST_EXPERIMENT, LONGEST_PARAM, LONGEST_RUN_NAME
from bdh_mlflow.errors import InputError
from bdh_mlflow.text import Sample, shortened

LONGEST_NAME = 250
"""Characters of the name of a metric, param or tag that MLflow stores."""
DEEPEST = 50  # levels of params
_NAME, _UNUSUAL = re.compile(r"[\w.\- :/]+"), re.compile(r"[^\w.\- :/]")
"""What MLflow takes as the name of a metric, param or tag, and what not."""


@dataclass(frozen=True)
class Settings:
    """How a run is tracked.   Raises InputError for what cannot be meant."""

    experiment: Annotated[str, Field(min_length=1, max_length=LONGEST_EXPERIMENT)] | None = None
    """Of a new run; None is MLflow's own: MLFLOW_EXPERIMENT_NAME, or `Default`."""
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_RUN_NAME)] | None = None
    """Of a new run; None lets MLflow choose."""
    tags: Mapping[str, str] = field(default_factory=dict)
    folder: str | Path = "checkpoints"
    """Where run directories are made; `sync` and `find` look there too."""
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None
    """Tracking server or store; None is MLflow's own: MLFLOW_TRACKING_URI, or a database in the current folder."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """Newest checkpoints that are kept, here and in the mirror, besides the best one; None keeps all."""
    best: Annotated[str, Field(min_length=1)] | None = None
    """Metric of the checkpoints by which one of them is the best; None: there is no best one."""
    higher_is_better: bool = False
    mirror: bool = True
    """Whether checkpoints go to the run's artifacts."""
    system_metrics: bool = True
    """Whether use of CPU, memory, disk, network and GPU is sampled."""
    signals: bool = False
    """Whether signals that would end the program are held until the run has ended; see `Run.stop_requested`."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            try:
                TypeAdapter(_types()[each.name], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                raise InputError(f"track.Settings: {each.name} is {value!r}: {error.errors()[0]['msg']}") from None
        for key in self.tags:
            checked_name("tag", key)
        try:
            if self.tracking_uri is not None:
                store_uri(self.tracking_uri, Path.cwd(), expand=False)
        except ValueError as error:
            raise InputError(f"track.Settings: tracking_uri: {error}") from None
        try:
            self.config()
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InputError(f"track.Settings: {'.'.join(map(str, wrong['loc']))} is {wrong['input']!r}: {wrong['msg']}") from None

    def config(self) -> TrackingConfig:
        """The same for the rooms that deal with MLflow."""
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        return TrackingConfig(
            experiment=experiment,
            run_name=self.name,
            tags=dict(self.tags),
            tracking_uri=self.tracking_uri,
            mirror_checkpoints=self.mirror,
            log_system_metrics=self.system_metrics,
        )


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(Settings, include_extras=True)


def settings_of(given: Settings | str | None) -> Settings:
    """Settings, or those of an experiment that are said by its name alone."""
    if given is None or isinstance(given, str):
        return Settings(given)
    if not isinstance(given, Settings):
        raise InputError(f"settings: {given!r} is neither the name of an experiment nor track.Settings(...)")
    return given


def checked_name(what: str, name: object) -> str:
    """A name that MLflow stores.   what: metric, param or tag.   Raises InputError."""
    if not isinstance(name, str):
        raise InputError(f"{what} {name!r}: its name is no text")
    if len(name) > LONGEST_NAME:
        raise InputError(f"{what} {name[:40]!r}...: its name has {len(name)} characters; MLflow stores up to {LONGEST_NAME}")
    if not _NAME.fullmatch(name) or os.path.normpath(name) != name or name.startswith(("/", "..")) or name == ".":
        raise InputError(f"{what} {name!r}: names are made of letters, digits, `_`, `-`, `.`, `:`, spaces and single `/` between them")
    return name


def checked_step(step: object) -> int:
    """A step as a plain number.   Raises InputError."""
    try:
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"step {step!r}: accepted: a whole number of completed updates") from None
    if isinstance(step, bool) or not 0 <= number < 2**63:
        raise InputError(f"step {step!r}: accepted: a whole number of completed updates, from 0")
    return number


def checked_values(values: object) -> dict[str, float]:
    """Metrics as plain numbers; anything that `float` takes is one, but for text.   Raises InputError."""
    if not isinstance(values, Mapping):
        raise InputError(f"metrics: {values!r} is no mapping of names to numbers")
    numbers = {}
    for key, value in values.items():
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            numbers[key] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
            raise InputError(f"metric {key!r}: {shortened(repr(value), 100)} is no number") from None
    return numbers


def checked_path(path: object) -> Path:
    """A path.   Raises InputError."""
    if not isinstance(path, str | os.PathLike) or isinstance(given := os.fspath(path), bytes) or not given or "\0" in given:
        raise InputError(f"{path!r} is no path of a file or folder")
    return Path(given)


def checked_samples(samples: object) -> list[Sample]:
    """Pairs of texts.   Raises InputError."""
    found = []
    for each in samples if isinstance(samples, Iterable) else [samples]:
        if not isinstance(each, tuple | list) or len(each) != 2 or not all(isinstance(text, str) for text in each):
            raise InputError(f"sample {shortened(repr(each), 100)}: accepted: a pair of texts, prompt and continuation")
        found.append(Sample(*each))
    return found


def usual_name(name: object) -> str:
    """The nearest name that MLflow stores; empty for what has none."""
    text = re.sub(r"/{2,}", "/", _UNUSUAL.sub("_", str(name))).strip("/")
    return text if text and os.path.normpath(text) == text and not text.startswith("..") and len(text) <= LONGEST_NAME else ""


class Numbers:
    """Of what a trainer logs the numbers.   rename: gives the name of a metric.   note: called once for each name that has no number."""

    def __init__(self, rename: Callable[[str], str], note: Callable[[str], None]) -> None:
        self._rename, self._note = rename, note
        self._skipped: set[str] = set()

    def __call__(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Those that MLflow stores."""
        numbers: dict[str, float] = {}
        for key, value in values.items():
            try:
                numbers |= checked_values({checked_name("metric", self._rename(str(key))): value})
            except InputError:
                if key not in self._skipped:
                    self._skipped.add(key)
                    self._note(f"track: {key} is no number, or has no name that MLflow stores, and is not logged")
        return numbers


def usual_params(params: Mapping[str, Any], joint: str = ".") -> dict[str, Any]:
    """Params of another program, flattened, under the nearest names that MLflow stores; those without one are left out."""
    return {name: value for name, value in flat(params, joint=joint, checked=usual_name).items() if name}


def flat(
    params: object, prefix: str = "", joint: str = ".", checked: Callable[[str], str] = lambda name: checked_name("param", name)
) -> dict[str, Any]:
    """Params by their names; those in mappings are joined, with dots, and values that are no plain ones are text.

    checked: gives the name that is stored, or raises InputError.   Raises InputError.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"params: {params!r} is no mapping of names to values")
    if prefix.count(joint) > DEEPEST:
        raise InputError(f"params: {shortened(prefix, 100)}: more than {DEEPEST} levels deep")
    found: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Namespace):
            value = vars(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}{joint}", joint, checked)
        else:
            found[checked(name)] = _storable_param(value)
    return found


def _storable_param(value: object) -> Any:
    """A plain value as it is, others as text; shortened to what MLflow stores."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError):
            value = str(value)
    return shortened(value, LONGEST_PARAM)
