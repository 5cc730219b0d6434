"""The passes in C++ against the eager ones, bit for bit; and machines that cannot have them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdh_mlflow import host
from bdh_mlflow.model import native
from bdh_mlflow.model.dropout import Dropout
from bdh_mlflow.model.kernels import Kernels, by_neuron, eager, kernels
from bdh_mlflow.model.rope import RopeTable, frequencies, rope_table

CPU = torch.device("cpu")
DROPOUTS = [None, Dropout(0.1, 7), Dropout(0.5, -(2**40)), Dropout(1 - 1e-9, 2**63)]
SHAPES = [(2, 1, 1), (6, 1, 33), (64, 3, 20), (30, 1, 1025)]
"""Neurons, rows of the batch and tokens of each: a single pair, odd lengths, several rows, and more than the pieces of a thread."""

LOAD = "from bdh_mlflow.model import native; assert native.library()[0] is not None, native.library()[1]"

needs_compiler = pytest.mark.skipif(host.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _loaded_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that change what the library finds leave nothing behind."""
    yield
    if "monkeypatch" in request.fixturenames:
        native.library.cache_clear()


def activations(dtype: torch.dtype, shape: tuple[int, int, int], count: int) -> list[Tensor]:
    """Of the sizes of a layer's, with zeros of both signs, and values next to the smallest and largest of the dtype."""
    neurons, rows, tokens = shape
    made = torch.Generator().manual_seed(sum(shape))
    found = []
    for number in range(count):
        one = torch.randn(neurons, rows * tokens, generator=made).to(dtype)
        special = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 8, torch.finfo(dtype).max, torch.finfo(dtype).eps]).to(dtype)
        for place, value in zip(range(number, one.numel(), one.numel() // 7 or 1), special, strict=False):
            one.view(-1)[place] = value
        found.append(one)
    return found


def table(shape: tuple[int, int, int]) -> RopeTable:
    """Positions from 5 on, as a span of a longer text has them: not contiguous."""
    neurons, _, tokens = shape
    whole = by_neuron(rope_table(0, tokens + 7, frequencies(neurons)))
    return RopeTable(whole.cos[:, 5 : 5 + tokens], whole.sin[:, 5 : 5 + tokens])


def all_passes(passes: Kernels, given: list[Tensor], rope: RopeTable, dropout: Dropout | None) -> list[Tensor]:
    x, y, d_xy, d_x, q, d_q = (t.clone() for t in given)
    passes.activate(x, q, rope)
    forward = y.clone()
    passes.gate(forward, x, dropout)
    passes.gate_backward(x, y, d_xy, d_x, dropout)
    passes.activate_backward(d_q, d_x, x, rope)
    return [x, y, d_xy, d_x, q, forward]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("x", "y", "d_xy", "d_x", "q", "gated"), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@needs_compiler
@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=str)
def test_values_are_those_of_the_eager_passes_to_the_bit(dtype: torch.dtype, shape: tuple[int, int, int], dropout: Dropout | None) -> None:
    given, rope = activations(dtype, shape, 6), table(shape)
    compiled = kernels(dtype, CPU, False)
    assert getattr(compiled.gate, "func", None) is native.gate, native.library()[1]
    assert_same_bits(all_passes(compiled, given, rope, dropout), all_passes(eager(), given, rope, dropout))


@needs_compiler
@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    """A run that diverges must be noticed in C++ as it is in PyTorch."""
    shape = (8, 1, 40)
    given = activations(dtype, shape, 6)
    for number, one in enumerate(given):
        for place, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            one[number % 8, 3 * number + place] = value
    found, expected = (all_passes(p, given, table(shape), Dropout(0.5, 3)) for p in (kernels(dtype, CPU, False), eager()))
    assert all(not t.isfinite().all() for t in found)
    assert_same_bits(found, expected)


@needs_compiler
def test_threads_do_not_change_the_bits() -> None:
    given, rope = activations(torch.bfloat16, (64, 2, 100), 6), table((64, 2, 100))
    usual, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(all_passes(kernels(torch.bfloat16, CPU, False), given, rope, Dropout(0.1, 1)))
    torch.set_num_threads(usual)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.slow  # compiles the eager passes by torch.compile, as on CUDA
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@needs_compiler
def test_passes_fused_by_torch_compile_give_the_same_values() -> None:
    shape = (64, 2, 40)
    given = activations(torch.float32, shape, 6)
    results = [all_passes(p, given, table(shape), Dropout(0.1, 1)) for p in (eager(fused=True), eager())]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # sums and products may be contracted


def test_without_a_compiler_the_eager_passes_run_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(host, "compiler", lambda: None)
    assert native.library() == (None, "no C++ compiler was found (g++, clang++, $CXX)")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho 'kernels.cpp:9:10: fatal error: cmath: No such file or directory' >&2\nexit 1\n", "cmath: No such file"),
        ("#!/bin/sh\nexit 0\n", "cannot be used"),
        ("not a program", "cannot be used"),
    ],
)
def test_a_compiler_that_fails_is_no_error(script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    compiler = tmp_path / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library, why = native.library()
    assert library is None
    assert str(compiler) in why
    assert reason in why
    assert list(tmp_path.rglob("*.so")) == []


@needs_compiler
@pytest.mark.parametrize("mode", [0o700, 0o777, 0o500])
def test_compiled_passes_are_kept_where_nobody_else_can_write(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that anybody may replace is code that anybody may run."""
    native.library.cache_clear()
    folder = tmp_path / "bdh-mlflow"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library()[0] is not None
    writable = mode == 0o700 or (mode == 0o500 and os.getuid() == 0)  # root writes anywhere
    assert len(list(folder.glob("*.so"))) == writable


@needs_compiler
def test_damaged_library_is_made_again(tmp_path: Path) -> None:
    """A full disk leaves one that is cut short. In processes of their own: one that has loaded a library gets it again in any case."""
    sizes = []
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", LOAD], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}).returncode == 0
        (kept,) = (tmp_path / "bdh-mlflow").glob("*.so")
        sizes.append(kept.stat().st_size)
        kept.write_bytes(kept.read_bytes()[:1000])
    assert sizes[0] == sizes[1] > 1000


@needs_compiler
def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number which no user has."""
    native.library.cache_clear()

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert native.library()[0] is not None


@needs_compiler
def test_processes_that_start_together_each_get_a_whole_library(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", LOAD], env=env) for _ in range(3)]
    assert [one.wait(timeout=120) for one in started] == [0, 0, 0]
    assert len(list((tmp_path / "bdh-mlflow").glob("*.so"))) == 1
