"""`benchmarks/gpu.py` with the CPU as a stand-in, so that it runs on the day when somebody has a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def page(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=400)


def figures(output: str) -> dict[str, str]:
    """The table, by what was measured."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return dict(lines[2:])


@pytest.mark.slow  # every row of the page at toy sizes, each in its process as on a GPU
def test_every_row_has_a_figure_and_the_forms_a_verdict() -> None:
    done = page("--device", "cpu", "--toy", "--skip-tests")
    assert done.returncode == 0, done.stderr
    found = figures(done.stdout)
    assert len(found) == 11, done.stdout
    fp8 = found.pop(next(what for what in found if what.startswith("FP8 by Transformer Engine needs CUDA")))
    assert fp8 == "not run"
    for what, figure in found.items():
        assert " ms a byte" in figure if what.startswith("generation") else " tokens/s, MFU " in figure, (what, figure)
    assert "times as fast as reference" in done.stdout.splitlines()[-1]


@pytest.mark.slow  # as above
def test_rows_that_fail_cost_themselves_alone() -> None:
    done = page("--device", "meta", "--toy", "--skip-tests", "--minutes", "0.4")
    assert done.returncode == 0, done.stderr
    found = figures(done.stdout)
    assert len(found) == 11
    failed = [figure for figure in found.values() if figure.startswith("failed: ")]
    assert failed
    assert "Error" in failed[0]
    assert "not run: no time left" in found.values()
    assert "No verdict" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = page()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no CUDA device here" in done.stderr
