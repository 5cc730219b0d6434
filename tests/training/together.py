"""What tests of several processes share: how they are started and ended, and what they leave."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.training import passes, processes
from tests.conftest import history, only_run, run_cli

PASSES = 4
FSDP = ("--set", "training.strategy=fsdp")
Left = tuple[dict[str, str], dict[str, list[tuple[int, float]]]]  # sha256 of checkpoints, and curves
CURVES = ("train/loss", "val/loss", "optim/grad_norm", "progress/tokens_seen", "progress/epoch", "bdh/active_x_l0", "bdh/dead_xy_l1")


def train(config: Path, count: int, *words: str) -> Result:
    return run_cli("train", "--config", str(config), "--processes", str(count), *words)


def digests() -> dict[str, str]:
    """sha256 of the checkpoints of the one run here."""
    (folder,) = checkpoint.list_all(Path("checkpoints"))
    return {c.path.name: c.manifest.files[0].sha256 for c in checkpoint.list_run(folder).checkpoints}


def curves(store: MlflowClient) -> dict[str, list[tuple[int, float]]]:
    run = only_run(store)
    return {key: history(store, run.info.run_id, key) for key in CURVES}


def put_away(store: MlflowClient) -> None:
    Path("checkpoints").rename(f"checkpoints-{time.monotonic_ns()}")
    store.delete_run(only_run(store).info.run_id)


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
