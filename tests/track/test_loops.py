"""The three loops against a real server: every way in which they end, and what has arrived.

Slow: each is a program that imports its trainer. It is the promise of the module, by processes, signals and kills.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from bdh_mlflow import checkpoint, track
from scripts.servers import Server, serving
from tests.conftest import wait_for
from tests.test_structure import PROJECT
from tests.track.loops import AT, EVERY, STEPS
from tests.track.runs import points

pytestmark = pytest.mark.slow
NEEDED: dict[str, tuple[str, ...]] = {"plain": (), "huggingface": ("transformers", "accelerate"), "lightning": ("lightning",)}
STACKS = tuple(NEEDED)
each_stack = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(empty_store, tmp_path_factory.mktemp("server")) as started:
        yield started


def skip_without(stack: str) -> None:
    """Skip a test whose trainer is not installed."""
    missing = [name for name in NEEDED[stack] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the extra `{stack}` is not installed ({', '.join(missing)})")


def run_loop(stack: str, event: str, uri: str, resume: str = "", processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The program in the current folder, by so many processes."""
    skip_without(stack)
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1", "DEVICES": str(processes),
    }  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 and stack == "huggingface" else []
    command = [sys.executable, *launcher, "-m", "tests.track.loops", stack, event, *([resume] if resume else [])]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """Runs, the newest first."""
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"])) if found else []


def last_run(client: MlflowClient, experiment: str) -> Run:
    return runs_of(client, experiment)[0]


def mirrored(client: MlflowClient, run: Run, folder: Path) -> list[int]:
    """Steps of the mirrored checkpoints, each of which is downloaded and verified."""
    place = f"checkpoints/{run.data.tags['bdh.run_dir']}"
    there = Path(client.download_artifacts(run.info.run_id, place, str(folder)))
    found = checkpoint.list_run(there)
    assert found.rejected == ()
    for each in found.checkpoints:
        checkpoint.verify(each)
    return [each.manifest.step for each in found.checkpoints]


def steps(stack: str, last: int) -> list[int]:
    """Of the curve `loss`: Lightning counts from 0."""
    return [step - (stack == "lightning") for step in range(1, last + 1)]


@each_stack
def test_a_loop_that_fails_is_failed_and_goes_on_to_its_end(server: Server, tmp_path: Path, stack: str) -> None:
    done = run_loop(stack, "exception", server.uri)
    assert done.returncode == 1, done.stderr
    failed = last_run(server.client, stack)
    assert (failed.info.status, failed.data.tags["bdh.stop_reason"]) == ("FAILED", "RuntimeError"), done.stderr
    assert failed.data.tags["bdh.stop_message"] == "no such layer"
    assert [step for step, _ in points(server.client, failed.info.run_id, "loss")] == steps(stack, AT - (stack == "lightning"))
    assert mirrored(server.client, failed, tmp_path) == [10, 20]
    done = run_loop(stack, "none", server.uri, failed.info.run_id)
    assert done.returncode == 0, done.stderr
    finished = last_run(server.client, stack)
    assert (finished.info.run_id, finished.info.status) == (failed.info.run_id, "FINISHED")
    assert finished.data.tags["bdh.stop_reason"] == "finished"
    assert [step for step, _ in points(server.client, finished.info.run_id, "loss")] == steps(stack, STEPS), "each once"
    assert mirrored(server.client, finished, tmp_path / "again") == [10, 20, 30, 40]
    assert finished.data.tags["bdh.latest_checkpoint"].endswith("/checkpoint_40")


@each_stack
def test_a_scheduler_that_ends_it_finds_it_killed(server: Server, tmp_path: Path, stack: str) -> None:
    done = run_loop(stack, "SIGTERM", server.uri)
    killed = last_run(server.client, stack)
    assert (killed.info.status, killed.data.tags["bdh.stop_reason"]) == ("KILLED", "SIGTERM"), done.stderr
    logged = [step for step, _ in points(server.client, killed.info.run_id, "loss")]
    assert logged == steps(stack, len(logged))
    assert len(logged) >= AT - 1
    if stack == "lightning":  # ends by an exception of its own, with code 0, and saves nothing
        assert (done.returncode, mirrored(server.client, killed, tmp_path)) == (0, [10, 20])
    else:
        assert (done.returncode, mirrored(server.client, killed, tmp_path)) == (-signal.SIGTERM, [10, 20, len(logged)])


@each_stack
def test_a_kill_loses_nothing_that_was_logged(server: Server, tmp_path: Path, stack: str) -> None:
    assert run_loop(stack, "SIGKILL", server.uri).returncode == -signal.SIGKILL
    killed = last_run(server.client, stack)
    run_id = killed.info.run_id
    wait_for(lambda: server.client.get_run(run_id).info.status != "RUNNING")  # its sender lives on, and delivers
    killed = server.client.get_run(run_id)
    assert (killed.info.status, killed.data.tags["bdh.stop_reason"]) == ("KILLED", "killed")
    logged = [step for step, _ in points(server.client, killed.info.run_id, "loss")]
    assert logged == steps(stack, AT - (stack == "lightning"))
    assert killed.data.tags["bdh.stop_step"] == str(logged[-1])
    assert 10 in mirrored(server.client, killed, tmp_path)
    done = run_loop(stack, "none", server.uri, "latest")
    assert done.returncode == 0, done.stderr
    finished = server.client.get_run(killed.info.run_id)
    assert finished.info.status == "FINISHED", done.stderr
    assert [step for step, _ in points(server.client, finished.info.run_id, "loss")] == steps(stack, STEPS), "each once"


@each_stack
def test_a_server_that_is_gone_gets_everything_later(empty_store: Path, tmp_path: Path, stack: str) -> None:
    (tmp_path / "home").mkdir()
    with serving(empty_store, tmp_path / "home") as server:
        with watching(tmp_path, server):
            done = run_loop(stack, "none", server.uri)
        assert done.returncode == 0, done.stderr
        assert "records wait in checkpoints/" in done.stderr
        server.start()
        assert track.sync(note=lambda text: None) == 0
        run = last_run(server.client, stack)
        assert run.info.status == "FINISHED"
        assert [step for step, _ in points(server.client, run.info.run_id, "loss")] == steps(stack, STEPS), "each once"
        assert mirrored(server.client, run, tmp_path / "there") == list(range(EVERY, STEPS + 1, EVERY))


@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != "plain"])
def test_a_group_of_processes_is_one_run_and_goes_on_where_nothing_of_it_is(server: Server, tmp_path: Path, stack: str) -> None:
    before = len(runs_of(server.client, stack))
    done = run_loop(stack, "exception", server.uri, processes=2)
    assert done.returncode == 1, done.stderr
    failed = last_run(server.client, stack)
    assert (failed.info.status, failed.data.tags["bdh.stop_reason"]) == ("FAILED", "RuntimeError"), done.stderr
    assert mirrored(server.client, failed, tmp_path) == [10, 20]
    for folder in ("checkpoints", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    done = run_loop(stack, "none", server.uri, failed.info.run_id, processes=2)
    assert done.returncode == 0, done.stderr
    finished = server.client.get_run(failed.info.run_id)
    assert finished.info.status == "FINISHED", done.stderr
    assert len(runs_of(server.client, stack)) == before + 1
    assert [step for step, _ in points(server.client, finished.info.run_id, "loss")] == steps(stack, STEPS), "each once, by one process"
    assert mirrored(server.client, finished, tmp_path / "again") == [10, 20, 30, 40]


@contextlib.contextmanager
def watching(folder: Path, server: Server) -> Iterator[None]:
    """Kill a server as soon as a loop in a folder has saved its second checkpoint."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and len(list(folder.glob("checkpoints/run_*/checkpoint_*.json"))) < 2:
            time.sleep(0.001)
        server.signal(signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
