"""YAML and `section.key=value` overrides in, one nested mapping out.

Scalars are read by the core schema of YAML 1.2: `yes`, `12:30` and a date are text, `1e-3` is a number. Where a setting takes text, it gets
what stands in the file, letter by letter: `007`, `1.10`. A file that is not YAML is an error with line and column; a section or override
that has no place in a configuration becomes a `Problem`, so that it is reported together with values that are wrong. Values are checked
later, by their declared types.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bdh_mlflow.config.messages import Problem, found
from bdh_mlflow.config.settings import SECTIONS, takes_text
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.files import nearest
from bdh_mlflow.text import storable

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")  # one with a leading zero stays text: whoever needs a number says what is wrong with it
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
_PLAIN = "tag:yaml.org,2002:plain"
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("plain", "str", "int", "float", "bool", "null", "map", "seq", "merge")}
_NODES = {"tag:yaml.org,2002:map": yaml.MappingNode, "tag:yaml.org,2002:seq": yaml.SequenceNode, "tag:yaml.org,2002:str": yaml.ScalarNode}
_UNDER_WAY = object()
_MERGE = "tag:yaml.org,2002:merge"


class Scalar(NamedTuple):
    """A scalar without quotes: what stands in the file, and what the core schema makes of it."""

    text: str
    value: Any


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars keep their text, in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key_node.value}` is given twice", key_node.start_mark)
            seen.add(key_node.value)
        self.flatten_mapping(node)
        return {str(key.value): self.construct_object(value, deep=deep) for key, value in node.value}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace merge keys by what they stand for: a mapping's own keys win, then those of the first of several (yaml.org/type/merge)."""
        own = [(key, value) for key, value in node.value if key.tag != _MERGE]
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for value in (value for key, value in node.value if key.tag == _MERGE):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "`<<` takes a mapping, or a list of them", value.start_mark)
                self.flatten_mapping(source)
                for key, content in source.value:
                    merged.setdefault(str(key.value), (key, content))
        kept = {str(key.value) for key, _ in own}
        node.value = [pair for name, pair in merged.items() if name not in kept] + own

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            kind = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"values of the type {kind} are not read; accepted: text, numbers, true, false, null, lists and mappings",
                node.start_mark,
            )
        if not isinstance(node, _NODES.get(node.tag, yaml.Node)):
            raise yaml.constructor.ConstructorError(None, None, "its type and what it holds do not go together", node.start_mark)
        return super().construct_object(node, deep)

    def quoted(self, node: yaml.ScalarNode) -> str:
        """Text in quotes; a character that is escaped as JSON does, in two halves (`"\\ud83d\\ude00"`), is one."""
        text = str(self.construct_scalar(node))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def plain(self, node: yaml.ScalarNode) -> Scalar:
        """A scalar by the core schema."""
        text = str(self.construct_scalar(node))
        return Scalar(text, core_value(text))


_Loader.yaml_implicit_resolvers = {"<": [(_MERGE, re.compile(r"<<$"))], None: [(_PLAIN, re.compile(""))]}
_Loader.add_constructor(_PLAIN, _Loader.plain)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.quoted)
for _kind in ("int", "float", "bool", "null"):  # written out, as in `!!int 7`
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.plain)


def core_value(text: str) -> Any:
    """What a plain scalar is in the core schema of YAML 1.2 (10.3.2), but for numbers in base 8 and 16, which stay text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) and not re.fullmatch("[-+]?[0-9]+", text) else text


def plain_values(tree: Any) -> Any:
    """The same tree with each `Scalar` replaced by its value.   Raises ValueError for one that contains itself."""
    done: dict[int, Any] = {}  # an alias may name a large part of the tree many times

    def walk(node: Any) -> Any:
        if isinstance(node, Scalar):
            return node.value
        if not isinstance(node, dict | list):
            return node
        if id(node) not in done:
            done[id(node)] = _UNDER_WAY
            done[id(node)] = [walk(each) for each in node] if isinstance(node, list) else {key: walk(each) for key, each in node.items()}
        if done[id(node)] is _UNDER_WAY:
            raise ValueError("an alias names what it is part of")
        return done[id(node)]

    return walk(tree)


def read_yaml(path: Path, expected: str = f"sections ({', '.join(SECTIONS)})") -> Mapping[str, Any]:
    """The mapping in a YAML file, plain scalars as `Scalar`.   expected: what a message says should be in it.

    Raises ConfigError with line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()}){hint}") from None
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, NUL in the path
        raise ConfigError(f"{storable(str(path))}: cannot be read as a YAML file: {error}") from None
    tree = _parsed(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected {expected}, found {found(plain_values(tree))}")
    return tree


def _parsed(text: str, origin: str) -> Any:
    """The one document of a YAML text.   Raises ConfigError."""
    try:
        tree = yaml.load(text, _Loader)
        plain_values(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{where}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    return None if isinstance(tree, Scalar) and tree.value is None else tree


def value_of(text: str) -> Any:
    """What a YAML text stands for; the text itself where it stands for nothing."""
    try:
        return plain_values(_parsed(text, ""))
    except ConfigError:
        return text


def typed(key: str, node: Any) -> Any:
    """What a node of a YAML file gives to the setting of a dotted key: the letters in the file where it takes text, else the value."""
    name, _, setting = key.partition(".")
    if isinstance(node, Scalar):
        as_written = name in SECTIONS and (takes_text(name, setting) or _is_text_entry(name, setting))
        return node.text if as_written and node.value is not None else node.value
    if isinstance(node, dict) and "." not in setting:
        return {entry: typed(f"{key}.{entry}", value) for entry, value in node.items()}
    return plain_values(node)


def _is_text_entry(section: str, setting: str) -> bool:
    """Whether a setting is an entry of a mapping of text: `tags.team`."""
    mapping, dot, _ = setting.partition(".")
    return bool(dot) and mapping in SECTIONS[section].__pydantic_fields__


def with_overrides(tree: Mapping[str, Any], overrides: Sequence[str], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """A copy of the tree with the overrides written into it; what has no place in it becomes a problem."""
    merged: dict[str, dict[str, Any]] = {}
    for name, section in tree.items():
        content = section.value if isinstance(section, Scalar) else section
        if name not in SECTIONS:
            problems.append(Problem(str(name), f"unknown section{nearest(str(name), SECTIONS)}"))
        elif content is not None and not isinstance(content, Mapping):
            problems.append(Problem(name, f"expected settings below it, found {found(plain_values(content))}"))
        else:
            merged[name] = {key: typed(f"{name}.{key}", value) for key, value in (content or {}).items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        name, dot, key = path.strip().partition(".")
        if not equals or not dot or not key:
            problems.append(Problem(override, "expected section.key=value"))
        elif name not in SECTIONS:
            problems.append(Problem(path, f"unknown section{nearest(name, SECTIONS)}"))
        else:
            section = merged.setdefault(name, {})
            mapping, dot, entry = key.partition(".")
            if dot and isinstance(section.get(mapping, {}), Mapping):
                section[mapping] = {**section.get(mapping, {}), entry: text}
            else:
                section[key] = _override(name, key, text)
    return merged


def _override(section: str, key: str, text: str) -> Any:
    """What the text of an override gives to a setting."""
    try:
        tree = _parsed(text, "")
    except ConfigError:
        return text
    if takes_text(section, key) and (tree is not None or not text.strip()):
        return text  # letter by letter, quotes as well; and nothing at all is no `null`
    return typed(f"{section}.{key}", tree)
