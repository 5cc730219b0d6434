"""`segments.json` among the artifacts of a run: a row for each process, or group of them, that has worked on it, anywhere."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bdh_mlflow.tracking.journal import SegmentSpan

FILE_NAME = "segments.json"


@dataclass
class SegmentRow:
    """One process, rank 0 of a group.

    first_step, last_step: completed updates when it began and when it wrote last.   *_ms: Unix time in ms, ended_at_ms None while it runs
    or if it was killed.   reason: how it ended; None while it runs.   downtime_s: between the segment before and this one.   mlflow_run:
    the run that `mlflow run` made for it.   processes, hosts, threads, reduction: as in the record; not known of versions up to 0.2.0.
    """

    segment: int
    host: str
    pid: int
    device: str
    versions: dict[str, str]
    started_at_ms: int
    first_step: int
    last_step: int
    ended_at_ms: int | None
    last_seen_ms: int
    reason: str | None
    downtime_s: float
    mlflow_run: str | None
    processes: int = 1
    hosts: list[str] = field(default_factory=list)
    threads: int = 0
    reduction: str = ""


_ROW = TypeAdapter(SegmentRow)


def row_of(span: SegmentSpan) -> SegmentRow:
    """The row of a segment in the journal of this machine."""
    own, end = span.segment, span.end
    return SegmentRow(
        segment=own.number,
        host=own.host,
        pid=own.pid,
        device=own.device,
        versions=own.versions,
        started_at_ms=own.started_at_ms,
        first_step=own.first_step,
        last_step=span.last_step,
        ended_at_ms=span.ended_at_ms,
        last_seen_ms=span.last_seen_ms,
        reason=end.tags.get("bdh.stop_reason", end.status) if end else None,
        downtime_s=0.0,
        mlflow_run=own.wrapper,
        processes=own.processes,
        hosts=own.hosts,
        threads=own.threads,
        reduction=own.reduction,
    )


def table(spans: Iterable[SegmentSpan], written: Any, training: bool) -> list[dict[str, Any]]:
    """What the file is to hold.

    written: what it holds now (rows of other machines are taken from there), None if there is none.   training: whether the last process is
    alive.
    """
    rows = {span.segment.number: row_of(span) for span in spans}
    for row in written if isinstance(written, list) else []:
        with contextlib.suppress(ValidationError):  # somebody else's
            other = _ROW.validate_python(row)
            rows.setdefault(other.segment, other)
    ordered = [rows[number] for number in sorted(rows)]
    for before, row in itertools.pairwise(ordered):
        ended = before.ended_at_ms or before.last_seen_ms
        row.downtime_s = round(max(0, row.started_at_ms - ended) / 1000, 1)
        before.reason = before.reason or "killed"
    if ordered and ordered[-1].reason is None and not training:
        ordered[-1].reason = "killed"
    return [dataclasses.asdict(row) for row in ordered]
