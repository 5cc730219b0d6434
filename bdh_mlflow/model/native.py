"""The elementwise passes of `kernels` in C++ for a CPU: compiled once a machine, and without a compiler left to PyTorch.

`kernels.cpp` is compiled for the processor it runs on, within two seconds, into the user's cache, under a name that holds the digest of
source, flags, compiler and processor; later processes load it from there. The values are those of the eager passes to the bit, so that a
training does not depend on whether there is a compiler. Knows nothing of when or on what the passes work.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bdh_mlflow import host
from bdh_mlflow.files import first_line
from bdh_mlflow.model.dropout import Dropout
from bdh_mlflow.model.rope import RopeTable

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the passes are compiled for; float16 and float64 go the eager way."""

# Without contraction, the sums that PyTorch rounds twice are rounded twice; without errno and traps, loops can be vectorised.
ALWAYS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
TRIED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-mcpu=native", "-fopenmp-simd"), ("-fopenmp-simd",))
"""For this machine and several threads first; Apple's compiler knows neither without more packages."""
COMPILE_TIMEOUT_S = 120.0
WITHOUT = "up to 1.13"
"""How many times as long a training step takes with the eager passes; see docs/measurements.md."""


def serving(dtype: torch.dtype, device: torch.device) -> tuple[ctypes.CDLL | None, str]:
    """The compiled passes for activations of a dtype on a device, None where PyTorch does them, and in words who does."""
    if device.type != "cpu":
        return None, "PyTorch"
    if dtype not in DTYPES:
        return None, f"PyTorch (none in C++ for {str(dtype).removeprefix('torch.')})"
    found, how = library()
    return found, f"C++ ({how})" if found else f"PyTorch, a step takes {WITHOUT} times as long ({how})"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled passes, and which compiler made them; None, and why, without. Compiles where the cache has none."""
    compiler = host.compiler()
    if compiler is None:
        return None, "no C++ compiler was found (g++, clang++, $CXX)"
    try:
        version = _line(subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S).stdout)
        made = (SOURCE.read_text(), repr((ALWAYS, TRIED)), version, _processor())
        name = f"kernels-{hashlib.sha256(repr(made).encode()).hexdigest()[:16]}.so"
        if (folder := _cache()) is not None and (kept := _kept(compiler, folder / name)) is not None:
            return kept, version
        with tempfile.TemporaryDirectory(prefix="bdh-mlflow-") as scratch:
            _compile(compiler, Path(scratch) / name)
            return ctypes.CDLL(str(Path(scratch) / name)), version  # stays loaded when the file is gone
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} does not compile the passes: {_line(error.stderr, 'error')}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return None, f"the passes compiled by {compiler} cannot be used: {first_line(error)}"


def _kept(compiler: str, path: Path) -> ctypes.CDLL | None:
    """The library of the cache, made again where it is damaged; None where nothing can be written or loaded there (full, noexec)."""
    digest = path.with_suffix(".sha256")  # a library that was cut short kills the process that loads it
    try:
        if not (path.exists() and digest.exists() and digest.read_text() == _digest(path)):
            _compile(compiler, path)
            digest.write_text(_digest(path))
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def activate(library: ctypes.CDLL, xs: Tensor, q: Tensor, table: RopeTable) -> None:
    """As `kernels.Kernels.activate`."""
    _pass(library, "activate", xs)(_at(xs), _at(q), *_table(table, xs), _threads())


def gate(library: ctypes.CDLL, ys: Tensor, xs: Tensor, dropout: Dropout | None) -> None:
    """As `kernels.Kernels.gate`."""
    _pass(library, "gate", ys)(_at(ys), _at(xs), *_mask(ys, dropout), _threads())


def gate_backward(library: ctypes.CDLL, xs: Tensor, ys: Tensor, d_xy: Tensor, d_xs: Tensor, dropout: Dropout | None) -> None:
    """As `kernels.Kernels.gate_backward`."""
    _pass(library, "gate_backward", xs)(_at(xs), _at(ys), _at(d_xy), _at(d_xs), *_mask(xs, dropout), _threads())


def activate_backward(library: ctypes.CDLL, d_q: Tensor, d_xs: Tensor, xs: Tensor, table: RopeTable) -> None:
    """As `kernels.Kernels.activate_backward`."""
    _pass(library, "activate_backward", xs)(_at(d_q), _at(d_xs), _at(xs), *_table(table, xs), _threads())


def _pass(library: ctypes.CDLL, name: str, like: Tensor) -> "ctypes._NamedFuncPointer":
    function: ctypes._NamedFuncPointer = getattr(library, f"{name}_{DTYPES[like.dtype]}")
    function.restype = None
    return function


def _at(activations: Tensor) -> ctypes.c_void_p:
    assert activations.is_contiguous()
    return ctypes.c_void_p(activations.data_ptr())


def _table(table: RopeTable, like: Tensor) -> tuple[ctypes.c_void_p | ctypes.c_int64, ...]:
    pairs, tokens = table.cos.shape
    assert table.cos.stride() == table.sin.stride()
    assert tokens == 1 or table.cos.stride(1) == 1
    sizes = (pairs, like.shape[1] // tokens, tokens, table.cos.stride(0))
    return (*(ctypes.c_void_p(t.data_ptr()) for t in table), *map(ctypes.c_int64, sizes))


def _mask(like: Tensor, dropout: Dropout | None) -> tuple[ctypes.c_int64 | ctypes.c_uint64 | ctypes.c_int32, ...]:
    seed, threshold = (dropout.seed, dropout.threshold) if dropout else (0, -(2**15))
    return ctypes.c_int64(like.numel()), ctypes.c_uint64(seed), ctypes.c_int32(threshold)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _cache() -> Path | None:
    """A folder that only this user can write to; None where there is none: what lies in it is loaded as code."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "bdh-mlflow"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or a read-only one
        return None
    ours = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours and os.access(folder, os.W_OK) else None


def _compile(compiler: str, path: Path) -> None:
    """Written under another name and renamed: processes that compile at once each get a whole file.   Raises CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix=path.stem, dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        for flags in TRIED:
            command = [compiler, *ALWAYS, *flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            if done.returncode == 0:
                shutil.move(made, path)
                return
        done.check_returncode()


def _line(text: str, word: str = "") -> str:
    """The first line that holds a word, else the first."""
    lines = text.splitlines()
    return next((line.strip() for line in lines if word in line), lines[0].strip() if lines else "no message")


def _processor() -> str:
    """What decides which instructions a compiled pass may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")))
