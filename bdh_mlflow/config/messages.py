"""What a run is: every setting, its default, its meaning and its limits, settled before anything is built.

Sections are frozen dataclasses validated by pydantic; YAML and `section.key=value` overrides go in, one resolved `Config` comes out, and
every problem is reported at once with its path, what was found, what is accepted and the nearest known name. Knows neither torch nor
mlflow: what this machine can do is checked by callers who pass their own `checks` to `Config.from_yaml`.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from bdh_mlflow.config.settings import SECTIONS, Refused
from bdh_mlflow.files import nearest


class Problem(NamedTuple):
    """One thing wrong with a configuration: the dotted key (empty for the whole file) and a sentence."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def documentation() -> list[tuple[str, str, str, str]]:
    """Every setting as (dotted key, default, accepted values, meaning): the README's table."""
    rows = []
    for name, section in SECTIONS.items():
        for key, field in section.__pydantic_fields__.items():
            default = dataclasses.asdict(section())[key]
            rows.append((f"{name}.{key}", yaml_scalar(default), accepted(section, key), field.description or ""))
    return rows


def explain(section: Any, key: str, value: object) -> str:
    """What is wrong with a value: what was found and what is accepted."""
    if key not in section.__pydantic_fields__:
        return f"unknown key{nearest(key, section.__pydantic_fields__)}"
    kind = typing.get_type_hints(section, include_extras=True)[key]
    known = [r.reason for r in typing.get_args(kind) if isinstance(r, Refused) and r.value == value]
    return "; ".join([f"found {found(value)}", *known, f"accepted: {accepted(section, key)}"])


def found(value: object) -> str:
    """A value as a message shows it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {json.dumps(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return yaml_scalar(value)


def yaml_scalar(value: object) -> str:
    """A plain value as YAML writes it."""
    return "null" if value is None else json.dumps(value)


def accepted(section: Any, key: str) -> str:
    """What a setting accepts, in words, from its declared type."""
    return _describe(typing.get_type_hints(section, include_extras=True)[key])


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is Annotated:
        limits = [words for bound in args[1:] for words in _limits(bound)]
        return " ".join([_describe(args[0]), *([" and ".join(limits)] if limits else [])])
    if origin is dict:
        return "mapping of text to text"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}[kind]


def _limits(bound: Any) -> Iterable[str]:
    for metadata in getattr(bound, "metadata", ()):
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if hasattr(metadata, attribute):
                yield f"{sign} {getattr(metadata, attribute)}"
        if getattr(metadata, "min_length", 0):
            yield "that is not empty"
