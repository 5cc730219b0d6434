"""The progress of a training run, as lines."""

import io

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


def test_a_log_gets_lines_also_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with console.watching(out, 2) as progress:
        progress.advance(1, 3.0, 1.0)
        progress.point({"train/loss": 3.0}, 1)
    assert out.getvalue() == "step 1/2  loss 3.0000  ETA -\n"
