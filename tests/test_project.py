"""What stands beside the package: MLproject, conda.yaml, README, shipped configurations."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mlflow.projects import _project_spec

from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import INCOMPATIBLE, Config, documentation

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text()


def test_conda_yaml_lists_the_dependencies_of_the_package() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    conda = yaml.safe_load((PROJECT / "conda.yaml").read_text())
    assert [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)] == [declared]


@pytest.mark.parametrize("entry", ["main", "sweep", "prepare_data", "evaluate", "generate", "compare"])
def test_entry_points_call_verbs_with_options_that_exist(entry: str) -> None:
    project = _project_spec.load_project(str(PROJECT))
    point = project.get_entry_point(entry)
    values = {name: parameter.default or "a b" for name, parameter in point.parameters.items()}
    command = point.compute_command(values, None)
    words = command.removeprefix("exec python -m bdh_mlflow ").split(" --")
    assert command.startswith("exec python -m bdh_mlflow "), "signals must reach Python"
    assert '"' not in point.command, "MLflow quotes values itself"
    verb = words[0].split()
    path = verb[:2] if verb[0] in ("data", "checkpoints", "config") else verb[:1]
    described = CliRunner().invoke(cli, [*path, "--help"])
    assert described.exit_code == 0
    for option in words[1:]:
        assert f"--{option.split()[0]} " in described.output, option


def test_readme_table_of_settings_is_the_configuration() -> None:
    table = re.search(r"<!-- settings:.*?-->\n(.*?)<!-- end of settings -->", README, re.S)
    assert table is not None
    assert table[1] == settings_table()


def settings_table() -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = [f"| `{key}` | {cell(default)} | {cell(accepted)} | {cell(meaning)} |" for key, default, accepted, meaning in documentation()]
    return "\n".join(["| setting | default | accepted | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def test_readme_table_of_clashes_is_the_configurations() -> None:
    table = re.search(r"<!-- clashes:.*?-->\n(.*?)<!-- end of clashes -->", README, re.S)
    assert table is not None

    def word(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    rows = []
    for c in INCOMPATIBLE:
        first, *others = (word(v) for v in c.values)
        values = ", ".join([f"`{c.other}: {first}`", *(f"`{v}`" for v in others)])
        rows.append(f"| `{c.key}: {word(c.value)}` | {values} | {c.remedy} |")
    assert table[1].splitlines()[2:] == rows


def test_gate_runs_the_test_command_of_the_readme() -> None:
    assert "<!-- command: test -->" in README
    assert "<!-- command: test -->" in (PROJECT / ".ci" / "run").read_text()


def test_pictures_and_files_named_in_the_readme_exist() -> None:
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README) + re.findall(r"(?:configs|benchmarks)/\w+\.(?:yaml|py)", README)
    assert named
    assert [name for name in named if not (PROJECT / name).is_file()] == []


def test_every_bdh_mlflow_command_in_the_readme_exists() -> None:
    commands = re.findall(r"^bdh-mlflow ([^#\n]+)", README, re.M)
    assert len(commands) >= 8
    for command in commands:
        words = command.split()
        path = words[:2] if words[0] in ("data", "checkpoints", "config") else words[:1]
        described = CliRunner().invoke(cli, [*path, "--help"])
        assert described.exit_code == 0, command
        for option in re.findall(r"--[\w-]+", command):
            assert option in described.output, (command, option)


def test_quickstart_is_small_and_uses_the_documented_4bit_default() -> None:
    config = Config.from_yaml(PROJECT / "configs" / "quickstart.yaml")
    assert config.low_precision.use_4bit
    assert 3 * config.model.mlp_internal_dim_multiplier * config.model.n_embd**2 < 1e6
