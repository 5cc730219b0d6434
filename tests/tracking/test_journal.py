"""What is appended is on disk first, and is read again from where it was acknowledged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bdh_mlflow.checkpoint import RunDirectory
from bdh_mlflow.tracking import journal
from bdh_mlflow.tracking.journal import Delivered, Entry, Journal, JournalIndex, JournalReader
from bdh_mlflow.tracking.records import CheckpointSaved, End, Points, Tags, Text
from tests.tracking.tracked import entries, segment


def points(step: int) -> Points:
    return Points(values={"train/loss": float(step)}, step=step)


def appended(folder: Path, *steps: int) -> Journal:
    made = Journal(folder)
    for step in steps:
        made.append(points(step))
    return made


def steps_of(found: list[Entry]) -> list[int]:
    return [entry.record.step for entry in found if isinstance(entry.record, Points)]


def steps(folder: Path) -> list[int]:
    return steps_of(entries(folder))


def read_all(reader: JournalReader, start: int = 0) -> list[Entry]:
    return list(reader.read(start, reader.index.update()))


def test_reading_goes_on_behind_what_was_acknowledged(tmp_path: Path) -> None:
    made = appended(tmp_path, 1, 2, 3)
    reader = JournalReader(tmp_path)
    first = read_all(reader)[0]
    reader.acknowledge(Delivered(run_id="r", points=first.end))
    made.append(points(4))
    assert steps_of(read_all(reader, reader.delivered().points)) == [2, 3, 4]
    assert journal.delivered(tmp_path) == Delivered(run_id="r", points=first.end)
    reader.close()


def test_record_longer_than_a_block_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BLOCK_BYTES", 7)
    appended(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]
    reader = JournalReader(tmp_path)
    first, second = read_all(reader)
    assert [e.end for e in reader.read(0, first.end)] == [first.end]
    assert [e.end for e in reader.read(first.end, second.end)] == [second.end] == [reader.index.update()]
    reader.close()


@pytest.mark.parametrize("torn", ['{"kind":"points","at_ms":5,"val', "{}", "null", "\x00\x00"])
def test_line_that_a_kill_cut_short_is_skipped_and_the_next_is_intact(tmp_path: Path, torn: str) -> None:
    appended(tmp_path, 1).close()
    with (tmp_path / journal.FILE_NAME).open("a") as file:
        file.write(torn)
    appended(tmp_path, 2).close()
    assert steps(tmp_path) == [1, 2]
    reader = JournalReader(tmp_path)
    assert reader.index.waiting(Delivered()) == 2
    reader.close()


def test_reader_follows_the_folder_when_it_becomes_the_run_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "checkpoints" / "run_20251108_143022", {})
    made = appended(run.folder, 1)
    reader = JournalReader(run.folder)
    run.make()
    made.append(points(2))
    reader.acknowledge(Delivered(points=7))
    assert steps_of(read_all(reader)) == [1, 2]
    assert journal.delivered(run.path) == Delivered(points=7)
    assert reader.is_training()
    run.close()
    assert not reader.is_training()
    reader.close()


def test_one_delivers_at_a_time(tmp_path: Path) -> None:
    appended(tmp_path, 1)
    first, second = JournalReader(tmp_path), JournalReader(tmp_path)
    assert first.claim(0)
    assert not second.claim(0)
    first.close()
    assert second.claim(0)
    second.close()


def test_record_is_safe_from_a_kill_once_append_has_returned(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from bdh_mlflow.tracking.journal import Journal\n"
        "from bdh_mlflow.tracking.records import Points\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for step in range(100): j.append(Points(values={}, step=step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == list(range(100))


def test_full_disk_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = appended(tmp_path, 1), os.write
    halves = iter([True, False])

    def full(file: int, data: bytes) -> int:
        if next(halves, False):
            return real(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    made.append(points(2))
    made.append(points(3))
    assert steps(tmp_path) == [1]
    with pytest.raises(OSError, match="bytes cannot be written"):
        made.sync()
    monkeypatch.setattr(os, "write", real)
    made.append(points(4))
    assert made.close() == 0
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_state_of_a_newer_version_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    appended(tmp_path, 1)
    (tmp_path / journal.STATE_NAME).write_text('{"run_id": "r", "points": 7, "checksums": {}}')
    assert journal.delivered(tmp_path) == Delivered(run_id="r", points=7)


def index_of(folder: Path) -> JournalIndex:
    return JournalReader(folder).index


def test_index_knows_the_segments_and_how_each_ended(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    made.append(segment(number=1))
    for step in (1, 2, 3):
        made.append(points(step))
    made.append(segment(number=2, first_step=2))
    made.append(points(3))
    made.append(Points(values={"perf/step_ms": 1.0}, step=9))  # not a completed step
    at_ms = made.append(End(status="FINISHED", tags={}, step=None))
    first, second = index_of(tmp_path).spans()
    assert (first.segment.number, first.end, first.last_step) == (1, None, 3)
    assert (second.segment.number, second.last_step, second.last_seen_ms, second.ended_at_ms) == (2, 3, at_ms, at_ms)
    assert second.end == End(status="FINISHED", tags={}, step=None)


def test_last_step_of_a_killed_segment_is_that_of_its_last_whole_line(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    made.append(segment())
    made.append(points(1))
    made.close()
    with (tmp_path / journal.FILE_NAME).open("a") as file:
        file.write('{"kind":"points","v":2,"at_ms":5,"values":{"train/loss":1.0}\n')  # cut behind a bracket
    (span,) = index_of(tmp_path).spans()
    assert span.last_step == 1


def test_index_counts_what_waits_in_each_lane_once(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    made.append(segment())
    made.append(points(1))
    made.append(Text(artifact="a.txt", text="a"))
    made.append(CheckpointSaved(path="/c.pt", evaluation=None))
    made.append(Tags(tags={}))
    made.append(End(status="FINISHED", tags={}, step=1))
    index = index_of(tmp_path)
    all_ends = [entry.end for entry in entries(tmp_path)]
    assert index.waiting(Delivered()) == 6
    assert index.waiting(Delivered(points=all_ends[1], files=all_ends[1])) == 4
    assert index.waiting(Delivered(points=all_ends[5], files=all_ends[1])) == 3  # text, checkpoint, and the end for the files
    assert index.waiting(Delivered(points=all_ends[5], files=all_ends[5])) == 1  # the store does not know how the run ended
    assert index.waiting(Delivered(points=all_ends[5], files=all_ends[5], segment=1, ended=1, set_aside=[all_ends[2]])) == 1
    assert index.waiting(Delivered(points=all_ends[5], files=all_ends[5], segment=1, ended=1)) == 0
    assert [index.points_end_before(end) for end in all_ends[:4]] == [all_ends[0], all_ends[1], all_ends[1], all_ends[1]]


def test_index_follows_what_is_appended_and_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Journal(tmp_path)
    made.append(segment())
    index = index_of(tmp_path)
    read, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(at) or real(file, size, at))
    before = index.update()
    made.append(Text(artifact="a.txt", text="first"))
    first = index.update()
    made.append(Text(artifact="a.txt", text="second"))
    second = index.update()
    assert min(read) >= before
    assert index.is_replaced_later("a.txt", first, second)
    assert not index.is_replaced_later("a.txt", first, first)
    assert not index.is_replaced_later("b.txt", 0, second)
    assert [end for _, end in index.files_between(before, second)] == [first, second]
    assert index.is_last_segment(before)
    assert not index.is_last_segment(0)
    made.append(CheckpointSaved(path="/c.pt", evaluation=None))
    assert not index.is_last_checkpoint(second) or index.update() > second
    assert not index.is_last_checkpoint(second)
