"""What a loop may call, and what arrives in MLflow."""

import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint, track
from bdh_mlflow.checkpoint import Background
from bdh_mlflow.errors import InputError, SaveError
from bdh_mlflow.track import NullRun, Sample
from bdh_mlflow.track.tracked import Run
from tests.conftest import wait_for
from tests.track.runs import points, tracked, write


def test_everything_of_a_run_arrives_once(store: MlflowClient, tmp_path: Path) -> None:
    notes: list[str] = []
    with tracked(notes=notes, params={"lr": 3e-4}, name="first", tags={"team": "a"}, best="loss", keep=2) as run:
        run.params({"net": 8})
        for step in range(1, 9):
            run.metrics({"loss": 1 / step, "lr": torch.tensor(3e-4, dtype=torch.float64)}, step)
            if step % 2 == 0:
                run.checkpoint(write(tmp_path / "out" / "model.pt", f"state {step}".encode()), np.int64(step), {"loss": 1 / step})
        run.tags({"later": "yes"})
        run.samples([("To be", " or not"), Sample("x", "y")], 8)
        run.text("a note", "notes/a.txt")
        run.artifact(write(tmp_path / "figure.svg", b"<svg/>"), "figures")
        run.artifact(tmp_path / "out")
        (tmp_path / "figure.svg").unlink()
        identity = run.wait(20)
        assert identity is not None
    kept = store.get_run(identity.run_id)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "first")
    assert kept.data.params == {"lr": "0.0003", "net": "8"}
    assert points(store, identity.run_id, "loss") == [(step, 1 / step) for step in range(1, 9)], "those of checkpoints are the same points"
    assert points(store, identity.run_id, "lr") == [(step, 3e-4) for step in range(1, 9)]
    folder = run.directory.name
    tags = kept.data.tags
    assert {k: tags[k] for k in ("team", "later", "bdh.run_dir", "bdh.stop_reason", "bdh.stop_step")} == {
        "team": "a", "later": "yes", "bdh.run_dir": folder, "bdh.stop_reason": "finished", "bdh.stop_step": "8",
    }  # fmt: skip
    assert tags["bdh.latest_checkpoint"] == tags["bdh.best_checkpoint"] == f"checkpoints/{folder}/checkpoint_8"
    assert (tags["bdh.best_metric"], tags["bdh.best_value"]) == ("loss (lower is better)", "0.125")
    there = {p.relative_to(_artifacts(kept)).as_posix() for p in _artifacts(kept).rglob("*") if p.is_file()}
    assert there == {
        f"checkpoints/{folder}/checkpoint_6.json", f"checkpoints/{folder}/checkpoint_6/model.pt",
        f"checkpoints/{folder}/checkpoint_8.json", f"checkpoints/{folder}/checkpoint_8/model.pt",
        "environment.txt", "segments.json", "samples.json", "samples/step_8.txt", "notes/a.txt", "figures/figure.svg", "out/model.pt",
    }  # fmt: skip
    assert (_artifacts(kept) / f"checkpoints/{folder}/checkpoint_6/model.pt").read_bytes() == b"state 6"
    models = store.search_logged_models([kept.info.experiment_id])
    assert {m.name: {v.key: v.value for v in m.metrics} for m in models} == {"step-6": {"loss": 1 / 6}, "step-8": {"loss": 0.125}}
    assert notes[-1].startswith(f"track: run first ({identity.run_id}): FINISHED after step 8; mlflow ui, then http://127.0.0.1:5000/#/")


def _artifacts(run: Any) -> Path:
    return Path(run.info.artifact_uri)


def test_a_mirror_is_not_changed_by_what_its_owner_writes_later(store: MlflowClient, tmp_path: Path) -> None:
    with tracked() as run:
        run.checkpoint(write(tmp_path / "last.pt", b"1"), 1)
        run.wait(20)
        for step, once in ((2, True), (3, False)):
            run.checkpoint(write(tmp_path / "new" / f"{step}.pt", b"%d" % step), step, written_once=once)
        (tmp_path / "last.pt").write_bytes(b"another")
    folder = _artifacts(store.get_run(run.id)) / "checkpoints" / run.directory.name
    assert [(folder / name).read_bytes() for name in ("checkpoint_1/last.pt", "checkpoint_2/2.pt", "checkpoint_3/3.pt")] == [
        b"1",
        b"2",
        b"3",
    ]


def test_a_run_goes_on_from_its_checkpoint_in_the_same_run(store: MlflowClient, tmp_path: Path) -> None:
    with tracked(params={"lr": 1}) as first:
        for step in (1, 2, 3):
            first.metrics({"loss": float(step)}, step)
            first.checkpoint(write(tmp_path / "c.pt", b"%d" % step), step)
    with tracked(resume=f"{first.id}:2", params={"lr": 2, "more": True}) as second:
        assert (second.first_step, second.resumed_from.read_bytes()) == (2, b"2")
        for step in (3, 4):
            second.metrics({"loss": 10.0 * step}, step)
        second.checkpoint(write(tmp_path / "c.pt", b"new"), 3)
    assert (second.id, second.directory) == (first.id, first.directory)
    run = store.get_run(first.id)
    assert points(store, first.id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)], "a replayed point stays as it was"
    assert run.data.params == {"lr": "1", "more": "true"}
    assert (run.info.status, run.data.tags["bdh.segment"]) == ("FINISHED", "2")
    assert run.data.tags["bdh.resumed_from"] == f"runs:/{first.id}/checkpoints/{first.directory.name}/checkpoint_2"
    assert "resume/replay_max_abs_diff" not in run.data.metrics, "nothing was compared"
    assert (_artifacts(run) / "checkpoints" / first.directory.name / "checkpoint_3" / "c.pt").read_bytes() == b"new"


def test_checkpoints_are_found_here_and_in_the_mirror(store: MlflowClient, tmp_path: Path) -> None:
    notes: list[str] = []
    with tracked() as run:
        for step in (1, 2):
            run.checkpoint(write(tmp_path / "out" / "sub" / "w", b"%d" % step).parent.parent, step)
    for target in (
        "latest",
        run.id,
        f"runs:/{run.id}",
        str(run.directory),
        f"{run.directory}/checkpoint_2/sub/w",
        "latest:2",
        f"{run.id}:2",
    ):
        assert track.find(target, "any") == run.directory / "checkpoint_2", target
    shutil.rmtree("checkpoints")
    for target in (f"{run.id}:1", f"runs:/{run.id}/checkpoints/{run.directory.name}/checkpoint_1"):
        found = track.find(target, track.Settings("any"))
        assert (found, (found / "sub" / "w").read_bytes()) == (run.directory / "checkpoint_1", b"1")
    uri = store.get_run(run.id).info.artifact_uri
    shutil.rmtree("checkpoints")
    for place in (f"file://{uri}", f"runs:/{run.id}"):
        assert track.find(f"{place}/checkpoints/{run.directory.name}/checkpoint_2/sub/w", "any") == run.directory / "checkpoint_2"
    shutil.rmtree("checkpoints")
    assert track.find(f"file://{uri}/checkpoints/{run.directory.name}", "any", note=notes.append) == run.directory / "checkpoint_2"
    shutil.rmtree("checkpoints")
    assert track.find("latest", "any") == run.directory / "checkpoint_2", "the mirror alone has it"
    (run.directory / "checkpoint_2" / "sub" / "w").write_bytes(b"!")
    assert track.find(run.id, "any", note=notes.append) == run.directory / "checkpoint_2", "fetched again in place of the damaged one"
    assert any("damaged" in note for note in notes)


def test_a_run_without_checkpoints_goes_on_too(store: MlflowClient) -> None:
    with tracked() as first:
        first.metrics({"loss": 1.0}, 1)
    with tracked(resume=first.id) as second:
        assert (second.resumed_from, second.first_step) == (None, 0)
        second.metrics({"loss": 2.0}, 2)
    assert points(store, first.id, "loss") == [(1, 1.0), (2, 2.0)]


def test_what_is_logged_after_a_mark_arrives(store: MlflowClient, tmp_path: Path) -> None:
    run = tracked()
    run.metrics({"loss": 1.0}, 1)
    run.checkpoint(write(tmp_path / "c"), 1)
    run.mark()
    wait_for(lambda: store.get_run(run.wait(20).run_id).info.status == "FINISHED")
    run.metrics({"test": 2.0}, 1)
    run.end()
    assert points(store, run.id, "test") == [(1, 2.0)]
    assert store.get_run(run.id).info.status == "FINISHED"
    assert (_artifacts(store.get_run(run.id)) / "checkpoints" / run.directory.name / "checkpoint_1" / "c").is_file()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("no such layer"), "FAILED", "ValueError"),
        (KeyboardInterrupt(), "KILLED", "SIGINT"),
        (SystemExit(3), "FAILED", "SystemExit"),
        (SystemExit(0), "FINISHED", "finished"),
    ],
)
def test_a_run_ends_as_its_loop_does(store: MlflowClient, error: BaseException, status: str, reason: str) -> None:
    with pytest.raises(type(error)), tracked() as run:  # noqa: PT012
        run.metrics({"loss": 1.0}, 1)
        raise error
    kept = store.get_run(run.id)
    assert (kept.info.status, kept.data.tags["bdh.stop_reason"]) == (status, reason)
    assert points(store, run.id, "loss") == [(1, 1.0)]
    with pytest.raises(InputError, match=rf"the run has ended \({status}\); begin another one, or go on with it: track.run"):
        run.metrics({"loss": 1.0}, 2)


def test_two_runs_of_one_process_do_not_mix(store: MlflowClient) -> None:
    with tracked() as one, tracked() as other:
        one.metrics({"loss": 1.0}, 1)
        other.metrics({"loss": 2.0}, 1)
        assert one.made_directory() != other.made_directory()
    assert (points(store, one.id, "loss"), points(store, other.id, "loss")) == ([(1, 1.0)], [(1, 2.0)])


def _log_in_child(run: Run, said: Path) -> None:
    try:
        with run:
            run.metrics({"loss": 5.0}, 5)
    except InputError as error:
        said.write_text(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")  # what is tested here
def test_a_run_belongs_to_its_process(store: MlflowClient, tmp_path: Path) -> None:
    with tracked() as run:
        run.metrics({"loss": 1.0}, 1)
        with pytest.raises(InputError, match="a run belongs to the process that began it"):
            pickle.dumps(run)
        child = multiprocessing.get_context("fork").Process(target=_log_in_child, args=(run, tmp_path / "said"))
        child.start()
        child.join()
        assert "was forked from the one that began this run" in (tmp_path / "said").read_text()
        run.metrics({"loss": 2.0}, 2)
    assert points(store, run.id, "loss") == [(1, 1.0), (2, 2.0)]
    assert store.get_run(run.id).info.status == "FINISHED"


def test_params_are_written_once_and_changes_are_tagged(store: MlflowClient) -> None:
    notes: list[str] = []
    with tracked(notes=notes, params={"lr": 0.1}) as run:
        run.params({"lr": 0.1, "net": {"alpha": [1, 2]}})
        run.params({"lr": 0.2, "net": {"alpha": torch.tensor([1, 2])}})
    kept = store.get_run(run.id)
    assert kept.data.params == {"lr": "0.1", "net.alpha": "[1, 2]"}
    assert {k: v for k, v in kept.data.tags.items() if k.startswith("drift.")} == {
        "drift.lr": "0.1 -> 0.2", "drift.net.alpha": "[1, 2] -> tensor([1, 2])",
    }  # fmt: skip
    assert not any("refused" in note for note in notes)


def test_checkpoints_of_several_threads_are_taken_one_after_the_other(store: MlflowClient, tmp_path: Path) -> None:
    with tracked() as run:

        def work(first: int) -> None:
            for step in range(first, 20, 4):
                run.checkpoint(write(tmp_path / str(step)), step)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [c.manifest.step for c in checkpoint.list_run(run.directory).checkpoints] == list(range(20))
    assert store.get_run(run.id).data.tags["bdh.stop_step"] == "19"


def test_a_run_that_is_marked_ends_as_marked(store: MlflowClient) -> None:
    with tracked() as run:
        run.mark("FAILED")
    assert store.get_run(run.id).info.status == "FAILED"


def test_leaving_a_generator_is_no_failure(store: MlflowClient) -> None:
    runs: list[Run] = []

    def steps() -> Iterator[int]:
        with tracked() as run:
            runs.append(run)
            yield 1

    for _ in steps():
        break
    assert store.get_run(runs[0].id).info.status == "FINISHED"


def test_steps_may_go_backwards(store: MlflowClient) -> None:
    with tracked() as run:
        for step in (5, 2, 5):
            run.metrics({"loss": float(step)}, step)
    assert {step for step, _ in points(store, run.id, "loss")} == {2, 5}
    assert store.get_run(run.id).data.tags["bdh.stop_step"] == "5"


CIRCLE: dict[str, Any] = {}
CIRCLE["c"] = CIRCLE
WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda run: run.metrics({"a//b": 1.0}, 1), r"metric 'a//b': names are made of letters"),
    (lambda run: run.metrics({"a,b": 1.0}, 1), r"metric 'a,b': names are made of letters"),
    (lambda run: run.metrics({"x" * 251: 1.0}, 1), r"metric 'x+'\.\.\.: its name has 251 characters; MLflow stores up to 250"),
    (lambda run: run.metrics({3: 1.0}, 1), r"metric 3: its name is no text"),
    (lambda run: run.metrics({"a": "1.0"}, 1), r"metric 'a': '1\.0' is no number"),
    (lambda run: run.metrics({"a": torch.zeros(2)}, 1), r"metric 'a': tensor\(\[0\., 0\.\]\) is no number"),
    (lambda run: run.metrics({"a": None}, 1), r"metric 'a': None is no number"),
    (lambda run: run.metrics([1.0], 1), r"metrics: \[1\.0\] is no mapping of names to numbers"),
    (lambda run: run.metrics({"a": 1.0}, 1.5), r"step 1\.5: accepted: a whole number of completed updates"),
    (lambda run: run.metrics({"a": 1.0}, -1), r"step -1: accepted: a whole number of completed updates, from 0"),
    (lambda run: run.metrics({"a": 1.0}, True), r"step True: accepted"),
    (lambda run: run.params({"a\n": 1}), r"param 'a\\n': names are made of letters"),
    (lambda run: run.text("x", "../x"), r"artifact '\.\./x': accepted: a relative path with `/`, without `\.\.`"),
    (lambda run: run.text("x", "/etc/x"), r"artifact '/etc/x': accepted"),
    (lambda run: run.text("x", "l" * 256), r"artifact 'l+\.\.\. \(258 characters\): accepted"),
    (lambda run: run.text("x", "a\0b"), r"artifact 'a\\x00b': accepted"),
    (lambda run: run.text(b"x", "a"), r"text of a: b'x' is no text"),
    (lambda run: run.tags(["a"]), r"tags: \['a'\] is no mapping of names to text"),
    (lambda run: run.samples(None, 1), r"sample None: accepted: a pair of texts"),
    (lambda run: run.samples([("a",)], 1), r"sample \('a',\): accepted: a pair of texts"),
    (lambda run: run.artifact(None), r"None is no path of a file or folder"),
    (lambda run: run.checkpoint(["a"], 1), r"\['a'\] is no path of a file or folder"),
    (lambda run: run.params(CIRCLE), r"params: .*: more than 50 levels deep"),
    (lambda run: run.artifact("gone"), r"gone: no such file or folder"),
    (lambda run: run.checkpoint("gone", 1), r"gone: no such file or folder"),
    (lambda run: run.checkpoint("gone", 1, {"a": "x"}), r"metric 'a': 'x' is no number"),
    (lambda run: run.end("DONE"), r"status 'DONE': accepted: FINISHED, FAILED, KILLED"),
]


def test_wrong_calls_are_refused_with_the_reason_and_cost_nothing(store: MlflowClient) -> None:
    with tracked() as run:
        for call, message in WRONG:
            with pytest.raises(InputError, match=message):
                call(run)
        run.metrics({"loss": 1.0}, 1)
    assert store.get_run(run.id).data.metrics.keys() == {"loss"}
    assert store.get_run(run.id).info.status == "FINISHED"


def test_a_checkpoint_that_cannot_be_written_is_said_and_ends_the_run_as_failed(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write(tmp_path / "last.pt", b"1" * 2**20)
    with pytest.raises(InputError, match="was written into before it was copied"), tracked() as run:  # noqa: PT012
        monkeypatch.setattr(checkpoint.writer, "IDLE_RATIO", 1e9)  # it does not come to an end before it is awaited
        run.checkpoint(given, 1, written_once=True)
        given.write_bytes(b"another")
    kept = store.get_run(run.id)
    assert (kept.info.status, kept.data.tags["bdh.stop_reason"]) == ("FAILED", "InputError")


def test_a_trainer_s_run_says_which_checkpoint_failed_and_takes_the_next(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    given = write(tmp_path / "last.pt", b"1" * 2**20)
    run = tracked(notes=notes)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.writer, "IDLE_RATIO", 1e9)
        assert run.try_checkpoint(given, 1, {})
        given.write_bytes(b"another")
        assert run.try_checkpoint(write(tmp_path / "2.pt"), 2, {})
        assert not run.try_checkpoint(tmp_path / "gone", 3, {})
    run.mark()
    run.end()
    assert [c.manifest.step for c in checkpoint.list_run(run.directory).checkpoints] == [2]
    (before,) = [note for note in notes if note.startswith("track: the checkpoint before is not tracked: ")]
    assert "was written into before it was copied, so step 1 is no checkpoint" in before
    assert any(note.startswith("track: step 3 is not tracked: ") for note in notes)


def test_a_mark_does_not_hide_that_the_last_checkpoint_failed(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write(tmp_path / "last.pt", b"1" * 2**20)
    run = tracked()
    monkeypatch.setattr(checkpoint.writer, "IDLE_RATIO", 1e9)
    run.checkpoint(given, 1, written_once=True)
    given.write_bytes(b"another")
    with pytest.raises(InputError, match="was written into"):
        run.mark()
    run.end()
    assert store.get_run(run.id).info.status == "FAILED"


def test_an_interrupt_while_a_run_ends_still_ends_it(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Background) -> None:
        raise KeyboardInterrupt

    run = tracked()
    with monkeypatch.context() as patch:
        patch.setattr(Background, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.end()
    assert store.get_run(run.id).info.status == "KILLED"
    with tracked(resume=run.id) as again:
        assert again.id == run.id


def test_a_disk_that_is_full_is_said(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracked() as run:
        monkeypatch.setattr(shutil, "copyfileobj", _full)
        monkeypatch.delattr(os, "copy_file_range")
        with pytest.raises(SaveError, match=r"last\.pt: not saved: No space left on device\. Earlier checkpoints are untouched"):
            run.checkpoint(write(tmp_path / "last.pt"), 1)
        with pytest.raises(SaveError, match=r"last\.pt: not copied: No space left on device"):
            run.artifact(tmp_path / "last.pt")
    assert store.get_run(run.id).info.status == "FINISHED"


def _full(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_no_run_has_the_calls_of_a_run(tmp_path: Path) -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    own = calls(Run) - {"disown", "end_at_exit", "made_directory", "noting", "try_checkpoint"}
    assert calls(NullRun) == own
    with NullRun() as run:
        run.metrics({"a": 1.0}, 1)
        run.checkpoint("gone", 1)
        assert (run.id, run.stop_requested, run.resumed_from, run.first_step, run.ended, run.marked) == (None, None, None, 0, False, False)
    assert list(tmp_path.iterdir()) == []
