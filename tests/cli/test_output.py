"""Output that cannot be written ends nothing."""

import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow.cli import console, output


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
        safe = output.Unfailing(full)
        assert safe.write("a" * 10) == 10
        safe.flush()
        safe.settle()


@pytest.mark.parametrize("closed", [(None, None), (io.StringIO(), io.StringIO())])
def test_in_the_body_printing_works_whatever_the_streams_are(monkeypatch: pytest.MonkeyPatch, closed: Any) -> None:
    for name, stream in zip(("stdout", "stderr"), closed, strict=True):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    with output.unfailing_output():
        print("a")
        print("b", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == closed, "afterwards they are what they were"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOSPC])
def test_a_slow_reader_and_a_disk_that_was_full_cost_the_text_at_hand_alone(number: int) -> None:
    out = Dead(0, OSError(number, "for now"))
    safe = output.Unfailing(out)
    safe.write("lost")
    out.takes = 1
    safe.write("there again")
    assert out.getvalue() == "there again"
