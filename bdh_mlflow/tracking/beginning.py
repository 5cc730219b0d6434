"""What a run says of itself when it begins, whoever trains: which segment it is, since when, and of what program."""

import os
import shlex
import sys
import uuid
from collections.abc import Sequence

from bdh_mlflow import __version__
from bdh_mlflow.tracking.records import Segment
from bdh_mlflow.tracking.status import StoreStatus


def next_segment(status: StoreStatus, earlier: Sequence[Segment], saved: int) -> tuple[int, str]:
    """Number of the segment that begins, and the id that all segments of its training share.

    earlier: segments that the journal holds already.   saved: number of the segment that saved the checkpoint it goes on from, else 0.
    """
    tags, later = (status.run.tags, status.run.segment) if status.run else ({}, 0)
    number = 1 + max(saved, later, earlier[-1].number if earlier else 0)
    return number, earlier[0].training if earlier else tags.get("bdh.training", uuid.uuid4().hex)


def began_s(first: Segment, status: StoreStatus) -> float:
    """Unix time at which the first segment began, from which samples of the machines are numbered.   first: of the journal."""
    times = [first.started_at_ms, *([status.run.started_at_ms] if status.run else [])]
    return min(times) / 1000


def user_name() -> str:
    """Who runs the program."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or "unknown"


def program_tags(commit: str | None, dirty: bool | None) -> dict[str, str]:
    """Tags of the program that a run comes from.   commit, dirty: of its checkout, see `host.SourceState`."""
    tags = {
        "bdh.version": __version__,
        "bdh.git_dirty": {True: "true", False: "false", None: "unknown"}[dirty],
        "bdh.command": " ".join(map(shlex.quote, sys.argv)),
        "bdh.stop_reason": "",
    }
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})
