"""Files of another program as checkpoints: taken as they are at one moment, described, listed, verified, kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import RunDirectory, Snapshot, SnapshotOrigin
from bdh_mlflow.errors import CheckpointError, InputError, SaveError
from tests.checkpoint.test_files import AT

ORIGIN = SnapshotOrigin(1, None, None, {"bdh-mlflow": "0.2.0"}, "loss", False)


def run_directory(folder: Path) -> RunDirectory:
    return RunDirectory.new(folder / "checkpoints", {}, AT)


def snapshot(directory: RunDirectory, given: Path, step: int = 5, **metrics: float) -> Snapshot:
    taken = directory.take(given, step, written_once=False)
    return directory.complete(taken, ORIGIN, metrics, "a" * 32, lambda worked_s: None)


def folder_of_files(folder: Path) -> Path:
    (folder / "out" / "shards" / "0").mkdir(parents=True)
    (folder / "out" / "model.safetensors").write_bytes(b"weights")
    (folder / "out" / "shards" / "0" / "part").write_bytes(b"")
    return folder / "out"


def test_a_folder_is_a_checkpoint_with_all_its_files(tmp_path: Path) -> None:
    saved = snapshot(run_directory(tmp_path), folder_of_files(tmp_path))
    assert saved.path == tmp_path / "checkpoints" / "run_20251108_143022" / "checkpoint_5"
    assert [(f.name, f.said.name, f.said.bytes) for f in saved.files] == [
        ("checkpoint_5/model.safetensors", "model.safetensors", 7),
        ("checkpoint_5/shards/0/part", "shards/0/part", 0),
    ]
    assert saved.content == saved.path
    assert checkpoint.describe(saved.path) == saved
    checkpoint.verify(saved)
    assert checkpoint.newest(saved.path.parent) == (saved, [])
    assert saved.manifest.artifact_path == "checkpoints/run_20251108_143022/checkpoint_5"


def test_a_file_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"state")
    saved = snapshot(run_directory(tmp_path), tmp_path / "last.ckpt")
    assert saved.content == saved.path / "last.ckpt"
    assert saved.content.read_bytes() == b"state"
    assert saved.manifest.digest == checkpoint.file_digest(saved.content)


@pytest.mark.parametrize("written_once", [False, True])
def test_what_happens_to_the_files_afterwards_changes_nothing(tmp_path: Path, written_once: bool) -> None:
    given, directory = folder_of_files(tmp_path), run_directory(tmp_path)
    taken = directory.take(given, 5, written_once=written_once)
    if written_once:
        shutil.rmtree(given)  # as a trainer that keeps the newest alone does
        saved = directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
    else:
        (given / "model.safetensors").write_bytes(b"another")  # into the same file
        saved = directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
        (given / "model.safetensors").write_bytes(b"a third")
    assert (saved.path / "model.safetensors").read_bytes() == b"weights"
    assert all(file.path.stat().st_nlink == 1 for file in saved.files), "a mirror links to these: nobody else may write into them"
    checkpoint.verify(saved)


def test_files_of_its_owner_are_only_read(tmp_path: Path) -> None:
    given, directory = folder_of_files(tmp_path), run_directory(tmp_path)
    (given / "model.safetensors.partial").write_bytes(b"mine")
    (given / ".model.safetensors.partial").write_bytes(b"mine too")
    taken = directory.take(given, 5, written_once=True)
    saved = directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
    checkpoint.copy_of(given, tmp_path / "copy", directory.path)
    for folder in (given, saved.path, tmp_path / "copy"):
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == {
            "model.safetensors": b"weights", "model.safetensors.partial": b"mine", ".model.safetensors.partial": b"mine too",
        }  # fmt: skip


def test_a_linked_file_that_is_written_into_is_no_checkpoint(tmp_path: Path) -> None:
    given, directory = tmp_path / "last.pt", run_directory(tmp_path)
    given.write_bytes(b"1" * 9)
    taken = directory.take(given, 5, written_once=True)
    given.write_bytes(b"2" * 9)
    with pytest.raises(InputError, match=r"last\.pt was written into before it was copied, so step 5 is no checkpoint"):
        directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
    assert checkpoint.list_run(directory.path) == checkpoint.Listing((), ()), "nothing is left of it"


def test_where_nothing_can_be_linked_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    given, directory = tmp_path / "last.pt", run_directory(tmp_path)
    given.write_bytes(b"1")
    taken = directory.take(given, 5, written_once=True)
    given.write_bytes(b"2")
    saved = directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
    assert saved.content.read_bytes() == b"1"


def test_large_files_are_copied_whole_also_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3 << 20) + b"end"
    (tmp_path / "big").write_bytes(content)
    assert snapshot(run_directory(tmp_path), tmp_path / "big", 1).content.read_bytes() == content
    monkeypatch.delattr(os, "copy_file_range")
    assert snapshot(run_directory(tmp_path), tmp_path / "big", 2).content.read_bytes() == content


def test_a_later_one_of_the_step_replaces_the_earlier(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    first = snapshot(directory, folder_of_files(tmp_path))
    (tmp_path / "last.pt").write_bytes(b"later")
    saved = snapshot(directory, tmp_path / "last.pt")
    assert saved.path == first.path
    assert [path.name for path in saved.path.iterdir()] == ["last.pt"]
    assert checkpoint.list_run(directory.path).checkpoints == (saved,)


def test_links_in_a_folder_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    given = folder_of_files(tmp_path)
    (tmp_path / "shared.bin").write_bytes(b"shared")
    (given / "config").symlink_to(tmp_path / "shared.bin")
    (given / "again").symlink_to(given)
    for name in ("one", "two"):
        (given / name).symlink_to(given / "shards")
    (given / "shards" / "back").symlink_to(given)
    saved = snapshot(run_directory(tmp_path), given)
    assert {f.said.name for f in saved.files} == {"config", "model.safetensors", "shards/0/part", "one/0/part", "two/0/part"}
    assert not (saved.path / "config").is_symlink()


def _empty(folder: Path) -> Path:
    (folder / "empty" / "inside").mkdir(parents=True)
    return folder / "empty"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _nowhere(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / "link").symlink_to(folder / "gone")
    return folder / "d"


def _strange(folder: Path) -> Path:
    (folder / "e").mkdir()
    Path(os.fsdecode(os.fsencode(folder / "e") + b"/\xff")).write_bytes(b"")
    return folder / "e"


def _named(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"")
    return folder / name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone", r"gone: no such file or folder \(looked in "),
        (_empty, "empty: an empty folder, which is no checkpoint"),
        (_pipe, "pipe: not a regular file, which alone can be kept"),
        (_nowhere, "link: a link that leads nowhere"),
        (_strange, "not every artifact store gives back a file of such a name; rename it"),
        (lambda folder: _named(folder, "a#b"), "not every artifact store gives back a file of such a name; rename it"),
        (lambda folder: _named(folder, "a%20b"), "not every artifact store gives back a file of such a name; rename it"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    directory = run_directory(tmp_path)
    with pytest.raises(InputError, match=message):
        directory.take(make(tmp_path), 5, written_once=False)
    assert list(directory.path.glob("checkpoint_*")) == []


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last.pt").write_bytes(b"1")
    directory = run_directory(tmp_path)
    taken = directory.take(tmp_path / "last.pt", 5, written_once=False)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"last\.pt: not saved: No space left on device"):
        directory.complete(taken, ORIGIN, {}, None, lambda worked_s: None)
    assert list(directory.path.iterdir()) == []


def test_an_interrupted_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"1")
    directory = run_directory(tmp_path)
    directory.take(tmp_path / "last.pt", 5, written_once=False)
    assert checkpoint.list_run(directory.path).rejected == ((directory.path / "checkpoint_5.partial", "the save was interrupted"),)


def test_damage_is_found(tmp_path: Path) -> None:
    saved = snapshot(run_directory(tmp_path), folder_of_files(tmp_path))
    (saved.path / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged \(sha256 "):
        checkpoint.verify(checkpoint.describe(saved.path))
    (saved.path / "shards" / "0" / "part").unlink()
    with pytest.raises(CheckpointError, match="part: No such file or directory"):
        checkpoint.describe(saved.path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "."])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    saved = snapshot(run_directory(tmp_path), folder_of_files(tmp_path))
    tree = json.loads(saved.manifest_path.read_text())
    tree["files"][0]["name"] = name
    saved.manifest_path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="is not a manifest: files"):
        checkpoint.describe(saved.path)


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    directory, given = run_directory(tmp_path), folder_of_files(tmp_path)
    saved = [snapshot(directory, given, step, loss=loss) for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")))]
    assert checkpoint.best(saved) == saved[1]
    for old in checkpoint.expired(directory.path, 1, 4):
        checkpoint.remove(old)
    assert [c.manifest.step for c in checkpoint.list_run(directory.path).checkpoints] == [2, 4]
    assert sorted(p.name for p in directory.path.glob("checkpoint_*")) == [
        "checkpoint_2", "checkpoint_2.json", "checkpoint_4", "checkpoint_4.json",
    ]  # fmt: skip


def test_scores_of_another_metric_do_not_compare(tmp_path: Path) -> None:
    directory, given = run_directory(tmp_path), folder_of_files(tmp_path)
    saved = []
    for step, (best, value) in enumerate((("accuracy", 0.9), ("loss", 2.3), ("loss", 2.5)), 1):
        taken = directory.take(given, step, written_once=False)
        saved.append(directory.complete(taken, SnapshotOrigin(1, None, None, {}, best, best == "accuracy"), {best: value}, None, print))
    assert checkpoint.best(saved) == saved[1]
    assert [c.manifest.step for c in checkpoint.expired(directory.path, 1, 3)] == [1]


def test_the_current_folder_has_a_name_and_must_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of_files(tmp_path))
    saved = snapshot(run_directory(tmp_path), Path())
    assert (saved.manifest.name, checkpoint.describe(saved.path)) == ("out", saved)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"holds the run directory .* itself; name a folder with the checkpoint alone"):
        snapshot(run_directory(tmp_path), Path())
    with pytest.raises(InputError, match=r"holds the run directory .* itself; name a folder without it"):
        checkpoint.copy_of(tmp_path, tmp_path / "copy", saved.path.parent)


def test_copies_have_the_modes_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"")
    (tmp_path / "there").mkdir()
    checkpoint.copy_of(tmp_path / "new", tmp_path / "there" / "copy", tmp_path)
    assert (tmp_path / "there" / "copy").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert not list(tmp_path.glob(".*"))


def test_scores_turn_round_where_higher_is_better(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    directory = run_directory(tmp_path)
    saved = []
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7)):
        taken = directory.take(tmp_path / "f", step, written_once=False)
        origin = SnapshotOrigin(1, None, None, {}, "accuracy", True)
        saved.append(directory.complete(taken, origin, {"accuracy": accuracy}, None, lambda worked_s: None))
    assert checkpoint.best(saved) == saved[1]
    tags = saved[1].manifest.score_as_tags()
    assert tags == {"bdh.best_metric": "accuracy (higher is better)", "bdh.best_value": "0.9"}
    assert saved[2].manifest.score_in(tags) == -0.9
    assert saved[2].manifest.score_in({**tags, "bdh.best_metric": "loss (lower is better)"}) == float("inf")
