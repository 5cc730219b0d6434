"""The progress of a training run, as lines."""

import io

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
