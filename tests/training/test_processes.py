"""Several processes that train one run through the command line: what they leave is what one process leaves."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from click.testing import Result
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import RunDirectory
from bdh_mlflow.training import passes, processes
from tests.conftest import TINY, documents, history, only_run, run_cli, write_shards

PASSES = 4
FSDP = ("--set", "training.strategy=fsdp")
Left = tuple[dict[str, str], dict[str, list[tuple[int, float]]]]  # sha256 of checkpoints, and curves
CURVES = ("train/loss", "val/loss", "optim/grad_norm", "progress/tokens_seen", "progress/epoch", "bdh/active_x_l0", "bdh/dead_xy_l1")
pytestmark = [
    pytest.mark.slow,  # each process that is started imports torch, three seconds of a core
    pytest.mark.usefixtures("text"),
]


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """The tiny configuration with four passes an update, and an odd number of validation batches."""
    path = tmp_path / "four.yaml"
    training = {**TINY["training"], "gradient_accumulation_steps": PASSES, "test_iters": 3}
    path.write_text(yaml.safe_dump({**TINY, "training": training}))
    return path


def train(config: Path, count: int, *words: str) -> Result:
    return run_cli("train", "--config", str(config), "--processes", str(count), *words)


def digests() -> dict[str, str]:
    """sha256 of the checkpoints of the one run here."""
    (folder,) = checkpoint.list_all(Path("checkpoints"))
    return {c.path.name: c.manifest.files[0].sha256 for c in checkpoint.list_run(folder).checkpoints}


def curves(store: MlflowClient) -> dict[str, list[tuple[int, float]]]:
    run = only_run(store)
    return {key: history(store, run.info.run_id, key) for key in CURVES}


@pytest.fixture
def alone(store: MlflowClient, four: Path) -> Left:
    """What one process leaves; its run is put away."""
    result = train(four, 1)
    assert result.exit_code == 0, result.output
    found = digests(), curves(store)
    put_away(store)
    return found


def put_away(store: MlflowClient) -> None:
    Path("checkpoints").rename(f"checkpoints-{time.monotonic_ns()}")
    store.delete_run(only_run(store).info.run_id)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_leaves_the_same_files_and_curves(store: MlflowClient, four: Path, alone: Left, count: int) -> None:
    result = train(four, count)
    assert result.exit_code == 0, result.output
    assert (digests(), curves(store)) == alone
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.processes"], run.data.tags["bdh.threads"]) == ("FINISHED", str(count), "1")
    assert run.data.tags["bdh.reduction"] == "tree over the passes"
    assert {"perf/slowest_rank", "perf/step_ms_min"} <= run.data.metrics.keys()
    assert f"{count} processes on " in result.output
    assert f"--processes {count}" in result.output, "the line to type next starts as many"
    assert not psutil.Process().children(), "none is left"


def test_another_number_of_processes_resumes_exactly(store: MlflowClient, four: Path, alone: Left) -> None:
    for count, last in ((4, 2), (1, 4), (2, 6)):
        words = "--set", f"training.max_iters={last}", "--set", "scheduler.decay_steps=6"
        result = train(four, count, *words, *(("--resume", "latest") if count < 4 else ()))
        assert result.exit_code == 0, result.output
    files, own = alone
    assert digests()["checkpoint_6.pt"] == files["checkpoint_6.pt"]
    assert curves(store)["train/loss"] == own["train/loss"]
    assert max(value for _, value in history(store, only_run(store).info.run_id, "resume/replay_max_abs_diff") or [(0, 0.0)]) == 0


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in rank 0, which is this process, in the update after `step`, once."""
    real, done = passes.seed_pass, threading.Event()

    def seed(seed: int, now: int, number: int) -> None:
        if now == step and not done.is_set():
            done.set()
            act()
        real(seed, now, number)

    monkeypatch.setattr(passes, "seed_pass", seed)


def followers(pid: int | None = None) -> list[psutil.Process]:
    """Processes that rank 0, this process or another one, has started and that live."""
    found = []
    for process in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            if processes.FOLLOWER in process.cmdline():
                found.append(process)
    return found


def end(*numbers: int) -> Callable[[], None]:
    """Send signals to the second process."""

    def act() -> None:
        (follower,) = followers()
        for number in numbers:
            follower.send_signal(number)

    return act


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


def test_a_run_that_another_job_trains_is_refused(store: MlflowClient, four: Path) -> None:
    assert train(four, 1, "--training.max_iters", "3").exit_code == 0
    (folder,) = checkpoint.list_all(Path("checkpoints"))
    held = RunDirectory(folder, (folder / "config.yaml").read_text())
    try:
        result = train(four, 2, "--resume", "latest")
    finally:
        held.close()
    assert result.exit_code == 2
    assert result.output.count("another process is training this run; stop it first") == 1
    assert not followers()


# ---- FSDP2


def state_of(step: int) -> dict[str, Any]:
    return checkpoint.load(next(Path("checkpoints").glob(f"run_*/checkpoint_{step}.pt")))


def relative_difference(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    assert [step for step, _ in one] == [step for step, _ in other]
    return max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(one, other, strict=True))


def test_fsdp_follows_ddp_within_rounding(store: MlflowClient, four: Path) -> None:
    words = [f"--training.{key}={value}" for key, value in (("max_iters", 100), ("test_freq", 50), ("checkpoint_freq", 100))]
    found = []
    for size, strategy in ((1, ()), (2, FSDP), (4, FSDP)):
        result = train(four, size, *words, *strategy)
        assert result.exit_code == 0, result.output
        found.append((curves(store), state_of(100), only_run(store).data.tags["bdh.strategy"]))
        put_away(store)
    (straight, whole, _), *others = found
    for size, (own, state, tag) in zip((2, 4), others, strict=True):
        assert tag == f"FSDP2, {size} shares"
        for key in ("train/loss", "val/loss"):
            assert relative_difference(straight[key], own[key]) <= 1e-6, key
        assert [value for _, value in own["bdh/active_x_l0"]] == pytest.approx(
            [value for _, value in straight["bdh/active_x_l0"]], abs=0.02
        )
        assert state.keys() == whole.keys()
        assert state["model_state_dict"].keys() == whole["model_state_dict"].keys()
        for name, weights in state["model_state_dict"].items():
            assert weights.shape == whole["model_state_dict"][name].shape
            assert type(weights) is torch.Tensor
        kept = state["optimizer_state_dict"]["state"]
        assert kept.keys() == whole["model_state_dict"].keys()
        assert all(sorted(each) == ["exp_avg", "exp_avg_sq", "step"] for each in kept.values())


def test_checkpoints_of_fsdp_and_ddp_interchange(store: MlflowClient, four: Path, alone: Left) -> None:
    for number, (size, last, strategy) in enumerate(((2, 2, FSDP), (1, 3, ()), (4, 5, FSDP), (2, 6, ()))):
        words = "--set", f"training.max_iters={last}", *strategy
        result = train(four, size, *words, *(("--resume", "latest") if number else ()))
        assert result.exit_code == 0, result.output
        if number:
            assert "gradients are summed in another order than in the segment before" in result.output
    losses = curves(store)["train/loss"]
    assert relative_difference(losses, alone[1]["train/loss"]) <= 1e-6


def test_fsdp_stops_at_a_signal_with_a_checkpoint(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(1, end(signal.SIGTERM), monkeypatch)
    result = train(four, 2, *FSDP)
    assert result.exit_code == 143, result.output
    assert len(digests()) == 1


def test_fsdp_ends_when_a_rank_is_killed(store: MlflowClient, four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(4, end(signal.SIGKILL), monkeypatch)
    result = train(four, 2, *FSDP)
    assert result.exit_code == 1
    assert re.search(r"Error: rank 1 \(.+\) was killed by SIGKILL\n", result.output), result.output
    assert list(digests()) == ["checkpoint_3.pt"], "a state that is spread over the processes is lost with one of them"


# ---- started by a launcher


class Launched:
    """Processes as a launcher starts them, each with its own arguments.   port: where they meet."""

    def __init__(self, config: Path, words: list[list[str]], port: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(words)), "GLOO_SOCKET_IFNAME": "lo"}
        self._jobs = [
            subprocess.Popen(
                [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(config), *own],
                env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, own in enumerate(words)
        ]

    def ended(self, count: int = 2) -> list[tuple[int, str]]:
        """Exit code and output of each, or of the first `count`."""
        try:
            outputs = [job.communicate(timeout=60)[0] for job in self._jobs[:count]]
        finally:
            for job in self._jobs:
                job.kill()
                job.communicate()
        return [(job.returncode, output) for job, output in zip(self._jobs, outputs, strict=False)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_processes_of_a_launcher_train_as_one_and_rank_0_alone_speaks(store: MlflowClient, four: Path, alone: Left) -> None:
    (code, output), (other_code, other_output) = Launched(four, [[], []], free_port()).ended()
    assert (code, other_code, other_output) == (0, 0, ""), output + other_output
    assert "Finished at step 6" in output
    assert (digests(), curves(store)) == alone


def test_a_rank_with_other_settings_is_refused_with_both_values(store: MlflowClient, four: Path) -> None:
    found = Launched(four, [[], ["--set", "training.learning_rate=0.5"]], free_port()).ended()
    assert [code for code, _ in found] == [2, 2]
    assert re.search(r"training.learning_rate: 0.001 for rank 0 \(.+\), 0.5 for rank 1 \(", found[0][1]), found[0][1]
    assert found[1][1] == ""
    assert not Path("checkpoints").exists()


def test_each_machine_has_its_text_and_checkpoints_where_it_likes(store: MlflowClient, text: Path, four: Path, alone: Left) -> None:
    shutil.copytree(text, "elsewhere/text")
    elsewhere = ["--set", "dataset.parquet_dir=elsewhere/text", "--set", "training.checkpoint_dir=elsewhere/checkpoints"]
    (code, output), (other_code, _) = Launched(four, [[], elsewhere], free_port()).ended()
    assert (code, other_code) == (0, 0), output
    assert (digests(), curves(store)) == alone
    assert not Path("elsewhere/checkpoints").exists(), "rank 0 alone saves"


def test_other_text_of_a_rank_is_refused(store: MlflowClient, text: Path, four: Path) -> None:
    write_shards(Path("elsewhere/text"), documents(90, seed=3))
    found = Launched(four, [[], ["--set", "dataset.parquet_dir=elsewhere/text"]], free_port()).ended()
    assert [code for code, _ in found] == [2, 2]
    assert re.search(r"holds other text for rank 1 \(.+\) \(digest \w{12}\) than for rank 0 \(", found[0][1]), found[0][1]


def test_a_rank_without_the_configuration_is_named(store: MlflowClient, four: Path) -> None:
    found = Launched(four, [[], ["--config", "elsewhere.yaml"]], free_port()).ended()
    assert [code for code, _ in found] == [2, 2]
    assert re.search(r"Error: rank 1 \(.+\): elsewhere.yaml", found[0][1]), found[0][1]
    assert found[1][1] == ""


def test_a_port_in_use_is_named(four: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = int(server.getsockname()[1])
        ((code, output),) = Launched(four, [[], []], port).ended(1)
    assert code == 1
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}: " in output
    assert "Another job may be using the port" in output


def test_processes_cannot_be_started_twice(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.LAUNCHED_BY:
        monkeypatch.setenv(name, "1")
    result = train(four, 2)
    assert result.exit_code == 2
    assert "a launcher (torchrun) has started this one" in result.output


def test_torchrun_restarts_as_the_next_segment_of_the_same_run(store: MlflowClient, four: Path, alone: Left) -> None:
    """Killed before the first checkpoint (rank 0), and after it (rank 1)."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    settings = [f"--training.{key}={value}" for key, value in (("checkpoint_freq", 150), ("max_iters", 300), ("test_freq", 150))]
    out = Path("out.txt")
    with out.open("w") as file:
        job = subprocess.Popen(
            [*words, "-m", "bdh_mlflow", "train", "--config", str(four), *settings],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            for rank, step in ((0, 20), (1, 170)):
                kill_at(psutil.Process(job.pid), rank, step, out)
            assert job.wait(120) == 0, out.read_text()
        finally:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.segment"]) == ("FINISHED", "3"), out.read_text()
    losses = history(store, run.info.run_id, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 301))
    assert max(value for _, value in history(store, run.info.run_id, "resume/replay_max_abs_diff")) == 0
    assert losses[:6] == alone[1]["train/loss"]
    files = digests()
    put_away(store)
    assert train(four, 1, *settings).exit_code == 0
    assert digests()["checkpoint_300.pt"] == files["checkpoint_300.pt"]


def kill_at(agent: psutil.Process, rank: int, step: int, out: Path) -> None:
    until = time.monotonic() + 60
    while f"step {step}/" not in out.read_text():
        assert time.monotonic() < until, out.read_text()
        time.sleep(0.02)
    for process in agent.children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                process.kill()
