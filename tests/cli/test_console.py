"""The progress of a training run, as lines."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow.cli import console


def test_remaining_time_does_not_count_the_first_step() -> None:
    clock = iter([1000.0, 1010.0])
    out = io.StringIO()
    shown = console.PlainLines(out, 100, clock=lambda: next(clock))
    shown.advance(41, 3.0, 1.0)
    shown.point({"train/loss": 3.0}, 41)
    shown.advance(51, 3.0, 1.0)
    shown.point({"train/loss": 3.0}, 51)
    assert [line.split("ETA ")[1] for line in out.getvalue().splitlines()] == ["-", "0:00:49"]


class Dead(io.StringIO):
    """A stream that takes some writes and then none."""

    def __init__(self, takes: int, error: Exception) -> None:
        super().__init__()
        self.takes, self.error = takes, error

    def write(self, text: str) -> int:
        if self.takes <= 0:
            raise self.error
        self.takes -= 1
        return super().write(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "gone"), ValueError("closed")]
)
def test_output_that_fails_ends_nothing_and_is_left_alone(error: Exception) -> None:
    out = Dead(2, error)
    with console.watching(out, 10) as progress:
        for step in range(1, 11):
            progress.advance(step, 3.0, 1.0)
            progress.point({"train/loss": 3.0}, step)
            progress.note("something worth a line")
    assert out.getvalue().startswith("step 1/10")
    assert "step 9" not in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_output_has_not_is_printed_as_its_code(encoding: str) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    with console.watching(out, 1) as progress:
        progress.note("sample \u27e6text\u27e7 \udce9")
    assert raw.getvalue() == b"sample \\u27e6text\\u27e7 \\udce9\n"


def test_nothing_is_left_to_fail_at_the_end_of_the_process() -> None:
    """What waits in the buffer of a broken stream would make the interpreter end with exit code 120."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:  # closing it would raise
        safe = console.Unfailing(full)
        safe.write("a" * 10)
        safe.flush()
        assert not safe.isatty()


@pytest.mark.parametrize("closed", [(None, None), (io.StringIO(), io.StringIO())])
def test_in_the_body_printing_works_whatever_the_streams_are(monkeypatch: pytest.MonkeyPatch, closed: Any) -> None:
    for name, stream in zip(("stdout", "stderr"), closed, strict=True):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    with console.unfailing_output():
        print("a")
        print("b", file=sys.stderr)


def test_a_log_gets_lines_also_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with console.watching(out, 2) as progress:
        progress.advance(1, 3.0, 1.0)
        progress.point({"train/loss": 3.0}, 1)
    assert out.getvalue() == "step 1/2  loss 3.0000  ETA -\n"
