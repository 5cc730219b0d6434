"""Number formats: a configured format either runs, and a sentence describes what runs, or is refused with the reason.

Master weights, gradient sums, LayerNorm and loss stay fp32 whatever is configured. `problems` checks before anything is built, `Precision`
provides the autocast context, the loss scaler, the quantised view of the projections and the FP8 products. Knows the model only as
something with a `weight_view` and a `product`.
"""

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from bdh_mlflow import host
from bdh_mlflow.config import Config, LowPrecisionConfig, Machine, Problem, resolve
from bdh_mlflow.files import first_line
from bdh_mlflow.model import (
    fourbit,
    fp8,
)
from bdh_mlflow.model.fp8 import Fp8

GEMM_PEAK_S = 0.15


def pick_device(name: str = "auto") -> torch.device:
    """The device of `training.device`, if it is there; auto and what is not: CUDA's current device where there is one, else the CPU."""
    if why_device_unavailable(name) or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def why_device_unavailable(name: str) -> str | None:
    """Why nothing can be computed on a device of this machine; None if it can.   name: as in `training.device`."""
    kind, _, number = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if number and int(number) >= (devices := torch.cuda.device_count()):
        return f"this machine has {devices} CUDA device{'s' if devices > 1 else ''}, numbered from 0"
    return f"torch {torch.__version__} finds no Apple GPU" if kind == "mps" and not torch.backends.mps.is_available() else None


def machine(device: torch.device) -> Machine:
    """What `resolve` needs to know of this machine."""
    if device.type != "cuda":
        return Machine(device.type, psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of an earlier training in this process
    return Machine(device.type, free + cached)


def problems(config: Config) -> Iterable[Problem]:
    """Configured number formats and compilation that this machine or these versions cannot do."""
    settings, device = config.low_precision, pick_device(config.training.device)
    if reason := why_device_unavailable(config.training.device):
        yield Problem("training.device", f"{config.training.device} cannot be used: {reason}; auto takes what is there")
        return
    if device.type == "mps":
        yield from _mps_problems(config)
    if settings.use_fp8:
        yield from _fp8_problems(config, device)
    if settings.use_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield Problem("low_precision.use_4bit", "true needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if settings.compute_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Problem(
            "low_precision.compute_dtype", f"bfloat16 needs CUDA capability 8.0 or newer; {_described(device)}. float16 works here."
        )
    if settings.compute_dtype == "float16" and (reason := why_float16_unavailable(device)):
        yield Problem("low_precision.compute_dtype", f"float16 matmuls do not run here: {reason}. bfloat16 or float32 may.")
    if config.training.compile is True and not config.training.debug and device.type == "cpu" and host.compiler() is None:
        yield Problem("training.compile", "true needs a C++ compiler; none was found (g++, clang++, $CXX). Install one, or set it to auto.")


@dataclass(frozen=True)
class Precision:
    """The formats that run.   fp8: computes the FP8 products; None without FP8."""

    device: torch.device
    settings: LowPrecisionConfig
    fp8: Fp8 | None = None

    @classmethod
    def from_config(cls, config: Config, device: torch.device) -> "Precision":
        """The formats of a configuration without `problems`."""
        if not config.low_precision.use_fp8:
            return cls(device, config.low_precision)
        return cls(device, config.low_precision, fp8.Emulated(config.fp8) if config.fp8.emulate else fp8.Engine(config.fp8))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Matmuls inside run in compute_dtype, projections in FP8 where configured."""
        dtype = self.dtype
        with (
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32),
            self.fp8.region() if self.fp8 else nullcontext(),
        ):
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Format of the matmuls."""
        dtype = getattr(torch, self.settings.compute_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling: dynamic for float16, whose smallest gradients would vanish; without effect otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def prepare(self, model: nn.Module, projections: Sequence[str], optimizer: torch.optim.Optimizer | None = None) -> str:
        """Make the model use its projections in the configured format; returns a sentence about what runs, counted.

        optimizer: the one that changes the parameters, where the model is to be trained.
        """
        matmuls = "float32 matmuls"
        if self.dtype is not torch.float32:
            matmuls = f"{self.settings.compute_dtype} matmuls by autocast"
        if self.dtype is torch.float16:
            matmuls += " with dynamic loss scaling"
        if self.fp8 is not None:
            model.product = self.fp8.product  # type: ignore[assignment]
            matmuls = f"{self.fp8} in all {len(projections)} projections, other {matmuls}"
        weights = "float32 weights"
        if self.settings.use_4bit:
            view = fourbit.FourBitView(self.settings.quantization_type, self.settings.use_double_quant)
            for name in projections:
                view(name, model.get_parameter(name))
            model.weight_view = view  # type: ignore[assignment]
            if optimizer is not None:
                optimizer.register_step_post_hook(lambda *_: view.invalidate())
            nested = " with double-quantised scales" if self.settings.use_double_quant else ""
            weights = f"{self.settings.quantization_type} weights{nested} in {len(view)} of {len(projections)} projections, float32 masters"
        return f"{matmuls}; {weights}; {_described(self.device)}"

    def state_dict(self) -> dict[str, Any]:
        """State that formats carry from step to step: scales of FP8; empty without."""
        return self.fp8.state_dict() if self.fp8 else {}

    def savepoint(self) -> Callable[[], None]:
        """Between updates: the function returned brings back the state of now."""
        return self.fp8.savepoint() if self.fp8 else lambda: None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        if self.fp8 is not None:
            self.fp8.load_state_dict(state)


@functools.cache
def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Fastest matrix product measured here, in FLOP/s: the best of as many of side 1536 (CUDA: 8192) as fit into 0.15 s, once a process."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best_s, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < GEMM_PEAK_S or best_s == math.inf:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # this is not the training's memory
    return 2 * side**3 / best_s


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has CUDA capability {major}.{minor} ({torch.cuda.get_device_name(device)})"


def _mps_problems(config: Config) -> Iterable[Problem]:
    """What Apple's GPU does not carry. Nothing of it was run on such a machine."""
    bits = resolve(config).config.low_precision.optimizer_bits
    if config.low_precision.compute_dtype == "float16":
        yield Problem("low_precision.compute_dtype", "float16 on mps: sums over the neurons overflow there; bfloat16 or float32 may work")
    if config.training.layer_form == "blocked":
        yield Problem("training.layer_form", "blocked on mps: its passes are for CPU and CUDA; set it to auto or reference")
    if bits in (8, 4):
        yield Problem("low_precision.optimizer_bits", f"{bits} on mps: its library has no kernels for it; set it to 32")
    if config.low_precision.use_4bit and (reason := fourbit.why_unavailable(torch.device("mps"))):
        yield Problem("low_precision.use_4bit", f"true on mps: bitsandbytes cannot round weights there ({reason}); set it to false")


def _fp8_problems(config: Config, device: torch.device) -> Iterable[Problem]:
    found = f"true ({config.fp8.format}, amax {config.fp8.amax_compute_algo} of {config.fp8.amax_history_len} steps)"
    if not config.fp8.emulate and (reason := fp8.why_unavailable(device)):
        yield Problem(
            "low_precision.use_fp8",
            f"{found} {reason}. Set fp8.emulate to true (slow: FP8 values on any device), or use_fp8 to false "
            f"(compute_dtype: bfloat16 works here).",
        )
    m, t = config.model, config.training
    sides = {
        "model.n_embd": (m.n_embd, "D"),
        "model.mlp_internal_dim_multiplier": (config.neurons, "N, neurons a head,"),
        "training.block_size": (t.batch_size * t.block_size, "batch_size * block_size"),
    }
    for key, (size, name) in sides.items():
        if size % fp8.ALIGNMENT:
            yield Problem(key, f"{name} is {size}; FP8 products need a multiple of {fp8.ALIGNMENT}")


def why_float16_unavailable(device: torch.device) -> str | None:
    """Why float16 matmuls do not run on this device; None if they do."""
    try:
        _ = torch.ones(2, 2, dtype=torch.float16, device=device) @ torch.ones(2, 2, dtype=torch.float16, device=device)
    except RuntimeError as error:
        return first_line(error)
    return None
