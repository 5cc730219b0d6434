"""The package keeps its layout: who imports whom, how long a file, class or function may be, and where tests lie.

Reads the source with `ast` and imports none of it, so an import inside a function or under TYPE_CHECKING counts like one at the top, and so
does a module that is started by name as a subprocess (`[sys.executable, "-m", "bdh_mlflow.tracking.sender"]`). Each failure lists every
violation as file:line and the rule. The checks are functions over a source tree, which a test calls on a tree that breaks each rule once.
"""

import ast
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent
PACKAGE = "bdh_mlflow"

LEVELS = (  # a module imports its own wing and wings of a line above its own
    ("leaf",),
    ("config", "checkpoint"),
    ("vocabulary",),
    ("model", "data", "tracking"),
    ("analysis", "track"),
    ("training",),
    ("inference", "studies"),
    ("cli",),
)
LEAVES = ("errors", "redact", "text", "host", "files", "distributed")  # modules of no wing
LEVEL = {wing: number for number, wings in enumerate(LEVELS) for wing in wings}
FORBIDDEN = {  # what the levels allow and these modules, or wings, must not import all the same
    f"{PACKAGE}.track": tuple(f"{PACKAGE}.{wing}" for wing in ("model", "data", "vocabulary")),
    f"{PACKAGE}.redact": (PACKAGE,),
    f"{PACKAGE}.tracking.delivery": (f"{PACKAGE}.tracking.sender",),
    f"{PACKAGE}.training.trainer": ("mlflow", f"{PACKAGE}.model", f"{PACKAGE}.data", f"{PACKAGE}.tracking"),
}
HOMES = {  # third-party packages that only these wings or modules import
    "mlflow": (f"{PACKAGE}.tracking", f"{PACKAGE}.inference", f"{PACKAGE}.studies", f"{PACKAGE}.cli.doctor"),
    "pyarrow": (f"{PACKAGE}.data",),
    "tokenizers": (f"{PACKAGE}.vocabulary",),
    "sentencepiece": (f"{PACKAGE}.vocabulary",),
    "tiktoken": (f"{PACKAGE}.vocabulary",),
    "huggingface_hub": (f"{PACKAGE}.vocabulary",),
    "transformers": (f"{PACKAGE}.inference.modeling_bdh", f"{PACKAGE}.track.huggingface"),
    "lightning": (f"{PACKAGE}.track.lightning",),
    "pytorch_lightning": (f"{PACKAGE}.track.lightning",),
}
MLFLOW_INTERNALS = f"{PACKAGE}.tracking.mlflow_internals"
NAMEDTUPLE_METHODS = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # public in spite of their names
NO_PUBLIC_NAME = ("torch",)  # libraries whose private names tests may use: what they look at in torch has no other name
BY_NAME = {"getattr", "setattr", "delattr", "hasattr", "patch", "object"}  # calls that reach an attribute by a string

MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 220, 60, 6
EXCEPTIONS: dict[str, str] = {
    "bdh_mlflow/inference/modeling_bdh.py:BDHForCausalLM.forward": "the parameters that transformers gives a language model",
}
"""`path`, `path:Class` or `path:Class.function` of what may exceed a bound, and why."""

CROSS_MODULE_TESTS = {  # test files that hold a promise of several modules
    "test_gpu_page": "benchmarks/gpu.py, which nobody can run every day",
    "test_fuzz": "malformed input of every kind",
    "test_browser": "pages of a tracking server in a real browser",
    "test_project": "MLproject, conda.yaml, README and shipped configurations",
    "test_readme": "the README's commands, in their order",
    "test_structure": "this file",
    "tracking/test_kills": "trainers, senders and servers as processes that are killed or stopped",
    "tracking/test_outages": "a real server that is slow, stopped or killed",
    "tracking/test_team": "PostgreSQL, an S3 store and MLflow servers before them",
    "track/test_loops": "loops of three kinds as programs that end in every way",
    "track/test_page": "the examples of docs/track.md",
    "training/test_vocabularies": "tokenizers from training to the served model",
    "training/test_endings": "every way a training process ends",
    "training/test_version1": "journals and checkpoints of format 1",
    "training/test_signals": "signals in every phase",
}


class Violation(NamedTuple):
    """Where a rule is broken.   path: relative to the tree."""

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


class Import(NamedTuple):
    """A dotted module name that a module needs, and the imported name if it is not a module."""

    line: int
    module: str
    name: str | None = None


class Source:
    """A parsed file.   module: dotted name, without `.__init__`."""

    def __init__(self, root: Path, file: Path) -> None:
        self.path = file.relative_to(root).as_posix()
        self.module = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.text = file.read_text()
        self.tree = ast.parse(self.text, self.path)


@functools.cache
def sources(root: Path, *folders: str) -> list[Source]:
    """All Python files below these folders of a tree."""
    return [Source(root, file) for folder in folders for file in sorted((root / folder).rglob("*.py"))]


def imports(source: Source, modules: set[str]) -> Iterator[Import]:
    """What a file imports or starts by name.   modules: the tree's own, to tell a submodule from a name."""
    docstrings = {id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(source, node)
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield Import(node.lineno, submodule) if submodule in modules else Import(node.lineno, module, alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if node.value in modules and "." in node.value:
                yield Import(node.lineno, node.value)
        elif isinstance(node, ast.List | ast.Tuple):
            words = [element.value if isinstance(element, ast.Constant) else None for element in node.elts]
            if ("-m", PACKAGE) in itertools.pairwise(words):
                yield Import(node.lineno, f"{PACKAGE}.__main__")


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = source.path.endswith("/__init__.py")
    parents = source.module.split(".")
    kept = parents[: len(parents) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def check_import_order(root: Path) -> Iterator[Violation]:
    """A wing imports itself and lower wings; forbidden modules and third-party packages stay where they are allowed."""
    package = sources(root, PACKAGE)
    modules = {source.module for source in package}
    for source in package:
        wing = wing_of(source.module)
        if wing not in LEVEL:
            yield Violation(source.path, 1, f"{source.module} is in no known wing and not one of the leaves ({', '.join(LEAVES)})")
            continue
        for needed in imports(source, modules):
            if within(needed.module, PACKAGE):
                target = wing_of(needed.module)
                if target in LEVEL and target != wing and LEVEL[target] >= LEVEL[wing]:
                    yield Violation(source.path, needed.line, f"{wing} must not import {target} ({needed.module})")
            forbidden = [name for place, names in FORBIDDEN.items() if within(source.module, place) for name in names]
            if any(within(needed.module, name) for name in forbidden):
                yield Violation(source.path, needed.line, f"{source.module} must not import {needed.module}")
            for library, homes in HOMES.items():
                if within(needed.module, library) and not any(within(source.module, home) for home in homes):
                    yield Violation(source.path, needed.line, f"only {', '.join(homes)} import {library}")


def wing_of(module: str) -> str:
    """Name of a module's wing: its folder, `leaf` for the leaves and the package itself, `cli` for `__main__`."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in LEAVES:
        return "leaf"
    return "cli" if parts[1] == "__main__" else parts[1]


def within(module: str, package: str) -> bool:
    """Whether a module is the package or below it."""
    return module == package or module.startswith(f"{package}.")


def check_mlflow_internals(root: Path) -> Iterator[Violation]:
    """Private names of MLflow are used in one module only."""
    rule = f"a private name is used outside {MLFLOW_INTERNALS}"
    for source in sources(root, PACKAGE):
        needed = list(imports(source, set()))
        if source.module == MLFLOW_INTERNALS or not any(within(i.module, "mlflow") for i in needed):
            continue
        for i in needed:
            if within(i.module, "mlflow") and any(is_private(part) for part in [*i.module.split("."), i.name or ""]):
                yield Violation(source.path, i.line, f"{rule}: {i.module}.{i.name}" if i.name else f"{rule}: {i.module}")
        for line, name in private_accesses(source):
            yield Violation(source.path, line, f"{rule}: {name}")


def check_privates_in_tests(root: Path) -> Iterator[Violation]:
    """Tests use what modules offer."""
    for source in sources(root, "tests"):
        for line, name in private_accesses(source):
            if name.split(".")[0] not in NO_PUBLIC_NAME:
                yield Violation(source.path, line, f"tests use no private names: {name}")
        for i in imports(source, set()):
            parts = [*i.module.split("."), i.name or ""]
            if parts[0] not in NO_PUBLIC_NAME and any(is_private(part) for part in parts):
                yield Violation(source.path, i.line, f"tests use no private names: {i.module}" + (f".{i.name}" if i.name else ""))


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore and is not a public method of named tuples."""
    return name.startswith("_") and not name.startswith("__") and name not in NAMEDTUPLE_METHODS


def private_accesses(source: Source) -> Iterator[tuple[int, str]]:
    """Lines where a private attribute of something else than `self`, `cls` or `super()` is used, by a dot or by a string."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for word in node.args[:2] if called in BY_NAME else ():
                if isinstance(word, ast.Constant) and isinstance(word.value, str) and is_private(word.value.rsplit(".")[-1]):
                    yield node.lineno, f'{called}(..., "{word.value}")'


def check_bounds(root: Path, exceptions: dict[str, str]) -> Iterator[Violation]:
    """No file, class, function or list of parameters is too long, and no exception is left over."""
    needed = set()
    for source in sources(root, PACKAGE, "tests", "benchmarks", "scripts"):
        for name, violation in too_long(source):
            needed.add(name)
            if name not in exceptions:
                yield violation
    for name in exceptions.keys() - needed:
        yield Violation(name.split(":")[0], 1, f"{name} keeps all bounds: remove it from EXCEPTIONS")


def too_long(source: Source) -> Iterator[tuple[str, Violation]]:
    """What exceeds a bound, with its name for EXCEPTIONS."""
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield source.path, Violation(source.path, lines, f"a file of {lines} lines (at most {MAX_FILE_LINES})")

    def visit(parent: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, Violation]]:
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(node, prefix, in_class)
                continue
            name, is_class = f"{prefix}{node.name}", isinstance(node, ast.ClassDef)
            kind, limit = ("class", MAX_CLASS_LINES) if is_class else ("function", MAX_FUNCTION_LINES)
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                rule = f"{kind} {name} has {length} lines (at most {limit})"
                yield f"{source.path}:{name}", Violation(source.path, node.lineno, rule)
            given_by_pytest = source.path.startswith("tests/") and node.name.startswith("test_")  # fixtures, and columns of a table
            if not isinstance(node, ast.ClassDef) and not given_by_pytest and (count := parameters(node, in_class)) > MAX_PARAMETERS:
                rule = f"function {name} has {count} parameters (at most {MAX_PARAMETERS})"
                yield f"{source.path}:{name}", Violation(source.path, node.lineno, rule)
            yield from visit(node, f"{name}.", is_class)

    yield from visit(source.tree, "", False)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> int:
    """Named parameters, without what the caller does not pass: `self` or `cls`, and the `ctx` of a torch.autograd.Function."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (in_class and names[:1] in (["self"], ["cls"], ["ctx"]))


def check_places_of_tests(root: Path, cross_module: Iterable[str]) -> Iterator[Violation]:
    """tests/ mirrors the package (`test_x.py` or `test_x_more.py` beside `x.py`), and benchmarks stand alone."""
    there = {file.relative_to(root / "tests").with_suffix("").as_posix() for file in (root / "tests").rglob("test_*.py")}
    for name in sorted(there - set(cross_module)):
        folder, _, words = name.rpartition("test_")
        modules = ["_".join(words.split("_")[: n + 1]) for n in range(words.count("_") + 1)]
        if not any((root / PACKAGE / folder / f"{module}.py").is_file() for module in modules):
            yield Violation(f"tests/{name}.py", 1, f"there is no {PACKAGE}/{folder}{words}.py, and it is not in CROSS_MODULE_TESTS")
    for name in sorted(set(cross_module) - there):
        yield Violation(f"tests/{name}.py", 1, "is in CROSS_MODULE_TESTS and does not exist")
    for source in sources(root, PACKAGE, "tests", "benchmarks", "scripts"):
        for needed in imports(source, set()):
            inside = within(source.module, "benchmarks")
            if inside and within(needed.module, "tests"):
                yield Violation(source.path, needed.line, "benchmarks import nothing from tests")
            elif not inside and within(needed.module, "benchmarks"):
                yield Violation(source.path, needed.line, "nothing imports benchmarks")


def listed(violations: Iterable[Violation]) -> str:
    """One line each, for a failure message."""
    return "".join(f"\n  {violation}" for violation in sorted(set(violations)))


def assert_none(violations: Iterable[Violation]) -> None:
    """Fail with all of them."""
    found = listed(violations)
    assert not found, found


def test_wings_import_only_lower_wings() -> None:
    assert_none(check_import_order(PROJECT))


def test_private_names_of_mlflow_are_used_in_one_module() -> None:
    assert_none(check_mlflow_internals(PROJECT))


def test_files_classes_and_functions_keep_their_bounds() -> None:
    assert_none(check_bounds(PROJECT, EXCEPTIONS))


def test_tests_mirror_the_package() -> None:
    assert_none(check_places_of_tests(PROJECT, CROSS_MODULE_TESTS))


def test_tests_use_no_private_names() -> None:
    assert_none(check_privates_in_tests(PROJECT))


WRONG = {  # a tree that breaks every rule: files, and after `#!` in a line which rule it breaks
    "bdh_mlflow/__init__.py": "",
    "bdh_mlflow/errors.py": "import bdh_mlflow.config  #! leaf must not import config",
    "bdh_mlflow/redact.py": "from bdh_mlflow.errors import E  #! bdh_mlflow.redact must not import bdh_mlflow.errors",
    "bdh_mlflow/helpers.py": "x = 1  #! in no known wing",
    "bdh_mlflow/config/__init__.py": "from bdh_mlflow import checkpoint  #! config must not import checkpoint",
    "bdh_mlflow/checkpoint/__init__.py": "",
    "bdh_mlflow/checkpoint/files.py": """
        def f():
            from bdh_mlflow.model import BDH  #! checkpoint must not import model
        def g():
            import mlflow.entities  #! import mlflow
        """,
    "bdh_mlflow/model/__init__.py": "",
    "bdh_mlflow/model/bdh.py": "from ..data import order  #! model must not import data",
    "bdh_mlflow/data/__init__.py": "",
    "bdh_mlflow/data/order.py": "import pyarrow",
    "bdh_mlflow/tracking/__init__.py": "",
    "bdh_mlflow/tracking/sender.py": "from . import delivery",
    "bdh_mlflow/tracking/delivery.py": """
        import sys
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from bdh_mlflow.training.parts import T  #! tracking must not import training
        command = [sys.executable, "-m", "bdh_mlflow.tracking.sender"]  #! must not import bdh_mlflow.tracking.sender
        other = ["python", "-m", "bdh_mlflow", "sync"]  #! tracking must not import cli
        """,
    "bdh_mlflow/tracking/mlflow_internals.py": "from mlflow.x import _y\nclient._z",
    "bdh_mlflow/tracking/store.py": """
        from mlflow.utils import _home  #! private name is used outside
        def f(client, record):
            client._tracking_client.x  #! client._tracking_client
            return record._replace(a=1)
        """,
    "bdh_mlflow/track/__init__.py": "",
    "bdh_mlflow/track/tracked.py": """
        from bdh_mlflow.tracking import store
        from bdh_mlflow.data import order  #! track.tracked must not import bdh_mlflow.data
        """,
    "bdh_mlflow/training/__init__.py": "",
    "bdh_mlflow/training/trainer.py": """
        '''Docstrings may name bdh_mlflow.tracking.sender.'''
        import pyarrow.parquet  #! import pyarrow
        def f():
            from bdh_mlflow.tracking import store  #! trainer must not import bdh_mlflow.tracking.store
        """,
    "bdh_mlflow/inference/__init__.py": "",
    "bdh_mlflow/inference/load.py": "import mlflow\nimport bdh_mlflow.studies.sweep  #! inference must not import studies",
    "bdh_mlflow/studies/__init__.py": "",
    "bdh_mlflow/studies/sweep.py": "from bdh_mlflow.inference.load import x  #! studies must not import inference",
    "bdh_mlflow/cli/__init__.py": "",
    "bdh_mlflow/cli/doctor.py": "import mlflow\nfrom bdh_mlflow.studies import sweep",
    "bdh_mlflow/__main__.py": "from bdh_mlflow.cli import doctor",
    "tests/cli/test_doctor.py": """
        from bdh_mlflow.cli.doctor import _x  #! bdh_mlflow.cli.doctor._x
        def test_it(thing, monkeypatch):
            thing._seam = 1  #! thing._seam
            monkeypatch.setattr(thing, "_seam", 2)  #! setattr(..., "_seam")
        """,
    "tests/cli/test_wishes.py": "x = 1  #! there is no bdh_mlflow/cli/wishes.py",
    "tests/cli/test_doctor_more.py": "def test_it(a, b, c, d, e, f, g): pass\ndef many(a, b, c, d, e, f, g): pass  #! has 7 parameters",
    "tests/test_errors.py": "from benchmarks import speed  #! nothing imports benchmarks",
    "benchmarks/speed.py": """
        from tests.conftest import x  #! benchmarks import nothing from tests
        def many(a, b, c, *, d, e, f, g): pass  #! has 7 parameters
        class Six:
            def method(self, a, b, c, d, e, f): pass
        """,
    "scripts/long.py": "def long():  #! has 61 lines" + "\n    pass" * 60,
    "scripts/longer.py": "class Longer:  #! has 221 lines" + "\n    x = 1" * 220,
    "scripts/longest.py": "x = 1\n" * 450 + "x = 1  #! a file of 451 lines",
}


def test_every_broken_rule_is_named_with_file_and_line(tmp_path: Path) -> None:
    expected: dict[tuple[str, int], str] = {}
    for path, text in WRONG.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [line.removeprefix(" " * 8) for line in text.removeprefix("\n").split("\n")]
        file.write_text("\n".join(lines) + "\n")
        expected |= {(path, n): rule for n, line in enumerate(lines, 1) for rule in re.findall(r"#! (.*)", line)}
    checks: list[Callable[[Path], Iterator[Violation]]] = [check_import_order, check_mlflow_internals, check_privates_in_tests]
    found = [violation for check in checks for violation in check(tmp_path)]
    found += [*check_bounds(tmp_path, {}), *check_places_of_tests(tmp_path, [])]
    assert {(v.path, v.line) for v in found} == expected.keys(), listed(found)
    for violation in found:
        assert expected[violation.path, violation.line] in violation.rule


def test_an_exception_that_is_no_longer_needed_fails(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "long.py").write_text("def long():\n" + "    pass\n" * 60)
    assert list(check_bounds(tmp_path, {"scripts/long.py:long": "a table"})) == []
    (left_over,) = check_bounds(tmp_path, {"scripts/long.py:long": "a table", "scripts/long.py": "no longer so"})
    assert left_over.rule == "scripts/long.py keeps all bounds: remove it from EXCEPTIONS"
    assert [v.rule for v in check_places_of_tests(tmp_path, ["test_gone"])] == ["is in CROSS_MODULE_TESTS and does not exist"]
