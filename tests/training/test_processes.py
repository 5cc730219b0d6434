"""Several processes that train one run through the command line: what they leave is what one process leaves."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient

from bdh_mlflow import checkpoint, host
from bdh_mlflow.checkpoint import BackgroundWriter, RunDirectory
from bdh_mlflow.distributed import Group
from bdh_mlflow.errors import BdhError, ConfigError, InputError
from bdh_mlflow.tracking.tracker import Tracker
from bdh_mlflow.training import build, processes
from bdh_mlflow.training.agreement import refuse_differences
from bdh_mlflow.training.evaluate import Evaluator
from tests.conftest import history, only_run, run_cli, tiny_config
from tests.groups import in_group
from tests.training.together import FSDP, Left, at_step, curves, digests, end, followers, train

pytestmark = [
    pytest.mark.slow,  # each process that is started imports torch, three seconds of a core
    pytest.mark.usefixtures("text"),
]


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_leaves_the_same_files_and_curves(store: MlflowClient, four: Path, alone: Left, count: int) -> None:
    before = set(psutil.Process().children())  # of other tests: multiprocessing leaves its resource tracker
    result = train(four, count)
    assert result.exit_code == 0, result.output
    assert (digests(), curves(store)) == alone
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.processes"], run.data.tags["bdh.threads"]) == ("FINISHED", str(count), "1")
    assert run.data.tags["bdh.reduction"] == "tree over the passes"
    assert {"perf/slowest_rank", "perf/step_ms_min"} <= run.data.metrics.keys()
    assert f"{count} processes on " in result.output
    assert f"--processes {count}" in result.output, "the line to type next starts as many"
    assert set(psutil.Process().children()) <= before, "none is left"


def test_another_number_of_processes_resumes_exactly(store: MlflowClient, four: Path, alone: Left) -> None:
    for count, last in ((4, 2), (1, 4), (2, 6)):
        words = "--set", f"training.max_iters={last}", "--set", "scheduler.decay_steps=6"
        result = train(four, count, *words, *(("--resume", "latest") if count < 4 else ()))
        assert result.exit_code == 0, result.output
    files, own = alone
    assert digests()["checkpoint_6.pt"] == files["checkpoint_6.pt"]
    assert curves(store)["train/loss"] == own["train/loss"]
    assert max(value for _, value in history(store, only_run(store).info.run_id, "resume/replay_max_abs_diff") or [(0, 0.0)]) == 0


def test_a_signal_to_another_rank_ends_all_with_a_checkpoint(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(1, end(signal.SIGTERM), monkeypatch)
    result = train(four, 2)
    assert result.exit_code == 143, result.output
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.stop_reason"]) == ("KILLED", "SIGTERM")
    steps = [int(re.sub(r"\D", "", name)) for name in digests()]
    assert len(steps) == 1
    assert steps[0] in (2, 3), "within an update"
    assert not followers()


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_last_step(
    store: MlflowClient, four: Path, alone: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(1, end(signal.SIGKILL), monkeypatch)
    result = train(four, 2)
    assert result.exit_code == 1
    assert re.search(r"Error: rank 1 \(.+\) was killed by SIGKILL\n", result.output), result.output
    assert only_run(store).info.status == "FAILED"
    assert list(digests()) == ["checkpoint_1.pt"], "the state after the last update is good"
    assert train(four, 1, "--resume", "latest").exit_code == 0
    assert curves(store) == alone[1]
    assert only_run(store).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [
        (build, "open_together", []),
        (Evaluator, "loss", ["checkpoint_3.pt"]),
        (BackgroundWriter, "save", ["checkpoint_3.pt"]),
    ],
    ids=["load", "evaluation", "save"],
)
def test_a_rank_that_dies_in_any_phase_ends_all(
    store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, left: list[str]
) -> None:
    real, done = getattr(owner, name), threading.Event()

    def wrapped(*given: Any, **named: Any) -> Any:
        if not done.is_set():
            done.set()
            end(signal.SIGKILL)()
        return real(*given, **named)

    monkeypatch.setattr(owner, name, wrapped)
    result = train(four, 2)
    assert result.exit_code == 1
    assert re.search(r"Error: rank 1 \(.+\) was killed by SIGKILL\n", result.output), result.output
    assert result.output.count("Error") == 1
    assert left == (list(digests()) if left else [p.name for p in Path("checkpoints").glob("*")])
    if left:
        assert only_run(store).info.status == "FAILED"


def test_a_rank_that_dies_at_the_end_costs_nothing(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tracker.close

    def close(*given: Any, **named: Any) -> Any:
        for follower in followers():
            follower.kill()
        return real(*given, **named)

    monkeypatch.setattr(Tracker, "close", close)
    assert train(four, 2).exit_code == 0
    assert only_run(store).info.status == "FINISHED"


def test_more_processes_than_gpus_are_refused(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on a machine with one GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes need 2 GPUs; this machine has 1: start 1 processes on it"), processes.started(2):
        pass


@pytest.mark.parametrize(("what", "value"), [("torch", "2.12.0"), ("bdh-mlflow", "0.1.0")])
def test_ranks_with_other_libraries_are_refused_with_both_values(what: str, value: str) -> None:
    def body(world: Group) -> None:
        own = host.versions()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "versions", lambda: {**own, what: value} if world.rank == 1 else own)
            refuse_differences(tiny_config(), world)

    for error in in_group(2, body):
        assert isinstance(error, InputError)
        assert re.search(rf"version of {what}: {re.escape(host.versions()[what])} for rank 0 \(.+\), {value} for rank 1 \(", str(error))


def test_a_sweep_trains_each_trial_with_several_processes(store: MlflowClient, four: Path) -> None:
    Path("space.yaml").write_text(yaml.safe_dump({"study": "s", "parameters": {"training.learning_rate": {"choices": [0.001, 0.01]}}}))
    result = run_cli("sweep", "--config", str(four), "--space", "space.yaml", "--trials", "2", "--processes", "2")
    assert result.exit_code == 0, result.output
    runs = store.search_runs([store.get_experiment_by_name("bdh").experiment_id], "tags.`bdh.processes` = '2'")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]


def test_a_stopped_rank_is_named_within_the_patience(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(1, end(signal.SIGSTOP), monkeypatch)
    started = time.monotonic()
    result = train(four, 2, "--patience", "2")
    assert result.exit_code == 1
    assert re.search(r"Error: rank 1 \(.+\) did not answer within 2 s", result.output), result.output
    assert time.monotonic() - started < 40
    assert not followers(), "a stopped process is killed as well"


def test_bad_data_of_one_rank_is_one_message(store: MlflowClient, text: Path, four: Path) -> None:
    """A file that goes bad while it is read: of whichever rank comes to it first."""
    part = text / "part-1.parquet"

    def spoil() -> None:
        part.write_bytes(b"PAR1" + part.read_bytes()[4:-200] + bytes(200))

    with pytest.MonkeyPatch.context() as patch:
        at_step(0, spoil, patch)
        result = train(four, 2, "--set", "training.max_iters=200", "--set", "dataset.max_cached_files=1")
    assert result.exit_code == 1, result.output
    assert result.output.count("part-1.parquet") == 1, result.output
    assert only_run(store).info.status == "FAILED"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--processes", "3"), "4 passes an update cannot be divided among 3 processes"),
        (("--processes", "3"), "as it is, 1 or 2 or 4 processes can train it"),
        (("--processes", "0"), "0 is not in the range x>=1"),
        (("--processes", "two"), "'two' is not a valid integer"),
        (("--processes", "2", "--set", "low_precision.use_fp8=true", "--set", "fp8.emulate=true"), "cannot be combined with 2 processes"),
        (("--processes", "2", "--resume", "nowhere"), "nowhere"),
        (("--processes", "2", "--set", "dataset.parquet_dir=missing"), "missing"),
        (("--processes", "2", "--set", "training.checkpoint_dir=four.yaml/x"), "four.yaml is not a folder"),
        (("--processes", "2", *FSDP, "--set", "low_precision.use_4bit=true"), "cannot be combined with training.strategy"),
    ],
)
def test_what_several_processes_cannot_do_is_one_error_and_leaves_nothing(four: Path, words: tuple[str, ...], message: str) -> None:
    result = run_cli("train", "--config", str(four), *words)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("Error") == 1, result.output
    assert not Path("checkpoints").exists()
    assert not followers()


def test_the_way_out_keeps_the_tokens_of_an_update(four: Path) -> None:
    result = train(four, 2, "--set", "training.gradient_accumulation_steps=1")
    assert "training.batch_size 1, training.gradient_accumulation_steps 2 keeps 16 tokens an update" in result.output
    words = "--set", "training.gradient_accumulation_steps=2", "--set", "training.batch_size=1", "--set", "training.max_iters=1"
    assert train(four, 2, *words).exit_code == 0


def test_no_process_outlives_a_killed_rank_0(store: MlflowClient, four: Path, tmp_path: Path) -> None:
    """Killed while the others start, and in the loop: nothing is left that would wait for it."""
    for begun in (False, True):
        out = tmp_path / f"{begun}.txt"
        with out.open("w") as file:
            words = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(four), "--processes", "2", "--training.max_iters", "9999"]
            job = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        others: list[psutil.Process] = []
        while not others or (begun and "step 1/" not in out.read_text()):
            assert time.monotonic() < until, out.read_text()
            others = followers(job.pid)
            time.sleep(0.02)
        job.kill()
        job.wait()
        _, alive = psutil.wait_procs(others, timeout=15)
        assert not alive


DIES = "import os, pathlib, signal, sys; pathlib.Path(sys.argv[1], 'started-1').touch(); os.kill(os.getpid(), signal.SIGKILL)"


def test_a_rank_that_dies_while_the_others_connect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch alone would wait for it, in compiled code that no signal ends, for as long as for a rank that prepares data: a day."""
    monkeypatch.setattr(host, "python_module", lambda name, *words: [sys.executable, "-c", DIES, *words])
    monkeypatch.setattr(processes, "CONNECTING_S", 2.0)
    words = "rank 1 was killed by SIGKILL before it could meet the others"
    with pytest.raises(BdhError, match=words), processes.started(2):
        pass
    assert not torch.distributed.is_initialized()


def test_a_run_that_another_job_trains_is_refused(store: MlflowClient, four: Path) -> None:
    assert train(four, 1, "--training.max_iters", "3").exit_code == 0
    (folder,) = checkpoint.list_all(Path("checkpoints"))
    held = RunDirectory(folder, {"config.yaml": (folder / "config.yaml").read_bytes()})
    try:
        result = train(four, 2, "--resume", "latest")
    finally:
        held.close()
    assert result.exit_code == 2
    assert result.output.count("another process is training this run; stop it first") == 1
    assert not followers()
