"""What commands share: lines to paste that work, and a configuration that is optional where only places matter."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bdh_mlflow.cli.common import DEFAULT_CONFIG, Launch, read_config
from bdh_mlflow.errors import ConfigError

VALUES = {"resume": "latest", "training.compile": True, "scheduler.decay_steps": None, "tracking.run_name": "it's"}


def test_line_to_type_starts_training_the_way_this_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    words = shlex.split(Launch.of_this_process().train("my configs/a.yaml", VALUES, "two words"))
    assert words[:6] == ["bdh-mlflow", "train", "--config", "my configs/a.yaml", "--resume", "latest"]
    assert words[6:] == ["--set", "training.compile=true", "--set", "scheduler.decay_steps=null", "--set", "tracking.run_name=it's"]
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert Launch.of_this_process().project is None, "the variable alone is no `mlflow run`: there is no project here"
    under = shlex.split(Launch("../my project", "uv").train("my configs/a.yaml", VALUES, "two words"))
    assert under[:7] == ["mlflow", "run", "../my project", "--env-manager", "uv", "--experiment-name", "two words"]
    assert under[7:] == [
        "-P", "config=my configs/a.yaml", "-P", "resume=latest", "-P", "training.compile=true", "-P", "scheduler.decay_steps=null",
        "-P", "tracking.run_name=it's",
    ]  # fmt: skip


def test_project_is_named_as_seen_from_the_folder_of_whoever_typed_mlflow_run(tmp_path: Path) -> None:
    """`mlflow run /a/project` starts the command in /a/project, while its user stays elsewhere."""
    code = "from bdh_mlflow.cli.common import Launch; print(Launch.of_this_process())"
    environment = {**os.environ, "MLFLOW_RUN_ID": "0" * 32}
    project_folder = tmp_path / "project"
    project_folder.mkdir()
    for folder in (tmp_path, project_folder):
        (folder / "MLproject").touch()
    for folder, project in ((project_folder, str(project_folder)), (Path.cwd(), ".")):
        seen = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        assert seen == f"Launch(project={project!r}, env_manager='local', nodes=0, processes=0)\n"


@pytest.mark.parametrize(
    ("made_by", "name"), [("conda-meta", "conda"), ("uv = 0.9", "uv"), ("version = 3.11", "virtualenv"), ("", "local")]
)
def test_environment_manager_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_by: str, name: str) -> None:
    prefix = tmp_path / ("mlflow-" + "0a" * 20 if made_by else "venv")
    prefix.mkdir()
    if made_by == "conda-meta":
        (prefix / made_by).mkdir()
    else:
        (prefix / "pyvenv.cfg").write_text(f"home = /usr\n{made_by}\n")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    Path("MLproject").touch()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert Launch.of_this_process().env_manager == name


def test_commands_that_only_look_need_no_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config(DEFAULT_CONFIG).training.checkpoint_dir == str(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"other\.yaml: no such file"):
        read_config("other.yaml")
