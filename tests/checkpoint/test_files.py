"""Whole files or none."""

import dataclasses
import errno
import json
import os
import pickle
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_mlflow import (
    checkpoint,
    files,
)
from bdh_mlflow.checkpoint import BackgroundWriter, Provenance, RunDirectory, Throttle
from bdh_mlflow.errors import CheckpointError, ResumeError, SaveError
from bdh_mlflow.text import Evaluation

AT = datetime(2025, 11, 8, 14, 30, 22)
PROVENANCE = Provenance("a" * 32, 1, "c0ffee", True, "c" * 16, "d" * 32, {"torch": "2"})


def state(step: int) -> dict[str, Any]:
    return {"step": step, "tokens_seen": step * 10, "loss": 2.5, "model_state_dict": {"encoder": torch.full((3,), float(step))}}


def new(tmp_path: Path) -> RunDirectory:
    return RunDirectory.new(tmp_path / "checkpoints", {"config.yaml": b"seed: 1\n"}, AT)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_directory_is_made_with_the_first_checkpoint_and_not_before(tmp_path: Path) -> None:
    run = new(tmp_path)
    assert checkpoint.list_all(tmp_path / "checkpoints") == []
    (run.folder / "journal.jsonl").write_text("told before\n")
    run.save(state(500), PROVENANCE, None)
    assert run.path == tmp_path / "checkpoints" / "run_20251108_143022"
    assert names(tmp_path / "checkpoints") == ["run_20251108_143022"]
    assert names(run.path) == ["checkpoint_500.json", "checkpoint_500.pt", "config.yaml", "journal.jsonl"]
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"


def test_run_that_saved_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = new(tmp_path)
    (run.folder / "journal.jsonl").write_text("told\n")
    run.discard()
    assert list(tmp_path.iterdir()) == []
    saved = new(tmp_path)
    saved.save(state(1), PROVENANCE, None)
    saved.discard()
    assert (saved.path / "checkpoint_1.pt").is_file()


def test_two_runs_of_one_second_have_two_directories(tmp_path: Path) -> None:
    runs = [new(tmp_path) for _ in range(3)]
    for run in runs:
        run.save(state(1), PROVENANCE, None)
    assert [r.path.name for r in runs] == ["run_20251108_143022", "run_20251108_143023", "run_20251108_143024"]


def test_new_run_in_the_second_of_a_finished_one_does_not_move_into_its_directory(tmp_path: Path) -> None:
    first = new(tmp_path)
    first.save(state(1), PROVENANCE, None)
    first.close()
    second = new(tmp_path)
    assert second.folder != first.path
    second.save(state(1), PROVENANCE, None)
    assert second.path.name == "run_20251108_143023"


def test_directory_that_another_process_trains_in_is_refused(tmp_path: Path) -> None:
    first = new(tmp_path)
    first.save(state(1), PROVENANCE, None)
    with pytest.raises(ResumeError, match="another process is training this run"):
        RunDirectory(first.path, {})
    first.close()
    RunDirectory(first.path, {}).close()


def test_background_write_holds_what_the_state_was_when_it_was_handed_over() -> None:
    written: list[dict[str, Any]] = []
    go_on = threading.Event()

    def slow(given: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        go_on.wait(10)
        written.append(given)

    writer = BackgroundWriter(slow)
    weights, steps = torch.zeros(3), [torch.tensor(1.0)]
    writer.save({"model": {"w": weights}, "optimizer": {"steps": steps, "name": "adamw"}}, None)
    weights += 1
    steps[0] += 1
    assert written == []  # the caller was not held up
    go_on.set()
    writer.finish()
    assert written[0]["model"]["w"].tolist() == [0.0, 0.0, 0.0]
    assert written[0]["optimizer"] == {"steps": [torch.tensor(1.0)], "name": "adamw"}


def test_next_save_waits_for_the_one_before_it() -> None:
    at_work, most = 0, 0

    def write(given: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.01)
        at_work -= 1

    writer = BackgroundWriter(write)
    for _ in range(5):
        writer.save({"x": torch.zeros(1)}, None)
    writer.finish()
    assert most == 1


def test_writer_rests_between_pieces_until_it_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh_mlflow.checkpoint.writer.IDLE_RATIO", 1e9)  # a rest that ends only when somebody waits
    run = new(tmp_path)

    def keep(given: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        run.save(given, PROVENANCE, evaluation, throttle)

    writer = BackgroundWriter(keep)
    writer.save(state(1), None)
    time.sleep(0.2)
    assert not checkpoint.list_run(run.path).checkpoints
    writer.finish()
    (saved,) = checkpoint.list_run(run.path).checkpoints
    assert [file.sha256 for file in saved.manifest.files] == [checkpoint.file_digest(saved.path)]


def test_failed_background_write_is_raised_once_by_whoever_asks_next() -> None:
    def full(given: dict[str, Any], evaluation: Evaluation | None, throttle: Throttle) -> None:
        raise SaveError("disk full")

    writer = BackgroundWriter(full)
    for ask in (writer.finish, lambda: writer.save({}, None)):
        writer.save({}, None)
        with pytest.raises(SaveError, match="disk full"):
            ask()
        writer.check()


def test_state_is_written_though_the_system_refuses_the_niceness(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: int) -> None:
        raise PermissionError("setpriority")

    monkeypatch.setattr(os, "setpriority", refused)
    written = []
    writer = BackgroundWriter(lambda given, evaluation, throttle: written.append(evaluation))
    writer.save({}, Evaluation(1, 1.5, 0))
    writer.finish()
    assert written == [Evaluation(1, 1.5, 0)]


def test_retention_leaves_files_of_other_runs_alone(tmp_path: Path) -> None:
    run = new(tmp_path)
    for step, provenance in ((1, PROVENANCE), (2, dataclasses.replace(PROVENANCE, mlflow_run_id="b" * 32))):
        run.save(state(step), provenance, None)
    assert checkpoint.expired(run.path, keep=1, up_to=2) == []


def test_checkpoint_opens_with_weights_only_and_holds_what_was_given(tmp_path: Path) -> None:
    saved = new(tmp_path).save(state(7), PROVENANCE, None)
    loaded = torch.load(saved.path, weights_only=True)
    assert loaded.pop("model_state_dict")["encoder"].tolist() == [7.0] * 3
    assert loaded == {"format": checkpoint.FORMAT, "step": 7, "tokens_seen": 70, "loss": 2.5}


def test_equal_states_are_equal_files_whether_they_were_loaded_or_not(tmp_path: Path) -> None:
    name = "".join(["st", "ep"])  # equal to the literal, and another object
    one = {**state(1), "groups": [{"step": 1, "betas": (0.9, 0.999)}, {"step": 2}]}
    other = {**state(1), "groups": [{name: 1, "betas": (0.9, 0.999)}, {"step": 2}]}
    first = new(tmp_path).save(one, PROVENANCE, None)
    loaded = {key: value for key, value in checkpoint.load(first.path).items() if key != "format"}
    digests = {first.manifest.files[0].sha256}
    digests |= {new(tmp_path / str(i)).save(each, PROVENANCE, None).manifest.files[0].sha256 for i, each in enumerate((other, loaded))}
    assert len(digests) == 1


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT + 1, "step": 7}, tmp_path / "checkpoint_7.pt")
    with pytest.raises(
        CheckpointError, match=rf"its format is {checkpoint.FORMAT + 1}, of a later version of bdh-mlflow; this one reads up to"
    ):
        checkpoint.load(tmp_path / "checkpoint_7.pt")


def test_manifest_vouches_for_the_file(tmp_path: Path) -> None:
    saved = new(tmp_path).save(state(7), PROVENANCE, Evaluation(7, 2.25, 0))
    manifest = json.loads(saved.manifest_path.read_text())
    size = saved.path.stat().st_size
    assert manifest["files"] == [{"name": "checkpoint_7.pt", "bytes": size, "sha256": checkpoint.file_digest(saved.path)}]
    assert manifest["artifact_path"] == "checkpoints/run_20251108_143022/checkpoint_7.pt"
    assert (manifest["step"], manifest["val_loss"], manifest["git_dirty"], manifest["segment"]) == (7, 2.25, True, 1)
    assert checkpoint.describe(saved.path) == saved
    checkpoint.verify(saved)


def test_interrupted_save_is_invisible(tmp_path: Path) -> None:
    run = new(tmp_path)
    first = run.save(state(1), PROVENANCE, None)
    (run.path / "checkpoint_2.pt.partial").write_bytes(b"half")
    (run.path / "checkpoint_3.pt").write_bytes(b"renamed, but killed before the manifest")
    listing = checkpoint.list_run(run.path)
    assert listing.checkpoints == (first,)
    assert [(p.name, reason) for p, reason in listing.rejected] == [
        ("checkpoint_2.pt.partial", "the save was interrupted"),
        ("checkpoint_3.pt", "not a checkpoint (no manifest checkpoint_3.json beside it: the save was interrupted)"),
    ]
    newest, passed_over = checkpoint.newest(run.path)
    assert newest == first
    assert len(passed_over) == 2


@pytest.mark.parametrize("where", ["flip", "cut"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, where: str) -> None:
    run = new(tmp_path)
    first, second = (run.save(state(step), PROVENANCE, None) for step in (1, 2))
    raw = bytearray(second.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    second.path.write_bytes(raw if where == "flip" else raw[:-1])
    newest, passed_over = checkpoint.newest(run.path)
    assert newest == first
    assert len(passed_over) == 1
    assert str(second.path) in passed_over[0]
    assert "damaged" in passed_over[0]


def test_rewriting_a_step_never_leaves_the_old_manifest_with_the_new_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new(tmp_path)
    run.save(state(1), PROVENANCE, None)
    monkeypatch.setattr(checkpoint.files, "atomic_write", _fail_for_json(files.atomic_write))
    with pytest.raises(SaveError):
        run.save({**state(1), "loss": 9.0}, PROVENANCE, None)
    assert checkpoint.newest(run.path)[0] is None


def _fail_for_json(real: Any) -> Any:
    def fail(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, content)

    return fail


def test_full_disk_keeps_the_previous_checkpoint_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new(tmp_path)
    first = run.save(state(1), PROVENANCE, None)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"checkpoint_2\.pt: not saved: No space left on device. Earlier checkpoints are untouched"):
        run.save(state(2), PROVENANCE, None)
    assert names(run.path) == ["checkpoint_1.json", "checkpoint_1.pt", "config.yaml"]
    checkpoint.verify(first)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, write in {
        "a.pt": lambda p: torch.save({"x": Evil()}, p),
        "b.pt": lambda p: p.write_bytes(pickle.dumps(Evil(), protocol=2)),
    }.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"refused: it holds Python objects"):
            checkpoint.load(tmp_path / name)
    assert not Path("owned").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_other_files_are_not_checkpoints(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: (not a checkpoint|refused)"):
        checkpoint.load(tmp_path / "x.pt")


def test_files_of_other_programs_are_recognised_by_their_weights() -> None:
    weights = {"encoder": torch.ones(1), "lm_head": torch.ones(1), "attn.freqs": torch.ones(1)}
    for layout in (weights, {"step": 3, "model_state_dict": weights}, {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}}):
        found = checkpoint.published_weights(layout)
        assert found is not None
        assert set(found) == set(weights)
    assert checkpoint.published_weights({"format": 1, "model_state_dict": weights}) is None
    assert checkpoint.published_weights({"step": 3}) is None


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = new(tmp_path)
    for step, val_loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        run.save(state(step), PROVENANCE, None if val_loss is None else Evaluation(step, val_loss, 0))
    assert [c.manifest.step for c in checkpoint.expired(run.path, keep=1, up_to=3)] == [1]  # 4 and 5 are not mirrored yet
    gone = checkpoint.expired(run.path, keep=2, up_to=5)
    assert [c.manifest.step for c in gone] == [1, 3]
    assert checkpoint.expired(run.path, keep=None, up_to=5) == []
    for c in gone:
        checkpoint.remove(c)
    assert [c.manifest.step for c in checkpoint.list_run(run.path).checkpoints] == [2, 4, 5]


def test_place_that_cannot_be_written_is_known_before_anything_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert checkpoint.why_unwritable(tmp_path / "new" / "deep") is None
    assert "is not a folder" in str(checkpoint.why_unwritable(tmp_path / "file" / "below"))
    assert names(tmp_path) == ["file"]


def test_manifest_of_a_newer_version_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    saved = new(tmp_path).save(state(1), PROVENANCE, None)
    tree = json.loads(saved.manifest_path.read_text())
    saved.manifest_path.write_text(
        json.dumps({**tree, "shards": [{"name": "checkpoint_1.pt"}], "files": [{**tree["files"][0], "codec": "zstd"}]})
    )
    assert checkpoint.describe(saved.path) == saved
    assert checkpoint.newest(saved.path.parent) == (saved, [])


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"step": 1', b"\xff\xfe", b'"text"'])
def test_what_is_no_manifest_is_named_and_skipped(tmp_path: Path, content: bytes) -> None:
    run = new(tmp_path)
    first, second = (run.save(state(step), PROVENANCE, None) for step in (1, 2))
    second.manifest_path.write_bytes(content)
    found, skipped = checkpoint.newest(run.path)
    assert found == first
    assert len(skipped) == 1
    assert "checkpoint_2.json is not a manifest" in skipped[0]
