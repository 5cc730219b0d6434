"""What a sweep searches: the space of settings, checked like a configuration before the first trial."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bdh_mlflow.config import Problem, problem_of
from bdh_mlflow.config.messages import refused
from bdh_mlflow.config.places import DATABASES, scheme_of, store_uri
from bdh_mlflow.config.reading import plain_values, read_yaml, typed
from bdh_mlflow.config.settings import Float, Int
from bdh_mlflow.redact import masked

SET_BY_THE_SWEEP = ("training.checkpoint_dir", "training.resume_from_checkpoint", "tracking.")
"""What every trial has of its own, or all share: neither is searched."""
MOST_STEPS = 10**9
_RULES = ConfigDict(extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """Values that one setting may take: `choices`, or numbers from `low` to `high` (in steps of `step`, or on a `log` scale)."""

    model_config = _RULES
    choices: list[Any] | None = None
    low: Int | Float | None = None
    high: Int | Float | None = None
    step: Int | Float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> "Choice":
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("needs choices, or low and high")
        if self.choices is not None:
            self._check_choices(self.choices)
        elif self.low is not None and self.high is not None:
            self._check_range(self.low, self.high)
        return self

    def _check_choices(self, choices: list[Any]) -> None:
        if not choices or not self.model_fields_set <= {"choices"}:
            raise ValueError("needs choices (at least one), or low and high, not both")
        for place, value in enumerate(choices):
            if not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"choice {json.dumps(value, default=str)}: not one of text, finite numbers, true, false and null")
            if value in choices[:place]:
                raise ValueError(f"choice {json.dumps(value)} is given twice")

    def _check_range(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"low {low} is above high {high}")
        if self.log and (self.step is not None or low <= 0):
            raise ValueError("a log scale needs low above 0 and no step")
        if self.step is None:
            return
        if self.step > 0 and (high - low) / self.step > MOST_STEPS:
            raise ValueError(f"step {self.step} makes more than {MOST_STEPS:,} values between {low} and {high}")
        if self.step <= 0 or self.step > max(high - low, 0):
            raise ValueError(f"step {self.step}; accepted: above 0, and at most high - low ({high - low})")
        if self._whole and not float(self.step).is_integer():
            raise ValueError(f"step {self.step} between whole numbers; write low and high with a point for others")

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        """The value that the sampler picks for a trial."""
        if self.choices is not None:
            return trial.suggest_categorical(key, self.choices)
        assert self.low is not None
        assert self.high is not None
        if self._whole:
            return trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(key, float(self.low), float(self.high), step=self.step, log=self.log)

    def examples(self) -> list[Any]:
        """Values whose validity shows that of all others: every choice, or the bounds and, of a range of any numbers, one between."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        between = [] if self._whole or self.low == self.high else [self.low + (self.high - self.low) * 0.3819]
        return [self.low, self.high, *between]


class Space(BaseModel):
    """What a sweep searches: its name, the settings to vary, and settings that all trials share.

    storage: URI of the database that keeps the study, for processes on several machines; None for a journal file beside the checkpoints.
    """

    model_config = _RULES
    study: str = Field(pattern=r"^[\w-][\w.-]{0,99}$")
    storage: str | None = None
    parameters: dict[str, Choice] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("storage")
    @classmethod
    def _database(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        if scheme_of(full := store_uri(uri, Path.cwd())) not in DATABASES:
            raise ValueError(f"{masked(uri)}: not a database; accepted: postgresql+psycopg://..., mysql+pymysql://..., or null")
        return full

    @classmethod
    def from_yaml(cls, path: str) -> "Space":
        """Read and validate a file.   Raises ConfigError with every problem."""
        tree = _typed(read_yaml(Path(path), f"{', '.join(cls.model_fields)}"))
        try:
            space = cls.model_validate(tree)
        except ValidationError as error:
            problems = [Problem(".".join(map(str, e["loc"])) or "file", e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        else:
            problems = list(space.problems())
            if not problems:
                return space
        raise refused(path, problems)

    def problems(self) -> Iterator[Problem]:
        """Settings that do not exist, cannot be searched, or have values that are not accepted; combinations are the business of trials."""
        for key, choice in self.parameters.items():
            if key.startswith(SET_BY_THE_SWEEP):
                yield Problem(f"parameters.{key}", "is the same for all trials, or set by the sweep; it cannot be searched")
            elif key.startswith("tokenizer."):
                reason = "trials are judged by val/loss, in nats per token of one vocabulary; train each by itself, and compare them"
                yield Problem(f"parameters.{key}", reason)
            elif key in self.settings:
                yield Problem(f"settings.{key}", "is among the parameters as well")
            elif wrong := next((problem for value in choice.examples() if (problem := problem_of(key, value))), None):
                yield Problem(f"parameters.{wrong.key}", wrong.message)


def _typed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The file with each value as its setting takes it: text letter by letter."""
    plain: dict[str, Any] = plain_values(dict(tree))
    if isinstance(settings := tree.get("settings"), dict):
        plain["settings"] = {key: typed(key, value) for key, value in settings.items()}
    for key, choice in (tree["parameters"] if isinstance(tree.get("parameters"), dict) else {}).items():
        if isinstance(choice, dict) and isinstance(choice.get("choices"), list):
            plain["parameters"][key]["choices"] = [typed(key, value) for value in choice["choices"]]
    return plain
