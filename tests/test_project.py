"""What is beside the package: MLproject, conda.yaml, pyproject.toml, shipped configurations, and the pages, README and docs/.

`python -m tests.test_project` rewrites the two tables that are made from the configuration.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from bdh_mlflow import __version__
from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import INCOMPATIBLE, Config, documentation, role_of

PROJECT = Path(__file__).parent.parent
MLPROJECT = yaml.safe_load((PROJECT / "MLproject").read_text())
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").glob("*.md"))]
README_LINES = 150
HEAVY = {"torch", "mlflow", "pydantic", "numpy", "pyarrow", "bitsandbytes"}
OURS = ("bdh_mlflow", "tests", "benchmarks", "configs", "scripts", "docs", ".ci")
SETTINGS = {row[0] for row in documentation()}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Table(NamedTuple):
    """A table that a page has between two comments, and the rows that it must have."""

    page: Path
    name: str
    rows: list[str]

    @property
    def place(self) -> re.Pattern[str]:
        return re.compile(rf"(<!-- {self.name}:.*-->\n\|.*\n\|.*\n)((?:\|.*\n)*)(<!-- end of {self.name} -->)")

    def written(self) -> list[str]:
        found = self.place.search(self.page.read_text())
        assert found is not None, f"{self.page.name} has no table between `<!-- {self.name}: ... -->` and `<!-- end of {self.name} -->`"
        return found[2].splitlines()

    def rewrite(self) -> None:
        rows = "".join(f"{row}\n" for row in self.rows)
        self.page.write_text(self.place.sub(lambda found: found[1] + rows + found[3], self.page.read_text()))


def tables() -> list[Table]:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def word(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    settings = [
        f"| `{key}` | {cell(default)} | {cell(accepted)} | {role_of(key).name} | {cell(meaning)} |"
        for key, default, accepted, meaning in documentation()
    ]
    pairs = []
    for pair in INCOMPATIBLE:
        first, *others = (word(value) for value in pair.values)
        values = ", ".join([f"`{pair.other}: {first}`", *(f"`{value}`" for value in others)])
        pairs.append(f"| `{pair.key}: {word(pair.value)}` | {values} | {pair.remedy} |")
    docs = PROJECT / "docs"
    return [Table(docs / "settings.md", "settings", settings), Table(docs / "low-precision.md", "incompatible", pairs)]


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_tables_of_settings_are_the_configurations(table: Table) -> None:
    assert table.written() == table.rows, "python -m tests.test_project rewrites it"


def test_conda_yaml_lists_the_dependencies_of_the_package() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    conda = yaml.safe_load((PROJECT / "conda.yaml").read_text())
    assert [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)] == [declared]


def test_version_is_written_in_one_place_and_read_without_an_import() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "bdh_mlflow.__version__"}
    assigned = [node for node in ast.parse((PROJECT / "bdh_mlflow" / "__init__.py").read_text()).body if isinstance(node, ast.Assign)]
    assert [ast.literal_eval(node.value) for node in assigned] == [__version__]
    assert f"## {__version__}\n" in (PROJECT / "CHANGELOG.md").read_text()


def test_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, bdh_mlflow; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT).stdout.split()
    assert "bdh_mlflow" in loaded
    assert HEAVY & set(loaded) == set()


@pytest.mark.parametrize("entry", MLPROJECT["entry_points"])
def test_entry_points_call_commands_with_options_that_exist(entry: str) -> None:
    point = MLPROJECT["entry_points"][entry]
    assert point["command"].startswith("exec python -m bdh_mlflow "), "signals must reach Python"
    assert '"' not in point["command"], "MLflow quotes values itself"
    assert set(re.findall(r"{(\w+)}", point["command"])) == set(point["parameters"])
    _check(shlex.split(point["command"].removeprefix("exec python -m bdh_mlflow ")))


def test_gate_runs_the_test_command_of_the_readme() -> None:
    assert "<!-- command: test -->" in (PROJECT / "README.md").read_text()
    assert "<!-- command: test -->" in (PROJECT / ".ci" / "run").read_text()


def test_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= README_LINES


@each_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)) if not link.startswith(("http:", "https:"))]
    dead = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    assert dead == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\(([^)\s#]+)", (PROJECT / "README.md").read_text())
    assert [page.name for page in PAGES[1:] if page.relative_to(PROJECT).as_posix() not in linked] == []
    pictures = {name for page in PAGES for name in re.findall(r"([\w-]+\.png)\)", page.read_text())}
    assert {picture.name for picture in (PROJECT / "docs").glob("*.png")} == pictures


@each_page
def test_paths_named_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, OURS))})/[\w./-]*\w/?)", page.read_text())
    assert [path for path in named if not (PROJECT / path).exists()] == []


def test_architecture_has_a_line_for_every_module() -> None:
    tree = re.search(r"^```text\nbdh_mlflow/\n(.*?)^```", (PROJECT / "docs" / "architecture.md").read_text(), re.M | re.S)
    assert tree is not None
    described, wing = set(), ""
    for indent, name in re.findall(r"^( +)([\w./]+)", tree[1], re.M):
        wing = name if name.endswith("/") else wing if len(indent) > 2 else ""
        described |= set() if name.endswith("/") else {f"{wing}{name}"}
    package = PROJECT / "bdh_mlflow"
    modules = {file.relative_to(package).as_posix() for file in package.rglob("*.py")}
    assert described == {name for name in modules if not re.fullmatch(r"\w+/__init__\.py", name)}


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in _commands(page, "bdh-mlflow"):
        _check(words)


@each_page
def test_mlflow_run_gives_parameters_that_exist(page: Path) -> None:
    for words in _commands(page, "mlflow run"):
        entry = words[words.index("-e") + 1] if "-e" in words else "main"
        declared = MLPROJECT["entry_points"][entry]["parameters"]
        given = [words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "-P"]
        assert [name for name in given if name not in declared and name not in {*SETTINGS, "section.key"}] == [], words


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_settings_named_exist(page: Path) -> None:
    """In CHANGELOG.md they may be former ones."""
    sections = "|".join(sorted({key.partition(".")[0] for key in SETTINGS}))
    named = re.findall(rf"`((?:{sections})\.(?!py|yaml)[a-z_0-9]+\b)(?!\()", page.read_text())
    assert [name for name in named if name not in SETTINGS] == []


@each_page
def test_drawings_are_closed_and_quoted(page: Path) -> None:
    drawings = re.findall(r"^```mermaid\n(.*?)^```", page.read_text(), re.M | re.S)
    for drawing in drawings:
        lines = drawing.splitlines()
        assert re.fullmatch(r"flowchart (LR|TB|BT)", lines[0])
        assert sum(line.split()[0] == "subgraph" for line in lines) == sum(line.strip() == "end" for line in lines)
        bare = re.sub(r'"[^"]*"', '""', drawing)
        assert re.findall(r'[^\s\w\[\](){}<>"|.;=:+-]', bare) == [], "labels with other characters are quoted"


def test_quickstart_is_small_and_uses_the_documented_4bit_default() -> None:
    config = Config.from_yaml(PROJECT / "configs" / "quickstart.yaml")
    assert config.low_precision.use_4bit
    assert 3 * config.model.mlp_internal_dim_multiplier * config.model.n_embd**2 < 1e6


def _prose(page: Path) -> str:
    """Without blocks and spans of code, where brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: Path, program: str) -> Iterator[list[str]]:
    """Words after the program's name, in code blocks and spans."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|text)\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        if found := re.search(rf"(?:^|&& |: +){program} (.+)", re.sub(r"\s+# .*", "", line)):
            yield shlex.split(found[1])


def _check(words: list[str]) -> None:
    """A command of ours exists with the options given."""
    command: click.Command = cli
    path: list[str] = []
    while isinstance(command, click.Group):
        if not words or not re.match(r"[a-z]", words[0]):
            return  # the group itself
        path, words = [*path, words[0]], words[1:]
        assert path[-1] in command.commands, f"no command `{' '.join(path)}`"
        command = command.commands[path[-1]]
    options = {
        name for parameter in command.params if isinstance(parameter, click.Option) for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in options] == [], " ".join(path)
    settings = [words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "--set"]
    assert [key for key in settings if key not in {*SETTINGS, "section.key"}] == [], " ".join(path)


if __name__ == "__main__":
    for made in tables():
        made.rewrite()
