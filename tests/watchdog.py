"""A test that stands still fails by its name, with what it and its processes are doing, instead of holding the gate for hours.

Python code is interrupted here; where that does not help (compiled code, the end of a fixture), `faulthandler_timeout` of
pyproject.toml prints every thread and ends the worker, and pytest names the test.
"""

import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

PY_SPY = Path(sysconfig.get_path("scripts")) / "py-spy"
LIMIT_S = 600.0  # the longest test takes a fifth of it on two cores


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        pytest.fail(f"not done after {LIMIT_S:.0f} s\n\n{doings(processes(folder))}")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def processes(folder: Path | None) -> list[psutil.Process]:
    """This one, those that it started, and those that outlived who started them and work in a folder."""
    own = psutil.Process()
    found = [own, *own.children(recursive=True)]
    for process in psutil.process_iter():
        try:
            if folder is not None and process not in found and Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile
    return found


def doings(found: list[psutil.Process]) -> str:
    """Command line and stack of processes."""
    told = []
    for process in found:
        try:
            told.append(f"== {process.pid}: {' '.join(process.cmdline())[:300]}")
        except psutil.Error:
            continue
        try:
            dump = subprocess.run([PY_SPY, "dump", "--pid", str(process.pid)], capture_output=True, text=True, timeout=30)
            told.append(dump.stdout or dump.stderr)
        except (OSError, subprocess.TimeoutExpired) as error:
            told.append(str(error))
    return "\n".join(told)
