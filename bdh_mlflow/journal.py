"""What was measured, on disk before anyone is told: a line per point in time, appended, never changed.

The sender behind the loop is allowed to lag, so a killed process takes unsent points with it. The journal has them: it is in the run
directory before a checkpoint is, so whoever resumes from a checkpoint finds every point up to it, and sends what the server lacks. A line
cut short by a kill is no record. Knows nothing of MLflow.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

FILE_NAME = "journal.jsonl"


class Record(NamedTuple):
    """Points of several curves at one step.   at_ms: when they were measured, Unix time."""

    values: dict[str, float]
    step: int
    at_ms: int


class Journal:
    """Keeps records in memory until it is given a file, then in the file."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None

    def append(self, values: Mapping[str, float], step: int, at_ms: int) -> None:
        """Keep a record; when there is a file it is with the operating system, safe from a kill, on return."""
        line = json.dumps({"at_ms": at_ms, "step": step, "values": dict(values)}) + "\n"
        if self._file is None:
            self._waiting.append(line)
        else:
            self._file.write(line)
            self._file.flush()

    def keep_in(self, folder: Path) -> None:
        """From now on in `folder`, with what has waited; a second call changes nothing.   Raises OSError."""
        if self._file is not None:
            return
        path = folder / FILE_NAME
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" * torn + "".join(self._waiting))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._waiting.clear()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def read(folder: Path) -> Iterator[Record]:
    """Records in a run directory, oldest first; none if it has no journal."""
    path = folder / FILE_NAME
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                tree = json.loads(line)
                yield Record(tree["values"], tree["step"], tree["at_ms"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill
