"""Number formats: what was asked for either runs, and is said in a sentence, or is refused with the reason.

Master weights, gradients sums, LayerNorm and loss stay fp32 whatever is chosen. `problems` answers before anything is built, `Precision`
carries the choice out: an autocast context, a loss scaler, a view through which the model sees its projections, and FP8 products. Knows
the model only as something with a `weight_view` and a `product`.
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
from bdh_mlflow.config import Config, LowPrecisionConfig, Machine, Problem
from bdh_mlflow.model import (
    fourbit,
    fp8,
)
from bdh_mlflow.model.fp8 import Fp8

GEMM_PEAK_S = 0.3


def pick_device() -> torch.device:
    """CUDA's current device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> Machine:
    """What `resolve` needs to know of this machine."""
    if device.type != "cuda":
        return Machine(device.type, psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # by torch's allocator, after a training before this one
    return Machine(device.type, free + held)


def problems(config: Config) -> Iterable[Problem]:
    """What the configuration asks of number formats and compilation that this machine or version cannot do."""
    wish, device = config.low_precision, pick_device()
    if wish.use_fp8:
        yield from _fp8_problems(config, device)
    if wish.use_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield Problem("low_precision.use_4bit", "true needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if wish.compute_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Problem(
            "low_precision.compute_dtype", f"bfloat16 needs CUDA capability 8.0 or newer; {_described(device)}. float16 works here."
        )
    if wish.compute_dtype == "float16" and (reason := _no_float16(device)):
        yield Problem("low_precision.compute_dtype", f"float16 matmuls do not run here: {reason}. bfloat16 or float32 may.")
    if config.training.compile is True and not config.training.debug and device.type == "cpu" and host.compiler() is None:
        yield Problem("training.compile", "true needs a C++ compiler; none was found (g++, clang++, $CXX). Install one, or set it to auto.")


@dataclass(frozen=True)
class Precision:
    """The formats that run.   fp8: who carries out FP8 products; None where none was asked for."""

    device: torch.device
    wish: LowPrecisionConfig
    fp8: Fp8 | None = None

    @classmethod
    def asked(cls, config: Config, device: torch.device) -> "Precision":
        """What a configuration without `problems` asks for."""
        if not config.low_precision.use_fp8:
            return cls(device, config.low_precision)
        return cls(device, config.low_precision, fp8.Emulated(config.fp8) if config.fp8.emulate else fp8.Engine(config.fp8))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Matmuls inside run in compute_dtype, projections in FP8 if asked for."""
        dtype = self.dtype
        with (
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32),
            self.fp8.region() if self.fp8 else nullcontext(),
        ):
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Format of the matmuls."""
        dtype = getattr(torch, self.wish.compute_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling: dynamic for float16, whose smallest gradients would vanish; without effect otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def prepare(self, model: nn.Module, projections: Sequence[str], optimizer: torch.optim.Optimizer | None = None) -> str:
        """Let the model see its projections in the format asked for; returns in a sentence what truly runs.

        optimizer: whose steps change the parameters, when the model is to be trained.
        """
        matmuls = "float32 matmuls"
        if self.dtype is not torch.float32:
            matmuls = f"{self.wish.compute_dtype} matmuls by autocast"
        if self.dtype is torch.float16:
            matmuls += " with dynamic loss scaling"
        if self.fp8 is not None:
            model.product = self.fp8.product  # type: ignore[assignment]
            matmuls = f"{self.fp8} in all {len(projections)} projections, other {matmuls}"
        weights = "float32 weights"
        if self.wish.use_4bit:
            view = fourbit.FourBitView(self.wish.quantization_type, self.wish.use_double_quant)
            for name in projections:
                view(name, model.get_parameter(name))
            model.weight_view = view  # type: ignore[assignment]
            if optimizer is not None:
                optimizer.register_step_post_hook(lambda *_: view.forget())
            nested = " with double-quantised scales" if self.wish.use_double_quant else ""
            weights = f"{self.wish.quantization_type} weights{nested} in {len(view)} of {len(projections)} projections, float32 masters"
        return f"{matmuls}; {weights}; {_described(self.device)}"

    def state_dict(self) -> dict[str, Any]:
        """What number formats remember from step to step: scales of FP8; empty without."""
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
    """Fastest matrix product seen here, in FLOP/s: the best of as many of side 1536 (CUDA: 8192) as fit into 0.3 s, once a process."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best_s, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < GEMM_PEAK_S or best_s == math.inf:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # this is not the training's memory
    return 2 * side**3 / best_s


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has CUDA capability {major}.{minor} ({torch.cuda.get_device_name(device)})"


def _fp8_problems(config: Config, device: torch.device) -> Iterable[Problem]:
    wished = f"true ({config.fp8.format}, amax {config.fp8.amax_compute_algo} of {config.fp8.amax_history_len} steps)"
    if not config.fp8.emulate and (reason := fp8.unavailable(device)):
        yield Problem(
            "low_precision.use_fp8",
            f"{wished} {reason}. Set fp8.emulate to true (slow: FP8 values on any device), or use_fp8 to false "
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


def _no_float16(device: torch.device) -> str | None:
    try:
        _ = torch.ones(2, 2, dtype=torch.float16, device=device) @ torch.ones(2, 2, dtype=torch.float16, device=device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
