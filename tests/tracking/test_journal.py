"""What is told is on disk first, and is read again from where it was acknowledged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bdh_mlflow.checkpoint import RunDirectory
from bdh_mlflow.redact import masked
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.journal import Delivered, Journal, Ledger


def told(folder: Path, *steps: int) -> Journal:
    appended = Journal(folder)
    for step in steps:
        appended.append("points", values={"train/loss": float(step)}, step=step)
    return appended


def steps(folder: Path) -> list[int]:
    return [record.fields["step"] for record in journal.read(folder)]


def test_reading_goes_on_behind_what_was_acknowledged(tmp_path: Path) -> None:
    appended = told(tmp_path, 1, 2, 3)
    ledger = Ledger(tmp_path)
    first = next(iter(ledger.read(0)))
    ledger.acknowledge(Delivered(run_id="r", points=first.end))
    appended.append("points", values={}, step=4)
    assert [r.fields["step"] for r in ledger.read(ledger.delivered().points)] == [2, 3, 4]
    assert journal.delivered(tmp_path) == Delivered(run_id="r", points=first.end)
    ledger.close()


def test_record_longer_than_a_block_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BLOCK_BYTES", 7)
    told(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]
    ledger = Ledger(tmp_path)
    first, second = ledger.read(0)
    assert [r.end for r in ledger.read(0, first.end)] == [first.end]
    assert [r.end for r in ledger.read(first.end)] == [second.end] == [ledger.size()]
    ledger.close()


@pytest.mark.parametrize("torn", ['{"kind":"points","at_ms":5,"val', "{}", "null", "\x00\x00"])
def test_line_that_a_kill_cut_short_is_passed_over_and_the_next_is_whole(tmp_path: Path, torn: str) -> None:
    told(tmp_path, 1).close()
    with (tmp_path / journal.FILE_NAME).open("a") as file:
        file.write(torn)
    told(tmp_path, 2).close()
    assert steps(tmp_path) == [1, 2]


def test_reader_follows_the_folder_when_it_becomes_the_run_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "checkpoints" / "run_20251108_143022", "")
    appended = told(run.folder, 1)
    ledger = Ledger(run.folder)
    run.make()
    appended.append("points", values={}, step=2)
    ledger.acknowledge(Delivered(points=7))
    assert [r.fields["step"] for r in ledger.read(0)] == [1, 2]
    assert journal.delivered(run.path) == Delivered(points=7)
    assert ledger.training()
    run.close()
    assert not ledger.training()
    ledger.close()


def test_one_delivers_at_a_time(tmp_path: Path) -> None:
    told(tmp_path, 1)
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    assert first.claim(0)
    assert not second.claim(0)
    first.close()
    assert second.claim(0)
    second.close()


def test_record_is_safe_from_a_kill_once_append_has_returned(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from bdh_mlflow.tracking.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for step in range(100): j.append('points', values={}, step=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == list(range(100))


def test_full_disk_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    appended, real = told(tmp_path, 1), os.write
    halves = iter([True, False])

    def full(file: int, data: bytes) -> int:
        if next(halves, False):
            return real(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    appended.append("points", values={}, step=2)
    appended.append("points", values={}, step=3)
    assert steps(tmp_path) == [1]
    with pytest.raises(OSError, match="bytes cannot be written"):
        appended.sync()
    monkeypatch.setattr(os, "write", real)
    appended.append("points", values={}, step=4)
    assert appended.close() == 0
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see s3://k:pw@h/x and https://u:p%40q@h ok", "see s3://k:***@h/x and https://u:***@h ok"),
        ("--set tracking.tracking_uri=http://me:secret@host", "--set tracking.tracking_uri=http://me:***@host"),
        ("pkg @ git+https://ghp_abc@github.com/x", "pkg @ git+https://***@github.com/x"),
        ("git+ssh://git@github.com/x", "git+ssh://git@github.com/x"),
        ("https://h/x?sig=abc&a=1&api_key=z", "https://h/x?sig=***&a=1&api_key=***"),
        ("no uri: a@b", "no uri: a@b"),
    ],
)
def test_secrets_of_uris_are_masked_wherever_they_stand(text: str, shown: str) -> None:
    assert masked(text) == shown
