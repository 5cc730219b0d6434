"""How a run begins: refused with one error where it cannot, taken over from `mlflow run`, and without a server."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow import track
from bdh_mlflow.errors import InputError, ResumeError, TrackingError
from scripts.servers import free_port
from tests.conftest import run_cli
from tests.track.runs import points, tracked, write


def test_importing_it_needs_neither_torch_nor_mlflow_nor_our_model() -> None:
    code = """
import sys
import bdh_mlflow.track
wings = {m.split('.')[1] for m in sys.modules if m.startswith('bdh_mlflow.')}
print({'torch', 'mlflow', 'pyarrow', 'transformers', 'lightning'} & sys.modules.keys(), wings & {'model', 'data', 'training', 'vocabulary'})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n"


@pytest.mark.parametrize(
    ("resume", "settings", "error", "message"),
    [
        ("gone", {}, ResumeError, "gone: no such file or folder"),
        ("", {}, ResumeError, "empty text names no checkpoint"),
        ("f" * 32, {}, ResumeError, f"run {'f' * 32}: not found at"),
        ("latest", {}, ResumeError, "latest: no checkpoint in"),
        (None, {"folder": "a file"}, InputError, "track.Settings: folder: .*a file cannot be created or written: .* is not a folder"),
        (
            None,
            {"tracking_uri": "sqlite:///a file/x.db"},
            TrackingError,
            "tracking store sqlite:.*x.db cannot be used: .*a file is not a folder",
        ),
        (None, {"tracking_uri": "nonsense://x"}, TrackingError, "tracking store nonsense://x cannot be used"),
        (None, {"tracking_uri": "127.0.0.1:5000"}, InputError, "tracking_uri: .* did you mean http://127.0.0.1:5000"),
    ],
)
def test_what_cannot_begin_is_refused_and_leaves_nothing(
    store: MlflowClient, resume: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    Path("a file").write_text("")
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(error, match=message):
        tracked(resume, **settings)
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_training_of_ours_is_not_gone_on_with(store: MlflowClient, tmp_path: Path) -> None:
    from tests.tracking.tracked import TrackedRun

    ours = TrackedRun(tmp_path)
    saved = ours.save(3)
    ours.close()
    with pytest.raises(ResumeError, match="is the state of a BDH training; bdh-mlflow train --resume takes it"):
        tracked(saved.path)
    with pytest.raises(ResumeError, match=r"latest: no checkpoint in .* and none mirrored in experiment any"):
        tracked("latest")


def test_a_run_that_is_tracked_is_not_tracked_twice(store: MlflowClient, tmp_path: Path) -> None:
    with tracked() as run:
        run.checkpoint(write(tmp_path / "c"), 1)
        run.wait(20)
        with pytest.raises(ResumeError, match="another process is training this run; stop it first"):
            tracked(run.directory)
        run.metrics({"loss": 1.0}, 2)
    assert points(store, run.id, "loss") == [(2, 1.0)]


def test_the_first_run_is_that_of_mlflow_run_and_the_next_one_another(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    with tracked() as first:
        first.metrics({"loss": 1.0}, 1)
    with track.run("another", note=lambda text: None) as second:  # by a process, which asks the store first
        second.metrics({"loss": 2.0}, 1)
    assert first.id == wrapper
    assert second.id not in (None, wrapper)
    assert (store.get_run(wrapper).info.status, store.get_run(second.id).info.status) == ("FINISHED", "FINISHED")
    assert points(store, second.id, "loss") == [(1, 2.0)]


def test_without_a_server_everything_is_kept_and_delivered_later(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # as in a sender's own process
    notes: list[str] = []
    uri = f"http://127.0.0.1:{free_port()}"
    with tracked(notes=notes, tracking_uri=uri) as run:
        assert (run.id, run.identity) == (None, None)
        for step in (1, 2):
            run.metrics({"loss": float(step)}, step)
            run.checkpoint(write(tmp_path / "c.pt", b"%d" % step), step)
        run.artifact(write(tmp_path / "f.txt"), "files")
    assert f"track: {uri} does not answer; everything is kept until it does" in notes
    assert notes[-1].startswith("track: a run that the store has not named yet: FINISHED after step 2; ")
    command = notes[-1].partition(" records wait in checkpoints/" + run.directory.name + "; deliver them: bdh-mlflow ")[2]
    uri = os.environ["MLFLOW_TRACKING_URI"]
    assert " records delivered, 0 left, 0 refused for good" in run_cli(*command.split(), "--tracking-uri", uri).output
    assert track.sync(tracking_uri=uri, note=notes.append) == 0
    assert track.find("latest:1", "any").read_bytes() == b"1"
    with tracked(resume="latest") as again:
        again.metrics({"loss": 3.0}, 3)
    (kept,) = store.search_runs([store.get_experiment_by_name("any").experiment_id])
    assert again.id == kept.info.run_id
    assert points(store, again.id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    there = {p.name for p in Path(kept.info.artifact_uri).rglob("*") if p.is_file()}
    assert {"c.pt", "f.txt", "checkpoint_1.json", "checkpoint_2.json"} <= there


def test_signals_are_held_until_the_run_has_ended(store: MlflowClient) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with tracked(signals=True) as run:
        assert run.stop_requested is None
        signal.raise_signal(signal.SIGTERM)
        assert (run.stop_requested, heard) == ("SIGTERM", [])
        signal.raise_signal(signal.SIGINT)  # as under `mlflow run`
        assert run.stop_requested == "SIGTERM"
        run.metrics({"loss": 1.0}, 1)
    assert heard == [signal.SIGTERM], "raised again, for the handler that was there before"
    kept = store.get_run(run.id)
    assert (kept.info.status, kept.data.tags["bdh.stop_reason"]) == ("KILLED", "SIGTERM")
    assert points(store, run.id, "loss") == [(1, 1.0)]


def test_a_second_signal_of_the_kind_has_its_effect(store: MlflowClient) -> None:
    with pytest.raises(KeyboardInterrupt), tracked(signals=True) as run:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert store.get_run(run.id).info.status == "KILLED"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_end_forked_processes_and_are_held_by_one_run(store: MlflowClient) -> None:
    with tracked(signals=True):
        with pytest.raises(InputError, match="another open run of this process holds them already"):
            tracked(signals=True)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM
    with tracked(signals=True) as again:
        assert again.stop_requested is None


def test_signals_are_given_back_also_when_a_run_ends_in_another_thread(store: MlflowClient) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    run = tracked(signals=True)
    thread = threading.Thread(target=run.end)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    with tracked(signals=True):
        pass


def test_signals_are_held_in_the_main_thread_alone(store: MlflowClient) -> None:
    caught: list[BaseException] = []

    def begin() -> None:
        try:
            tracked(signals=True)
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert "begin the run in the main thread" in str(caught[0])
    assert not list(Path().glob("checkpoints"))


def test_the_command_line_knows_such_checkpoints(store: MlflowClient, tmp_path: Path) -> None:
    with tracked(best="loss", experiment="bdh") as run:
        for step in (1, 2):
            run.checkpoint(write(tmp_path / "c.pt", b"%d" % step), step, {"loss": float(step)})
    assert run_cli("checkpoints", "verify", "checkpoints").output.splitlines()[-1] == "2 intact, 0 damaged"
    assert run_cli("checkpoints", "verify", run.id).output.splitlines()[-1] == "2 intact, 0 damaged"
    for target in ("checkpoints", run.id, "--all-runs"):
        listed = run_cli("checkpoints", "list", target).output
        assert "checkpoint_1" in listed
        assert "checkpoint_2" in listed
    shutil.rmtree("checkpoints")
    pulled = run_cli("checkpoints", "pull", f"{run.id}:1")
    assert Path(pulled.output.splitlines()[-1]).read_bytes() == b"1"
    refused = run_cli("generate", run.id, "--prompt", "x")
    assert refused.exit_code == 2
    assert "holds files of another program; bdh_mlflow.track.find gives their path to that one" in refused.output
