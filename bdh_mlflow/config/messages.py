"""What is wrong with a setting, and what would be right: in words, from its declared type."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from bdh_mlflow.config.former import FORMER
from bdh_mlflow.config.settings import SECTIONS, Accepted, NotEmpty, Refused, declared
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.files import nearest

LONGEST_SHOWN = 80  # characters of a value in a message


class Problem(NamedTuple):
    """One thing wrong with a configuration: the dotted key (empty for the whole file) and a sentence."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def refused(origin: str, problems: Sequence[Problem]) -> ConfigError:
    """The error of a file with problems, one in a line."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError("\n  ".join([f"{origin}: {count}", *map(str, problems)]))


def documentation() -> list[tuple[str, str, str, str]]:
    """Every setting as (dotted key, default, accepted values, meaning), for tables."""
    rows = []
    for name, section in SECTIONS.items():
        for key, field in section.__pydantic_fields__.items():
            default = dataclasses.asdict(section())[key]
            rows.append((f"{name}.{key}", yaml_scalar(default), accepted(name, key), field.description or ""))
    return rows


def explain(section: str, key: str, value: object, reason: str = "") -> str:
    """What is wrong with a value: what was found and what is accepted.   reason: what a rule for this type says."""
    fields = SECTIONS[section].__pydantic_fields__
    if (former := FORMER.get(f"{section}.{key}")) is not None:
        now = f"it is now {former.successor}" if former.successor else "there is none here"
        reason = f" ({former.reason})" if former.reason else ""
        return f"a key of an earlier program: {now}{reason}; bdh-mlflow config migrate FILE rewrites all of them"
    if key not in fields:
        return f"unknown key{nearest(key, fields)}"
    known = [r.reason for r in typing.get_args(declared(section, key)) if isinstance(r, Refused) and r.value == value]
    if reason and isinstance(value, Mapping):
        return reason
    return "; ".join([f"found {found(value)}", *known, *([reason] if reason else []), f"accepted: {accepted(section, key)}"])


def entry_problems(section: str, key: str, value: Mapping[str, object]) -> list[Problem]:
    """What is wrong with the entries of a mapping of text to text, one by one."""
    return [Problem(f"{section}.{key}.{name}", f"found {found(v)}; accepted: text") for name, v in value.items() if not isinstance(v, str)]


def found(value: object) -> str:
    """A value as a message shows it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {json.dumps(value if len(value) <= LONGEST_SHOWN else value[:LONGEST_SHOWN] + '...')}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return yaml_scalar(value)


def yaml_scalar(value: object) -> str:
    """A plain value as YAML writes it."""
    return "null" if value is None else json.dumps(value)


def accepted(section: str, key: str) -> str:
    """What a setting accepts, in words."""
    return _describe(declared(section, key))


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is Annotated and (words := next((a.words for a in args if isinstance(a, Accepted)), None)):
        return words
    if origin is Annotated:
        limits = [words for bound in args[1:] for words in _limits(bound)]
        return " ".join([_describe(args[0]), *([" and ".join(limits)] if limits else [])])
    if origin is tuple:
        return f"a list of {len(args)}, each a {_describe(args[0])}"
    if origin is dict:
        return "mapping of text to text"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}[kind]


def _limits(bound: Any) -> Iterable[str]:
    for metadata in getattr(bound, "metadata", ()):
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if hasattr(metadata, attribute):
                yield f"{sign} {getattr(metadata, attribute)}"
    if isinstance(bound, NotEmpty):
        yield "that is not empty"
