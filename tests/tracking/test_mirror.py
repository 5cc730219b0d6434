"""A checkpoint's second home: linked or copied, verified, pointed to, listed as a model, pruned."""

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint.files import PIECE_BYTES
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.text import bits_per_byte
from bdh_mlflow.tracking import (
    mirror,
    store,
    sync,
)
from bdh_mlflow.tracking import store as store_module
from bdh_mlflow.tracking.mirror import link_or_copy
from bdh_mlflow.tracking.mirrored import MirrorReader
from bdh_mlflow.tracking.store import local_path
from bdh_mlflow.tracking.tracker import DatasetFacts
from tests.checkpoint.test_files import state
from tests.tracking.tracked import PROVENANCE, TrackedRun, quiet


def mirrored(store: MlflowClient, tracked: TrackedRun) -> Path:
    uri = store.get_run(tracked.run_id).info.artifact_uri
    folder = local_path(uri)
    assert folder is not None
    return folder / "checkpoints" / tracked.directory.path.name


def test_checkpoint_is_linked_verified_and_then_called_the_latest(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        tracked.save(step, loss)
    assert tracked.close() == 0
    folder = f"checkpoints/{tracked.directory.path.name}"
    tags = store.get_run(tracked.run_id).data.tags
    assert tags["bdh.run_dir"] == tracked.directory.path.name
    assert tags["bdh.latest_checkpoint"] == f"{folder}/checkpoint_3.pt"
    assert tags["bdh.best_checkpoint"] == f"{folder}/checkpoint_2.pt"
    for file in tracked.directory.path.glob("c*"):
        assert (mirrored(store, tracked) / file.name).read_bytes() == file.read_bytes()
    assert (mirrored(store, tracked) / "checkpoint_3.pt").samefile(tracked.directory.path / "checkpoint_3.pt")


def test_other_file_system_gets_a_copy(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    tracked = TrackedRun(tmp_path)
    saved = tracked.save(1)
    assert tracked.close() == 0
    copy = mirrored(store, tracked) / saved.path.name
    assert not copy.samefile(saved.path)
    assert copy.read_bytes() == saved.path.read_bytes()


def test_copy_that_arrives_damaged_is_not_called_the_latest_and_is_made_again(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def damaging(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        attempts.append(store.get_run(tracked.run_id).data.tags.get("bdh.latest_checkpoint"))
        content = bytearray(source.read_bytes())
        content[9] ^= len(attempts) < 3
        target.write_bytes(content)

    monkeypatch.setattr(mirror, "link_or_copy", damaging)
    tracked = TrackedRun(tmp_path)
    saved = tracked.save(1)
    assert tracked.close() == 0
    assert attempts == [None, None, None]
    assert "arrived damaged" in tracked.notes[0]
    assert store.get_run(tracked.run_id).data.tags["bdh.latest_checkpoint"] == saved.manifest.artifact_path


def test_link_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    for _ in range(2):
        link_or_copy(tmp_path / "a", tmp_path / "b")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
        assert (tmp_path / "b").samefile(tmp_path / "a")


def test_retention_prunes_the_mirror_and_the_list_of_models(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, keep=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 3.0)):
        tracked.save(step, loss)
    assert tracked.close() == 0
    assert tracked.notes == []
    wanted = ["checkpoint_2.json", "checkpoint_2.pt", "checkpoint_4.json", "checkpoint_4.pt", "config.yaml"]
    assert sorted(p.name for p in mirrored(store, tracked).iterdir()) == wanted
    assert [m.step for m in MirrorReader(TrackingConfig()).search(tracked.run_id, best=False)] == [2, 4]


def test_checkpoint_that_retention_removed_before_it_was_mirrored_is_passed_over(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, keep=1)
    first = tracked.directory.save(state(1), PROVENANCE, None)
    checkpoint.remove(first)
    tracked.tracker.checkpoint(first.path, None)
    tracked.losses(1)
    assert tracked.close() == 0
    assert tracked.notes == []


def test_best_checkpoint_of_all_runs_is_one_query(store: MlflowClient, tmp_path: Path) -> None:
    runs = []
    for number, losses in enumerate(((3.0, 2.0), (2.5, 1.5, 1.75))):
        tracked = TrackedRun(tmp_path / str(number), training=str(number) * 32, run_name=f"run {number}")
        tracked.tracker.dataset(DatasetFacts(name="text (validation)", digest="d" * 32, folder="/data", profile={}, context="validation"))
        for step, loss in enumerate(losses, start=1):
            tracked.save(step, loss)
        assert tracked.close() == 0
        runs.append(tracked)
    (best,) = MirrorReader(TrackingConfig()).search(None, best=True)
    assert (best.step, best.val_loss, best.run_name) == (2, 1.5, "run 1")
    assert best.uri == f"runs:/{runs[1].run_id}/checkpoints/{runs[1].directory.path.name}/checkpoint_2.pt"
    assert [m.val_loss for m in MirrorReader(TrackingConfig()).search(None, best=False)] == [1.5, 1.75, 2.0, 2.5, 3.0]
    experiment = store.get_experiment_by_name("bdh")
    assert experiment is not None
    (model,) = store.search_logged_models([experiment.experiment_id], "name = 'bdh-step-3'")
    assert {(m.key, m.value, m.dataset_name) for m in model.metrics or []} == {
        ("val/loss", 1.75, "text (validation)"),
        ("val/bpb", bits_per_byte(1.75, 1.0), "text (validation)"),
    }
    assert len(store.get_metric_history(runs[1].run_id, "val/loss")) == 3  # linked, not logged a second time


def test_mirror_is_made_once_though_its_record_is_read_twice(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.save(1, 1.0)
    tracked.close()
    state_file = tracked.directory.path / "journal.json"
    state_file.write_text(
        state_file.read_text().replace('"files": ', '"files": 0, "lost": 0, "segment": 1, "x": ').replace(', "x": ', ', "points": ')
    )
    before = store.get_run(tracked.run_id)
    assert sync.sync(tracked.directory.path, None, quiet).left == 0
    after = store.get_run(tracked.run_id)
    assert (after.data.metrics, after.outputs) == (before.data.metrics, before.outputs)
    assert len(store.get_metric_history(tracked.run_id, "ckpt/upload_s")) == 1


def test_rewound_checkpoint_of_the_same_size_replaces_the_one_that_is_there(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the client, as with any store that is not a folder here."""
    monkeypatch.setattr(store_module, "local_path", lambda uri: None)
    tracked = TrackedRun(tmp_path)
    tracked.save(1)
    tracked.save(2)
    run_id = tracked.run_id
    tracked.close("KILLED")
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2)
    assert again.run_id == run_id
    other = {**state(1), "loss": 3.5}
    saved = again.directory.save(other, PROVENANCE, None)
    again.tracker.checkpoint(saved.path, None)
    assert again.close() == 0
    copied = Path(store.download_artifacts(run_id, f"checkpoints/{tracked.directory.path.name}", str(tmp_path)))
    checkpoint.verify(checkpoint.describe(copied / "checkpoint_1.pt"))
    assert (copied / "checkpoint_1.pt").read_bytes() == saved.path.read_bytes()
    assert store.get_run(run_id).data.tags["bdh.latest_checkpoint"].endswith("checkpoint_1.pt")


def test_checkpoint_that_is_offered_again_late_is_not_called_the_latest(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = requests.Response()
    answer.status_code = 413
    real, refusals = mirror.link_or_copy, iter([requests.HTTPError("413", response=answer)])

    def picky(source: Path, target: Path) -> None:
        if error := next(refusals, None):
            raise error
        real(source, target)

    monkeypatch.setattr(mirror, "link_or_copy", picky)
    tracked = TrackedRun(tmp_path)
    tracked.save(1)
    tracked.save(2)
    assert tracked.close() == 0  # the first was offered again at the end
    assert {m.step for m in MirrorReader(TrackingConfig()).search(tracked.run_id, best=False)} == {1, 2}
    assert store.get_run(tracked.run_id).data.tags["bdh.latest_checkpoint"].endswith("checkpoint_2.pt")


def test_upload_beside_a_training_keeps_its_pace_and_after_a_training_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    clock = [0.0]
    monkeypatch.setattr(mirror, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def wait(seconds: float) -> None:
        clock[0] += seconds

    read = b""
    with mirror.ThrottledFile(path, 1e6, wait) as file:
        while block := file.read(16384):
            read += block
            assert len(read) <= 1e6 * clock[0] + PIECE_BYTES + 16384
    assert read == path.read_bytes()
    assert clock[0] == pytest.approx(3.0, abs=0.3)
    before = clock[0]
    with mirror.ThrottledFile(path, 1e6, wait) as file:
        file.read(1_000_000)
        clock[0] += 60  # a pause is no reason to hurry
        while file.read(16384):
            pass
    assert clock[0] - before == pytest.approx(60 + 2.0, abs=0.3)
    with mirror.ThrottledFile(path, 1e6, lambda seconds: None) as file:  # nobody to spare any more
        assert file.read() == read
        file.seek(0)  # as a request that is sent again
        assert file.read() == read


@pytest.mark.parametrize(
    ("uri", "here"),
    [("http://127.0.0.1:5000/api", True), ("http://localhost", True), ("https://203.0.113.1/x", False), ("http://name.invalid:80", False)],
)
def test_server_on_this_machine_is_known_by_its_address(uri: str, here: bool) -> None:
    assert store.on_this_machine(uri) is here


def test_name_with_an_address_of_a_family_that_is_off_is_asked_for_its_other(monkeypatch: pytest.MonkeyPatch) -> None:
    off = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::1%nowhere", 80, 0, 0))
    here = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [off, here])
    assert store.on_this_machine("http://localhost")
