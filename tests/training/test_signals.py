"""Signals that end a run, once, twice and as `mlflow run` sends them, in every phase of a run: real ones, raised from inside it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import BackgroundWriter
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.tracking.tracker import Tracker
from bdh_mlflow.training.trainer import Trainer
from tests.conftest import only_run, train

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
INT, TERM, HUP, USR1 = CODES
pytestmark = pytest.mark.parametrize(
    "signals",
    [
        (INT, TERM),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ((INT,), (TERM,), (INT, INT), (TERM, TERM), (HUP, TERM), (USR1,))),
    ],
    ids=lambda s: "+".join(n.name for n in s),
)

Raise = Callable[[], None]


@pytest.fixture
def number(signals: tuple[signal.Signals, ...]) -> signal.Signals:
    """The signal that counts: the first."""
    return signals[0]


@pytest.fixture
def raising(signals: tuple[signal.Signals, ...]) -> Raise:
    """Raises the signals, one after the other, when first called."""
    left = list(signals)

    def now() -> None:
        while left:
            signal.raise_signal(left.pop(0))

    return now


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, raising: Raise, call: int = 1) -> None:
    """Raise just before the given call of a function."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raising()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def test_in_preparation_nothing_is_left(
    store: MlflowClient, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raising: Raise, number: signal.Signals
) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    before(monkeypatch, pq.ParquetWriter, "write_table", raising)
    result = train(tiny, "dataset.source=book.txt")
    assert result.exit_code == CODES[number]
    assert "Stopped before the first step; nothing was saved." in result.output
    assert sorted(p.name for p in tmp_path.iterdir() if "mlflow.db" not in p.name) == ["book.txt", "tiny.yaml"]
    assert store.get_experiment_by_name("bdh") is None


@pytest.mark.parametrize(
    ("phase", "owner", "name", "call", "step"),
    [
        ("compile", BDH, "forward", 1, 1),
        ("accumulation", BDH, "forward", 5, 2),
        ("evaluation", BDH, "forward", 10, 3),
        ("sampling", BDH, "stream", 1, 3),
        ("save", Trainer, "state_dict", 1, 3),
        ("copy", BackgroundWriter, "save", 1, 3),
    ],
    ids=["compile", "accumulation", "evaluation", "sampling", "save", "copy"],
)
def test_run_ends_with_a_checkpoint_of_its_last_step(
    store: MlflowClient,
    text: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    raising: Raise,
    number: signal.Signals,
    phase: str,
    owner: Any,
    name: str,
    call: int,
    step: int | None,
) -> None:
    before(monkeypatch, owner, name, raising, call)
    result = train(tiny, "training.gradient_accumulation_steps=3", "training.max_iters=1000", "training.log_freq=100")
    assert result.exit_code == CODES[number], result.output
    (directory,) = checkpoint.list_all(Path("checkpoints"))
    newest, passed_over = checkpoint.newest(directory)
    assert newest is not None
    assert passed_over == []
    run = only_run(store)
    assert run.info.status == "KILLED"
    assert run.data.tags["bdh.stop_reason"] == number.name
    assert run.data.tags["bdh.stop_step"] == str(newest.manifest.step)
    assert run.data.tags["bdh.latest_checkpoint"].endswith(newest.path.name)
    assert step in (None, newest.manifest.step), phase


def test_upload_after_the_last_step_is_completed_and_the_run_is_finished(
    store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, raising: Raise
) -> None:
    before(monkeypatch, Tracker, "close", raising)
    result = train(tiny)
    assert result.exit_code == 0, result.output
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.tags["bdh.latest_checkpoint"].endswith("checkpoint_6.pt")
