"""Processes that a launcher starts, torchrun or another one."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from bdh_mlflow.training import processes
from scripts.servers import free_port
from tests.conftest import documents, history, only_run, write_shards
from tests.training.together import Left, curves, digests, put_away, train

pytestmark = [
    pytest.mark.slow,  # each process that is started imports torch, three seconds of a core
    pytest.mark.usefixtures("text"),
]


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


def test_two_agents_of_torchrun_train_one_run(store: MlflowClient, four: Path, alone: Left) -> None:
    """As on two nodes, each of which says that it has a process of its own."""
    port = free_port()
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [*words, "--master-port", str(port), "--node-rank", str(node), "-m", "bdh_mlflow", "train", "--config", str(four)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (digests(), curves(store)) == alone
    assert "torchrun --nnodes 2 --nproc-per-node 1 ... -m bdh_mlflow train" in outputs[0]


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


def test_what_fails_in_the_only_process_of_a_launcher_is_not_taken_for_a_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="the device is gone"), processes.joined():
        raise RuntimeError("the device is gone")
