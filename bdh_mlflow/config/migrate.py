"""Configurations of the program that this one descends from: what became of each key, and the same training in ours.

It is a fork of pathwaycom/bdh with a YAML of the same sections. Its `max_iters` and frequencies count passes, of which
`gradient_accumulation_steps` make an update; ours count updates.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bdh_mlflow.config.former import FORMER
from bdh_mlflow.config.messages import yaml_scalar
from bdh_mlflow.config.settings import SECTIONS

COUNTS = ("max_iters", "log_freq", "test_freq", "checkpoint_freq")


class Migrated(NamedTuple):
    """tree: sections and keys of ours.   notes: what changed, and what could not be taken over, with the reason, a line each."""

    tree: dict[str, dict[str, Any]]
    notes: list[str]


def migrate(old: Mapping[str, Any]) -> Migrated:
    """A configuration of the ancestor as one of ours. What is unknown to both is named and left out."""
    new: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for section, values in old.items():
        if not isinstance(values, Mapping):
            notes.append(f"{section}: left out: no section of settings")
            continue
        for key, value in values.items():
            _take(f"{section}.{key}", value, new, notes)
    _count_updates(new, notes)
    _schedule(old, new, notes)
    _tokenizer(new, notes)
    return Migrated(new, notes)


def _take(key: str, value: Any, new: dict[str, dict[str, Any]], notes: list[str]) -> None:
    section, _, name = key.partition(".")
    if key in FORMER:
        successor, reason = FORMER[key]
        if successor is None:
            notes.append(f"{key}: {yaml_scalar(value)}: left out: {reason}")
            return
        notes.append(f"{key} is now {successor}{f': {reason}' if reason else ''}")
        section, _, name = successor.partition(".")
    elif section not in SECTIONS or name not in SECTIONS[section].__pydantic_fields__:
        notes.append(f"{key}: {yaml_scalar(value)}: left out: no such setting here")
        return
    new.setdefault(section, {})[name] = value


def _count_updates(new: dict[str, dict[str, Any]], notes: list[str]) -> None:
    training = new.get("training", {})
    passes = training.get("gradient_accumulation_steps", 1)
    if not isinstance(passes, int) or passes < 2:
        return
    for key in COUNTS:
        if isinstance(before := training.get(key), int):
            training[key] = max(1, before // passes)
            notes.append(f"training.{key}: {before} passes are {training[key]} updates of {passes} passes each")


def _schedule(old: Mapping[str, Any], new: dict[str, dict[str, Any]], notes: list[str]) -> None:
    """Where the ancestor's schedules differ from ours: T_max counts from the end of warm-up; a constant warm-up is none."""
    before, scheduler = old.get("scheduler"), new.get("scheduler", {})
    if not isinstance(before, Mapping):
        return
    warmup = before.get("warmup_steps", 0)
    if isinstance(scheduler.get("decay_steps"), int) and isinstance(warmup, int):
        scheduler["decay_steps"] += warmup
    if before.get("warmup_type") == "constant" and warmup:
        scheduler["warmup_steps"] = 0
        notes.append(f"scheduler.warmup_type: constant: the first {warmup} updates had the full rate; now the schedule begins at once")
    if str(scheduler.get("type")).lower() not in ("cosine", "linear"):
        scheduler.pop("decay_steps", None)


def _tokenizer(new: dict[str, dict[str, Any]], notes: list[str]) -> None:
    """A name was a file, a repository or an encoding; the size of the vocabulary always followed."""
    tokenizer = new.get("tokenizer", {})
    kind, name = tokenizer.get("type", "byte"), tokenizer.get("name")
    if kind == "byte":
        tokenizer.pop("name", None)
        return
    if kind == "sentencepiece" or (isinstance(name, str) and name.endswith((".json", ".model"))):
        tokenizer["path"] = tokenizer.pop("name", None)
        notes.append("tokenizer.name names a file: it is now tokenizer.path")
    if "vocab_size" in new.get("model", {}):
        new["model"]["vocab_size"] = None
        notes.append("model.vocab_size: null: it followed the tokenizer there, too")
