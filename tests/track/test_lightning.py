"""The logger, called as a Trainer calls it; whole trainings are in test_loops and test_page."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

from bdh_mlflow.errors import InputError
from bdh_mlflow.track import Settings, lightning
from bdh_mlflow.track.begin import begin
from bdh_mlflow.track.lightning import TrackLogger
from bdh_mlflow.track.tracked import Run
from tests.track.runs import points, thread_sender, write


class Saver:
    """A ModelCheckpoint after it has saved a file, as far as a logger looks at it."""

    def __init__(self, path: Path, step: int, **fields: Any) -> None:
        self._last_checkpoint_saved, self._last_global_step_saved = str(path), step
        self.monitor, self.mode, self.current_score, self.save_weights_only = None, "min", None, False
        vars(self).update(fields)


@pytest.fixture
def logger(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrackLogger]:
    """Makes loggers whose runs have a sender in this process."""

    def begun(settings: Settings, params: Any, origin: Any, note: Any) -> Run:
        return begin(settings, params, origin, note, thread_sender)

    monkeypatch.setattr(lightning, "begin", begun)

    def make(resume: str | None = None, notes: list[str] | None = None, **settings: Any) -> TrackLogger:
        chosen = Settings(**{"experiment": "any", "system_metrics": False, **settings})
        return TrackLogger(chosen, resume=resume, note=(notes if notes is not None else []).append)

    return make


def test_metrics_hyperparameters_and_checkpoints_arrive(store: MlflowClient, logger: Any, tmp_path: Path) -> None:
    made = logger()
    made.log_hyperparams({"lr": 0.1, "net": {"width": 8}, "none": None})
    made.log_hyperparams(Namespace(depth=2, more=Namespace(optimizer={"name[0]": "x"})))
    for step, loss in ((0, 2.0), (1, 1.0), (2, 3.0)):
        made.log_metrics({"val/loss": torch.tensor(loss), "odd(name)": 1, "text": "x"}, step)
        file = write(tmp_path / "out" / f"epoch={step}-step={step + 1}.ckpt", b"%d" % step)
        made.after_save_checkpoint(Saver(file, step + 1, monitor="val/loss", current_score=torch.tensor(loss)))
    made.finalize("success")
    made.log_metrics({"test": 5.0}, 3)
    run = made.experiment
    assert (made.name, made.version) == ("any", run.id)
    run.end()
    kept = store.get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"lr": "0.1", "net/width": "8", "none": "null", "depth": "2", "more/optimizer/name_0_": "x"}
    assert points(store, run.id, "val/loss") == [(0, 2.0), (1, 1.0), (2, 3.0)], "no second point for the score"
    assert {k for k in kept.data.metrics if not k.startswith(("tracker/", "ckpt/"))} == {"val/loss", "oddname", "test"}
    assert kept.data.tags["bdh.best_checkpoint"].endswith("/checkpoint_2")
    assert (run.directory / "checkpoint_2" / "epoch=1-step=2.ckpt").read_bytes() == b"1"


def test_of_several_files_of_a_step_a_whole_state_is_kept(store: MlflowClient, logger: Any, tmp_path: Path) -> None:
    made = logger()
    weights, state, last = (write(tmp_path / f"{name}.ckpt", name.encode()) for name in ("weights", "state", "last"))
    made.after_save_checkpoint(Saver(weights, 5, save_weights_only=True))
    made.after_save_checkpoint(Saver(state, 5))
    made.after_save_checkpoint(Saver(last, 5))
    run = made.experiment
    run.end()
    assert [path.name for path in (run.directory / "checkpoint_5").iterdir()] == ["state.ckpt"]


def test_of_several_monitored_files_of_a_step_the_first_metric_decides(store: MlflowClient, logger: Any, tmp_path: Path) -> None:
    made = logger()
    for step, (loss, accuracy) in enumerate(((2.0, 0.1), (1.0, 0.9), (3.0, 0.5)), 1):
        for name, fields in (
            ("all", {}),
            ("loss", {"monitor": "loss", "current_score": loss}),
            ("accuracy", {"monitor": "accuracy", "mode": "max", "current_score": accuracy}),
        ):
            made.after_save_checkpoint(Saver(write(tmp_path / f"{name}-{step}.ckpt"), step, **fields))
    run = made.experiment
    run.end()
    assert [path.name for path in (run.directory / "checkpoint_2").iterdir()] == ["loss-2.ckpt"]
    tags = store.get_run(run.id).data.tags
    assert (tags["bdh.best_metric"], tags["bdh.best_value"]) == ("loss (lower is better)", "1.0")


def test_a_second_fit_has_files_of_its_own(store: MlflowClient, logger: Any, tmp_path: Path) -> None:
    made = logger()
    made.after_save_checkpoint(Saver(write(tmp_path / "best.ckpt", b"1"), 8))
    made.finalize("success")
    made.after_save_checkpoint(Saver(write(tmp_path / "best-v1.ckpt", b"2"), 8))
    run = made.experiment
    run.end()
    assert [path.name for path in (run.directory / "checkpoint_8").iterdir()] == ["best-v1.ckpt"]


def test_what_is_no_number_is_named_once_and_training_goes_on(store: MlflowClient, logger: Any) -> None:
    notes: list[str] = []
    made = logger(notes=notes)
    for step in (0, 1):
        made.log_metrics({"a": None, "text": "x", "()": 1.0, "loss": 1.0}, step)
    run = made.experiment
    run.end()
    assert sorted(note for note in notes if "is not logged" in note) == [
        f"track: {key} is no number, or has no name that MLflow stores, and is not logged" for key in ("()", "a", "text")
    ]
    assert points(store, run.id, "loss") == [(0, 1.0), (1, 1.0)]


def test_its_name_is_a_folder_of_its_own() -> None:
    assert [TrackLogger(name).name for name in ("../../x", "/Users/me/x", "mine")] == ["_.._x", "_Users_me_x", "mine"]


def test_a_fit_that_failed_is_failed(store: MlflowClient, logger: Any) -> None:
    made = logger()
    made.log_metrics({"loss": 1.0}, 0)
    run = made.experiment
    try:
        raise ValueError("no such layer")
    except ValueError:
        made.finalize("failed")
    run.end()
    kept = store.get_run(run.id)
    assert (kept.info.status, kept.data.tags["bdh.stop_reason"], kept.data.tags["bdh.stop_message"]) == (
        "FAILED",
        "ValueError",
        "no such layer",
    )


def test_a_fit_after_one_that_failed_has_finished(store: MlflowClient, logger: Any) -> None:
    made = logger()
    made.log_metrics({"loss": 1.0}, 0)
    run = made.experiment
    try:
        raise MemoryError
    except MemoryError:
        made.finalize("success")  # of the second try, in the handler of the first one's error
    run.end()
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_file_that_is_gone_is_said_and_training_goes_on(store: MlflowClient, logger: Any) -> None:
    notes: list[str] = []
    made = logger(notes=notes)
    made.after_save_checkpoint(Saver(Path("gone.ckpt"), 5))
    made.experiment.end()
    assert any(note.startswith("track: step 5 is not tracked: gone.ckpt: no such file or folder") for note in notes)


def test_it_is_pickled_without_its_run(store: MlflowClient, logger: Any) -> None:
    made = TrackLogger(Settings("any"))
    assert pickle.loads(pickle.dumps(made)).ckpt_path is None
    began = logger()
    began.log_metrics({"loss": 1.0}, 0)
    assert began.__getstate__()["_run"] is None
    began.experiment.end()


def test_signals_are_lightning_s_own() -> None:
    with pytest.raises(InputError, match="signals=True: Lightning handles signals itself; leave it out"):
        TrackLogger(Settings(signals=True))
