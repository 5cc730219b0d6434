"""Every setting is read outside config/, as `section.key`.

Modules get a section under other names (`def build_optimizer(parameters, training: TrainingConfig)`, `c = self._config`), so names are
followed: annotations of arguments and fields, and assignments. A key of another section that has the same name does not count.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from bdh_mlflow.config import SECTIONS

PACKAGE = Path(__file__).parents[2] / "bdh_mlflow"
CLASSES = {section.__name__: name for name, section in SECTIONS.items()} | {"BDHConfig": "model"}


def test_every_setting_is_read_by_some_code() -> None:
    read = {pair for file in PACKAGE.rglob("*.py") if file.parent.name != "config" for pair in settings_read(file.read_text())}
    declared = {(section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)}
    assert declared - read == set()


def test_a_key_is_not_mistaken_for_one_of_another_section() -> None:
    source = """
    class Loop:
        def __init__(self, config: TrainingConfig, scheduler: "SchedulerConfig | None") -> None:
            self._config = config
            self.type = "constant"

        def run(self, whole: Config) -> None:
            a, t = self._config, whole.training
            print(a.seed, t.compile, whole.fp8.format, self.type, whole.type, self._config.debug)
    """
    expected = {("training", "seed"), ("training", "compile"), ("fp8", "format"), ("training", "debug")}
    assert set(settings_read(inspect.cleandoc(source))) == expected


def settings_read(source: str) -> Iterator[tuple[str, str]]:
    """(section, key) of each attribute of a section that a module reads."""
    tree = ast.parse(source)
    fields: dict[str, str] = {}  # self.x in any method
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (section := annotated(node.annotation)):
            fields[f"self.{node.target.id}"] = section
    for function in functions:
        fields |= {name: section for name, section in names_in(function, fields).items() if name.startswith("self.")}
    for function in functions:
        known = names_in(function, fields)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                section = section_of(node.value, known)
                if section and node.attr in SECTIONS[section].__pydantic_fields__:
                    yield section, node.attr


def names_in(function: ast.FunctionDef, fields: Mapping[str, str]) -> dict[str, str]:
    """What stands for a section in a function: its arguments by annotation, and what a section is assigned to."""
    known = dict(fields)
    for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
        if section := annotated(argument.annotation):
            known[argument.arg] = section
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                known |= {ast.unparse(name): section for name, value in pairs if (section := section_of(value, known))}
    return known


def section_of(node: ast.expr, known: Mapping[str, str]) -> str | None:
    """The section that an expression is: a known name, or an attribute of that name, as in `config.training`."""
    name = ast.unparse(node)
    if name in known:
        return known[name]
    return node.attr if isinstance(node, ast.Attribute) and node.attr in SECTIONS and ast.unparse(node.value) != "self" else None


def annotated(annotation: ast.expr | None) -> str | None:
    """The section whose class an annotation names, also in a union or in quotes."""
    words = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
    return next((CLASSES[word] for word in words if word in CLASSES), None)
