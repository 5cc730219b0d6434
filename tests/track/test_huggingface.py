"""The callback, called as a Trainer calls it; whole trainings are in test_loops and test_page."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")
pytest.importorskip("accelerate", reason="the extra `huggingface` is not installed")

from transformers import TrainerControl, TrainerState, TrainingArguments

from bdh_mlflow.errors import InputError
from bdh_mlflow.track import Settings, huggingface
from bdh_mlflow.track.begin import begin
from bdh_mlflow.track.huggingface import TrackCallback
from bdh_mlflow.track.tracked import Run
from tests.track.runs import points, thread_sender, write


class Loop:
    """What a Trainer does with its callback."""

    def __init__(self, callback: TrackCallback, **arguments: Any) -> None:
        self.callback = callback
        self.arguments = TrainingArguments("out", report_to="none", use_cpu=True, **arguments)
        self.state = TrainerState(max_steps=20, stateful_callbacks=[callback])
        self.control = TrainerControl()

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda **given: getattr(self.callback, event)(self.arguments, self.state, self.control, **given)

    def step(self, number: int, **logs: Any) -> None:
        self.state.global_step = number
        self.state.log_history.append({"step": number, **{k: v for k, v in logs.items() if not isinstance(v, torch.Tensor)}})
        self.on_log(logs=logs)

    def save(self) -> Path:
        """A folder as the Trainer writes it."""
        folder = Path("out") / f"checkpoint-{self.state.global_step}"
        write(folder / "model.safetensors", b"%d" % self.state.global_step)
        self.state.stateful_callbacks[type(self.callback).__name__] = self.callback.state()
        self.state.save_to_json(folder / "trainer_state.json")
        self.on_save()
        return folder


@pytest.fixture
def callback(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrackCallback]:
    """Makes callbacks whose runs have a sender in this process."""

    def begun(settings: Settings, params: Any, origin: Any, note: Any) -> Run:
        return begin(settings, params, origin, note, thread_sender)

    monkeypatch.setattr(huggingface, "begin", begun)
    usual = {"experiment": "any", "system_metrics": False}

    def make(resume: str | None = None, notes: list[str] | None = None, **settings: Any) -> TrackCallback:
        return TrackCallback(Settings(**{**usual, **settings}), resume=resume, note=(notes if notes is not None else []).append)

    return make


def test_names_params_and_the_best_checkpoint_are_those_of_the_trainer(store: MlflowClient, callback: Any) -> None:
    notes: list[str] = []
    loop = Loop(callback(notes=notes), metric_for_best_model="accuracy", greater_is_better=True, run_name="mine")
    loop.on_train_begin(model=torch.nn.Linear(1, 1))
    for step, accuracy in ((5, 0.9), (10, 0.5)):
        loop.step(step, loss=torch.tensor(1 / step), epoch=1, **{"odd(name)": 3}, text="x", eval_accuracy=accuracy)
        loop.save()
    loop.on_train_end()
    loop.step(10, eval_after=1.5)
    loop.callback.run.end()
    run = store.get_run(loop.callback.run.id)
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["metric_for_best_model"] == "accuracy"
    assert run.data.params["output_dir"] == "out"
    assert {k for k in run.data.metrics if not k.startswith(("tracker/", "ckpt/"))} == {
        "loss", "epoch", "odd_name_", "eval_accuracy", "eval_after",
    }  # fmt: skip
    assert run.data.tags["bdh.best_checkpoint"].endswith("/checkpoint_5")
    assert run.data.tags["bdh.best_metric"] == "eval_accuracy (higher is better)"
    assert notes.count("track: text is no number, or has no name that MLflow stores, and is not logged") == 1


def test_a_training_goes_on_in_the_run_that_its_checkpoint_names(store: MlflowClient, callback: Any) -> None:
    first = Loop(callback())
    first.on_train_begin()
    first.step(5, loss=1.0)
    folder = first.save()
    first.on_train_end()
    first.callback.run.end()
    told = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["TrackCallback"]["attributes"]
    assert told == {"tracked": {"run_id": first.callback.run.id, "run_dir": first.callback.run.directory.name}}
    again = Loop(callback())
    again.state = TrainerState.load_from_json(folder / "trainer_state.json")
    again.on_train_begin()
    assert again.callback.run.first_step == 5
    again.step(6, loss=2.0)
    again.callback.run.end()
    assert points(store, first.callback.run.id, "loss") == [(5, 1.0), (6, 2.0)]
    assert again.callback.run.directory == first.callback.run.directory
    assert first.callback.state()["attributes"] == {"tracked": {}}, "of a run that has ended"


def test_a_checkpoint_made_without_the_callback_begins_a_run(store: MlflowClient, callback: Any) -> None:
    loop = Loop(callback())
    loop.state = TrainerState(global_step=7, stateful_callbacks={"TrainerControl": {}})
    loop.on_train_begin()
    loop.step(8, loss=1.0)
    loop.save()  # the Trainer looks the callback up among the states that it has loaded
    loop.callback.run.end()
    assert points(store, loop.callback.run.id, "loss") == [(8, 1.0)]


def test_a_second_training_is_another_run_and_an_evaluation_is_of_the_first(store: MlflowClient, callback: Any) -> None:
    loop = Loop(callback())
    loop.on_train_begin()
    loop.step(1, loss=1.0)
    loop.on_train_end()
    first = loop.callback.run
    loop.step(1, eval_loss=2.0)
    loop.state = TrainerState(max_steps=20, stateful_callbacks=[loop.callback])
    loop.on_train_begin()
    loop.step(1, loss=3.0)
    loop.callback.run.end()
    assert first.ended
    assert points(store, first.id, "eval_loss") == [(1, 2.0)]
    assert points(store, loop.callback.run.id, "loss") == [(1, 3.0)]


def test_other_processes_track_nothing(store: MlflowClient, callback: Any, tmp_path: Path) -> None:
    loop = Loop(callback())
    loop.state.is_world_process_zero = False
    loop.on_train_begin()
    loop.step(1, loss=1.0)
    loop.on_save()
    loop.on_step_end()
    loop.on_train_end()
    assert loop.callback.run is None
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_is_gone_is_said_and_training_goes_on(store: MlflowClient, callback: Any) -> None:
    notes: list[str] = []
    loop = Loop(callback(notes=notes))
    loop.on_train_begin()
    loop.step(3, loss=1.0)
    loop.on_save()
    loop.callback.run.end()
    assert any(note.startswith("track: step 3 is not tracked: out/checkpoint-3: no such file or folder") for note in notes)
    assert store.get_run(loop.callback.run.id).info.status == "FINISHED"


def test_a_trial_of_a_search_has_its_own_folder(store: MlflowClient, callback: Any) -> None:
    loop = Loop(callback())
    loop.state.is_hyper_param_search = True
    loop.on_train_begin()
    loop.step(3, loss=1.0)
    write(Path("out/run-0/checkpoint-3/model.safetensors"), b"trial")
    loop.on_save()
    loop.callback.run.end()
    assert (loop.callback.run.directory / "checkpoint_3" / "model.safetensors").read_bytes() == b"trial"


def test_its_state_holds_no_settings_and_a_restored_one_is_the_same(store: MlflowClient, callback: Any) -> None:
    made = callback(tags={"data": "https://me:secret@host/x"})
    loop = Loop(made)
    loop.on_train_begin()
    state = json.loads(json.dumps(made.state()))
    assert state["attributes"] == {"tracked": {"run_id": made.run.id, "run_dir": made.run.directory.name}}
    again = TrackCallback(**state["args"])  # as the Trainer does, with restore_callback_states_from_checkpoint
    assert again.run is made.run
    made.run.end()
    assert pickle.loads(pickle.dumps(TrackCallback(Settings("x")))).run is None


def test_a_training_that_failed_is_a_failed_run_and_the_next_one_another(store: MlflowClient, callback: Any) -> None:
    loop = Loop(callback())
    loop.on_train_begin()
    loop.step(1, loss=1.0)
    failed = loop.callback.run  # an error that the program handles, of which a callback hears nothing
    loop.on_train_begin()
    loop.step(1, loss=2.0)
    loop.callback.run.end()
    assert (store.get_run(failed.id).info.status, points(store, failed.id, "loss")) == ("FAILED", [(1, 1.0)])
    assert points(store, loop.callback.run.id, "loss") == [(1, 2.0)]


def test_two_callbacks_of_one_trainer_are_refused(store: MlflowClient, callback: Any) -> None:
    loop, other = Loop(callback()), callback()
    loop.on_train_begin()
    with pytest.raises(InputError, match="two TrackCallbacks track one Trainer"):
        other.on_train_begin(loop.arguments, loop.state, loop.control)
    loop.callback.run.end()


def test_names_that_mlflow_does_not_store_are_the_nearest_that_it_does(store: MlflowClient, callback: Any) -> None:
    class Model:
        class config:
            @staticmethod
            def to_dict() -> dict[str, Any]:
                return {"label2id": {"tench, Tinca tinca": 0, "..": 1}, "d_model": 8}

    loop = Loop(callback(), metric_for_best_model="f1@10", greater_is_better=True)
    loop.on_train_begin(model=Model())
    loop.step(5, **{"eval_f1@10": 0.5})
    loop.save()
    loop.callback.run.end()
    run = store.get_run(loop.callback.run.id)
    assert (run.data.params["label2id.tench_ Tinca tinca"], run.data.params["d_model"]) == ("0", "8")
    assert run.data.tags["bdh.best_metric"] == "eval_f1_10 (higher is better)"


def test_signals_are_refused_in_a_group(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(callback(signals=True))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match="signals=True holds the signals of one process, and this is a group"):
        loop.on_train_begin()
