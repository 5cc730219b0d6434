"""What a manifest says, what is none, and which checkpoint is the last or the best by it."""

import dataclasses
import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow import checkpoint
from bdh_mlflow.errors import CheckpointError
from tests.checkpoint.test_files import PROVENANCE, new, state


def only_file(path: Path, **fields: Any) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": checkpoint.file_digest(path), **fields}


def saved_with(folder: Path, number: int, **fields: Any) -> checkpoint.Checkpoint:
    """A checkpoint whose manifest says what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint_{number}.pt"
    path.write_bytes(b"x")
    usual = {
        **dataclasses.asdict(PROVENANCE), "step": number, "tokens_seen": 1, "files": [only_file(path)], "loss": 1.0, "val_loss": None,
        "run_dir": folder.name, "artifact_path": "", "saved_at": "",
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps({**usual, **fields}))
    found = checkpoint.describe(path)
    assert isinstance(found, checkpoint.Checkpoint)
    return found


def test_all_files_of_a_manifest_belong_to_the_checkpoint(tmp_path: Path) -> None:
    shard = tmp_path / "shard_7.bin"
    shard.write_bytes(b"shard")
    (tmp_path / "checkpoint_7.pt").write_bytes(b"x")
    files = [only_file(tmp_path / "checkpoint_7.pt"), only_file(shard)]
    saved = saved_with(tmp_path, 7, files=files)
    assert saved.manifest.bytes == 6
    checkpoint.verify(saved)
    shard.write_bytes(b"Shard")
    with pytest.raises(CheckpointError, match=r"shard_7.bin: damaged .sha256"):
        checkpoint.verify(saved)
    shard.write_bytes(b"shar")
    with pytest.raises(CheckpointError, match=r"shard_7.bin: damaged .4 bytes, its manifest says 5"):
        checkpoint.describe(saved.path)
    checkpoint.remove(saved)
    assert list(tmp_path.iterdir()) == []


def test_manifest_of_0_2_0_is_that_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_7.pt").write_bytes(b"x")
    new = saved_with(tmp_path, 7)
    tree = json.loads(new.manifest_path.read_text())
    (only,) = tree.pop("files")
    new.manifest_path.write_text(json.dumps({**tree, "bytes": only["bytes"], "sha256": only["sha256"]}))
    assert checkpoint.describe(new.path) == new
    checkpoint.verify(new)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_never_the_best_and_never_kept_for_it(tmp_path: Path, loss: float) -> None:
    folder = tmp_path / "run_20251108_143022"
    for step, val_loss in ((1, loss), (2, 1.0), (3, loss), (4, 1.5), (5, None)):
        saved_with(folder, step, val_loss=val_loss)
    best = checkpoint.best(checkpoint.list_run(folder).checkpoints)
    assert best is not None
    assert best.manifest.step == 2
    assert [c.manifest.step for c in checkpoint.expired(folder, 1, 5)] == [1, 3, 4]
    assert checkpoint.best((saved_with(folder, 1, val_loss=loss),)) is None


def test_latest_is_the_run_saved_to_last_whatever_the_zone_and_the_name_of_its_folder(tmp_path: Path) -> None:
    """At 3:00 in Berlin on 26 October 2025 it became 2:00: text and names say the opposite of the order."""
    times = {
        "run_20251026_020500": "2025-10-26T02:05:00+0100",  # third
        "run_20251026_025500": "2025-10-26T02:55:00+0200",  # first
        "run_20251026_010000": "2025-10-26T01:30:00.000001+00:00",  # fourth
        "run_20251025_210100": "2025-10-25T21:01:00-0400",  # second
    }
    for name, saved_at in times.items():
        saved_with(tmp_path / name, 1, saved_at=saved_at)
    latest_first = [folder.name for folder in checkpoint.by_last_save(tmp_path)]
    assert latest_first == ["run_20251026_010000", "run_20251026_020500", "run_20251025_210100", "run_20251026_025500"]


def test_a_clock_that_was_set_back_does_not_make_a_save_an_earlier_one(tmp_path: Path) -> None:
    ahead = datetime.now().astimezone() + timedelta(hours=3)
    saved_with(tmp_path / "checkpoints" / "run_20991231_235959", 1, saved_at=ahead.isoformat())
    run = new(tmp_path)
    first, second = (run.save(state(step), PROVENANCE, None) for step in (1, 2))
    assert ahead < first.saved_at < second.saved_at
    assert checkpoint.by_last_save(tmp_path / "checkpoints")[0] == run.path


@pytest.mark.parametrize("saved_at", ["9999-12-31T23:59:59+0000", "0001-01-01T00:00:00+1400", "2199-01-01T00:00:00+0000"])
def test_a_time_that_cannot_be_is_no_reason_not_to_save(tmp_path: Path, saved_at: str) -> None:
    saved_with(tmp_path / "checkpoints" / "run_20240101_000000", 1, saved_at=saved_at)
    saved = new(tmp_path).save(state(1), PROVENANCE, None)
    assert abs(saved.saved_at - datetime.now().astimezone()) < timedelta(minutes=1)


def test_a_manifest_without_a_time_counts_by_the_time_of_its_file(tmp_path: Path) -> None:
    old, young = (saved_with(tmp_path / f"run_2025110{day}_000000", 1, saved_at="yesterday") for day in (2, 1))
    os.utime(old.manifest_path, (1, 1))
    assert [folder.name for folder in checkpoint.by_last_save(tmp_path)] == [young.path.parent.name, old.path.parent.name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": "7"}, "missing or invalid: step"),
        ({"step": None, "files": [{"name": "checkpoint_7.pt", "bytes": 1.5, "sha256": ""}]}, "missing or invalid: step, files.0.bytes"),
        ({"files": []}, "files are none"),
        ({"files": [{"name": "../checkpoint_7.pt", "bytes": 1, "sha256": ""}]}, "files '../checkpoint_7.pt'"),
        ({"files": [{"name": "", "bytes": 1, "sha256": ""}]}, "files ''"),
        ({"step": -1}, "step -1 in a run directory"),
        ({"step": 8}, "is of step 8"),
        ({"versions": ["torch"]}, "missing or invalid: versions"),
        ({"versions": {"torch": 2}}, "missing or invalid: versions.torch"),
        ({"git_dirty": "no"}, "missing or invalid: git_dirty"),
        ({"run_dir": "../elsewhere"}, "run directory '../elsewhere'"),
        ({"run_dir": "/etc"}, "run directory '/etc'"),
        ({"run_dir": ".."}, "run directory '..'"),
    ],
)
def test_a_manifest_with_values_of_another_kind_is_none(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = tmp_path / "run_20251108_143022"
    with pytest.raises(CheckpointError) as caught:
        saved_with(folder, 7, **fields)
    assert message in str(caught.value)
    assert [path.name for path, _ in checkpoint.list_run(folder).rejected] == ["checkpoint_7.pt"]


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, '{"step": ' + "1" * 5000 + "}", "\x00", '{"step": NaN}'])
def test_a_manifest_that_is_no_json_object_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "checkpoint_7.pt"
    path.write_bytes(b"x")
    path.with_suffix(".json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a manifest"):
        checkpoint.describe(path)
