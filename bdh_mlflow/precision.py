"""Number formats: what was asked for either runs, and is said in a sentence, or is refused with the reason.

Master weights, gradients sums, LayerNorm and loss stay fp32 whatever is chosen. `problems` answers before anything is built, `Precision`
carries the choice out: an autocast context, a loss scaler, and a view through which the model sees its projections. Knows the model only
as something with a `weight_view`.
"""

import functools
import importlib.util
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdh_mlflow.config import Config, LowPrecisionConfig, Problem, TrainingConfig

BLOCK = 64  # weights sharing one scale; the default of bitsandbytes and of QLoRA (arXiv:2305.14314)
GEMM_PEAK_S = 0.3
FP8_CAPABILITY = (8, 9)  # Ada; the oldest that Transformer Engine runs FP8 on


def pick_device() -> torch.device:
    """CUDA's current device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def problems(config: Config) -> Iterable[Problem]:
    """What the configuration asks of number formats and compilation that this machine or version cannot do."""
    wish, device = config.low_precision, pick_device()
    if wish.use_fp8:
        yield Problem("low_precision.use_fp8", _fp8_refusal(config, device))
    if wish.use_4bit_optimizer:
        yield Problem(
            "low_precision.use_4bit_optimizer", "true cannot be carried out by this version: AdamW runs with fp32 states. Set it to false."
        )
    if wish.use_4bit and importlib.util.find_spec("bitsandbytes") is None:
        yield Problem("low_precision.use_4bit", "true needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if wish.compute_dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Problem(
            "low_precision.compute_dtype", f"bfloat16 needs CUDA capability 8.0 or newer; {_described(device)}. float16 works here."
        )
    if config.training.compile is True and not config.training.debug and device.type == "cpu" and _compiler() is None:
        yield Problem("training.compile", "true needs a C++ compiler; none was found (g++, clang++, $CXX). Install one, or set it to auto.")


@dataclass(frozen=True)
class Precision:
    """The formats that run."""

    device: torch.device
    wish: LowPrecisionConfig

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls inside run in compute_dtype."""
        dtype = self.dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)

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
        weights = "float32 weights"
        if self.wish.use_4bit:
            view = FourBitView(self.wish.quantization_type, self.wish.use_double_quant)
            for name in projections:
                view(name, model.get_parameter(name))
            model.weight_view = view  # type: ignore[assignment]
            if optimizer is not None:
                optimizer.register_step_post_hook(lambda *_: view.forget())
            nested = " with double-quantised scales" if self.wish.use_double_quant else ""
            weights = f"{self.wish.quantization_type} weights{nested} in {len(view)} of {len(projections)} projections, float32 masters"
        return f"{matmuls}; {weights}; {_described(self.device)}"


class FourBitView:
    """Projections as a 4-bit file would hold them, with gradients straight through to the fp32 parameter.

    Quantised again only after the parameter has changed, so once per optimizer step. torch's version counter tells of changes such as
    loading a checkpoint, but fused optimizers do not count theirs: whoever steps must `forget`.
    """

    def __init__(self, quantization_type: str, double_quant: bool) -> None:
        self._quantization_type = quantization_type
        self._double_quant = double_quant
        self._seen: dict[str, tuple[int, int, Tensor]] = {}

    def __len__(self) -> int:
        """Parameters seen so far."""
        return len(self._seen)

    def forget(self) -> None:
        """The parameters have changed."""
        self._seen.clear()

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The quantised values of `parameter`, same shape and dtype, differentiable as if it were the parameter."""
        version, address = parameter._version, parameter.data_ptr()
        known = self._seen.get(name)
        if known is None or known[:2] != (version, address):
            known = (version, address, round_to_4bit(parameter.detach(), self._quantization_type, self._double_quant))
            self._seen[name] = known
        quantised: Tensor = _StraightThrough.apply(parameter, known[2])  # type: ignore[no-untyped-call]
        return quantised


def round_to_4bit(weight: Tensor, quantization_type: str, double_quant: bool) -> Tensor:
    """Quantise and dequantise by bitsandbytes in blocks of 64.   weight: any shape with an even number of elements.

    The weight is handed over flat: the CPU kernel of bitsandbytes 0.50.2 finds the scales of a matrix row by row and takes wrong ones
    where a row is not a multiple of the block (relative error 0.22 instead of 0.09).
    """
    functional = _bitsandbytes()
    packed, state = functional.quantize_4bit(
        weight.reshape(-1), blocksize=BLOCK, quant_type=quantization_type, compress_statistics=double_quant
    )
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded.reshape(weight.shape)


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


def compiles(training: TrainingConfig, device: torch.device) -> tuple[bool, str]:
    """Whether the model is compiled, and why."""
    if training.debug:
        return False, "debug"
    if training.compile == "auto":
        return device.type == "cuda", f"auto on {device.type}"
    return training.compile, "as configured"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@functools.cache
def _bitsandbytes() -> Any:
    """bitsandbytes.functional, without its note about a kernel for inference that is not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional

    return bitsandbytes.functional


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None)


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has CUDA capability {major}.{minor} ({torch.cuda.get_device_name(device)})"


def _fp8_refusal(config: Config, device: torch.device) -> str:
    recipe = config.fp8
    wished = f"true ({recipe.format}, amax {recipe.amax_compute_algo} of {recipe.amax_history_len} steps)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        return f"{wished} cannot be carried out by this version: no matmul runs in FP8 yet. Set it to false."
    found = _described(device) if device.type == "cuda" else "this machine has no CUDA device"
    return f"{wished} needs CUDA capability 8.9 or newer; {found}. Set it to false (compute_dtype: bfloat16 works here)."
