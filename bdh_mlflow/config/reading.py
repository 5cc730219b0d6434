"""YAML and `section.key=value` overrides in, one nested mapping out.

A file that is not YAML is an error with line and column; a section or override that has no place in a configuration becomes a `Problem`,
so that it is reported together with values that are wrong. Values are checked later, by their declared types.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bdh_mlflow.config.messages import Problem, found
from bdh_mlflow.config.settings import SECTIONS, takes_text
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.files import nearest


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# A date is text here: `run_name: 2025-11-08`.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, expected: str = f"sections ({', '.join(SECTIONS)})") -> Mapping[str, Any]:
    """The mapping in a YAML file.   expected: what a message says should be in it.   Raises ConfigError with line and column."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()}){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected {expected}, found {found(tree)}")
    return tree


def with_overrides(tree: Mapping[str, Any], overrides: Sequence[str], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """A copy of the tree with the overrides written into it; what has no place in it becomes a problem."""
    merged: dict[str, dict[str, Any]] = {}
    for name, section in tree.items():
        if name not in SECTIONS:
            problems.append(Problem(str(name), f"unknown section{nearest(str(name), SECTIONS)}"))
        elif section is not None and not isinstance(section, Mapping):
            problems.append(Problem(name, f"expected settings below it, found {found(section)}"))
        else:
            merged[name] = dict(section or {})
    for override in overrides:
        path, equals, text = override.partition("=")
        name, dot, key = path.strip().partition(".")
        if not equals or not dot or not key:
            problems.append(Problem(override, "expected section.key=value"))
        elif name not in SECTIONS:
            problems.append(Problem(path, f"unknown section{nearest(name, SECTIONS)}"))
        else:
            try:
                value = yaml.load(text, _Loader)
            except yaml.YAMLError:
                value = text
            if value is not None and takes_text(name, key):
                value = text  # 2024_01 and 007 are not numbers where text is meant
            section = merged.setdefault(name, {})
            mapping, dot, entry = key.partition(".")
            if dot and isinstance(section.get(mapping, {}), Mapping):
                section[mapping] = {**section.get(mapping, {}), entry: text}
            else:
                section[key] = value
    return merged
