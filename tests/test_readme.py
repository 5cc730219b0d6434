"""The pages as a user follows them: the commands of their shell blocks, page after page, in one folder, on a tiny network.

One tour, because most commands need what earlier ones have made: a run, a checkpoint, an exported file, a registered model, a server.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient

from bdh_mlflow.cli.main import cli
from scripts.servers import free_port, serving, wait_until_healthy
from tests.conftest import TINY, documents, thread_sender, write_shards

PROJECT = Path(__file__).parent.parent
ORDER = (
    "README",
    "docs/resume",
    "docs/inference",
    "docs/analysis",
    "docs/studies",
    "docs/low-precision",
    "docs/settings",
    "docs/cluster",
    "docs/data",
    "docs/tracking",
)
"""Pages with shell blocks. tracking comes last: from there on, runs go to another server."""
SET_UP = re.compile(r"python3 -m venv .* && ")  # `.ci/run` does that
NOT_HERE = {
    "the tests themselves": re.compile(r".*pytest -q"),
    "Transformer Engine is compiled against a CUDA torch": re.compile(r"pip install torch==2.13.0 && pip install --no-build-isolation"),
}
if not shutil.which("curl"):
    NOT_HERE["no curl on this machine"] = re.compile("curl ")
FP8 = "low_precision.use_fp8=true"  # refused with the reason, on a machine without such a GPU
TIMEOUT_S = 300
SERVERS = ("mlflow ui", "mlflow models serve")
SMALLER = {
    "training.max_iters=6000": "training.max_iters=9",
    "training.max_iters=5000": "training.max_iters=9",
    "-P trials=12": "-P trials=2",
    "--size 4096": "--size 270",
    "--steps 40 --interruptions 5": "--steps 6 --interruptions 1",
    "` < 2'": "` < 9'",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> list[str]:
    """Lines of the pages' shell blocks, without their comments."""
    pages = [PROJECT / f"{name}.md" for name in ORDER]
    lines = [re.sub(r"\s+# .*", "", line).strip() for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    return [SET_UP.sub("", line) for line in lines]


def test_every_page_with_shell_blocks_is_on_the_tour() -> None:
    pages = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    assert {page for page in pages if blocks(page, "bash")} == {PROJECT / f"{name}.md" for name in ORDER}


@pytest.mark.slow  # two minutes: every command on the pages runs as printed
def test_commands_of_the_pages_run_in_their_order(
    store: MlflowClient, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _project(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    tour = commands()
    assert len(tour) >= 30
    assert [name for name in SMALLER if not any(name in command for command in tour)] == []
    assert [why for why, line in NOT_HERE.items() if not any(line.match(command) for command in tour)] == []
    (endings,) = blocks(PROJECT / "README.md", "text")
    labels = re.findall(r"^(\w[\w ]*):", endings, re.M)
    assert len(labels) == 4
    with contextlib.ExitStack() as servers:
        ports: dict[str, int] = {}
        for command in tour:
            if any(line.match(command) for line in NOT_HERE.values()):
                continue
            words = _filled_in(command, store, ports)
            if command.startswith(SERVERS):
                served = _served(words, ports)
                if command == "mlflow ui":  # its ten processes beside all that follows would take most of the time
                    with served:
                        continue
                servers.enter_context(served)
            elif command.startswith("export "):
                server = servers.enter_context(serving(empty_store, tmp_path / "server"))
                monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            else:
                code, output = _run(words)
                refused = FP8 in command and code == 2 and "low_precision.use_fp8" in output
                assert code == 0 or refused, f"{command}\n{output}"
                assert words[0] != "curl" or json.loads(output)["predictions"][0], output
                assert command != tour[0] or [label for label in labels if f"\n{label}:" not in output] == [], output
        remote = server.client.search_runs([server.client.get_experiment_by_name("bdh").experiment_id])
    assert [run.info.status for run in remote] == ["FINISHED"]
    assert {p.name for p in tmp_path.glob("compare*")} >= {"compare.html", "compare_val_loss.png"}
    runs = store.search_runs([store.get_experiment_by_name("bdh").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [run.data.tags["bdh.segment"] for run in runs if "bdh.resumed_from" in run.data.tags] == ["2", "2"]
    assert any(key.startswith("eval/other_") for run in runs for key in run.data.metrics)
    assert store.get_model_version_by_alias("bdh", "champion").version == 1


def _project(folder: Path) -> None:
    """Make a folder that `mlflow run .` accepts, with the shipped names but a tiny network and little text."""
    for name in ("MLproject", "conda.yaml", "README.md"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(PROJECT / "configs", folder / "configs")
    low_precision = {**TINY["low_precision"], "use_4bit": True}
    for name in ("config", "quickstart"):
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, "low_precision": low_precision}))
    sweep = yaml.safe_load((folder / "configs" / "sweep.yaml").read_text())
    sweep["settings"] = {"training.max_iters": 4}
    (folder / "configs" / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    write_shards(folder / "text", documents(80))
    write_shards(folder / "data" / "other", documents(80, seed=1))
    write_shards(folder / "data" / "python-stdlib", documents(80, seed=3))
    (folder / "corpus").mkdir()
    for number, document in enumerate(documents(200, seed=2)):
        (folder / "corpus" / f"{number}.txt").write_text(document)


def _filled_in(command: str, store: MlflowClient, ports: dict[str, int]) -> list[str]:
    """A command's words, its placeholders replaced."""
    found = store.get_experiment_by_name("bdh")
    runs = store.search_runs([found.experiment_id], "params.`training.seed` != ''") if found else []
    for run in runs[:2] * ("<run>" in command):
        command = command.replace("<run>", run.info.run_id, 1)
    if "<run id>" in command:
        command = command.replace("<run id>", runs[0].info.run_id)
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    for exported in Path("checkpoints").glob("*/*.4bit.safetensors"):
        command = re.sub(r"checkpoints/run_\.\.\./\S+\.4bit\.safetensors", str(exported), command)
    for port, taken in ports.items():
        command = command.replace(port, str(taken))
    assert "<" not in re.sub(r"'[^']*'", "", command), command
    return [str(Path(word).expanduser()) if word.startswith("~/") else word for word in shlex.split(command)]


def _run(words: list[str]) -> tuple[int, str]:
    """Exit code and output. Our own commands run in this process, which saves the seconds of their start."""
    if words[0] == "bdh-mlflow":
        result = CliRunner().invoke(cli, words[1:], input="def \n", obj=thread_sender)
        return result.exit_code, f"{result.output}\n{result.exception!r}"
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    if words[0] == "curl":
        return done.returncode, done.stdout
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def _served(words: list[str], ports: dict[str, int]) -> Iterator[None]:
    """An MLflow server on a free port, at which later commands find it."""
    named = words[words.index("--port") + 1] if "--port" in words else None
    port = free_port()
    ports |= {named: port} if named else {}
    command = [str(port) if word == named else word for word in words] + ([] if named else ["--port", str(port)])
    with Path(f"server-{port}.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_healthy(port, server, Path(f"server-{port}.log"))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
