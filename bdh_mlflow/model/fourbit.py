"""4-bit weights: quantization-aware training with a straight-through estimator, and packing for a file.

Values are NF4 or FP4 as bitsandbytes quantises them: blocks of 64 weights share a scale, the largest absolute value among them;
`double_quant` keeps the scales themselves in 8 bits (QLoRA, arXiv:2305.14314). In training the forward pass uses the quantised values and
the gradient is passed unchanged to the fp32 parameter (straight-through estimator, arXiv:1308.3432). Knows parameters only by name and
value.
"""

import contextlib
import functools
import logging
import warnings
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bdh_mlflow.files import first_line

BLOCK = 64  # weights sharing one scale; the default of bitsandbytes and of QLoRA
PIECE = 2**17  # weights rounded at a time on a CPU: half a MiB of float32, what its caches hold
BINS = 4096  # between 0 and 1; a bin is narrower than half the smallest distance between two rounding bounds (fp4: 1/192)


class FourBitView:
    """Projections with the values a 4-bit file would hold, differentiable by a straight-through estimator.

    Quantised again only after the parameter has changed, so once per optimizer step. torch's version counter notices changes such as
    loading a checkpoint; fused optimizers do not increment it, so `invalidate` must be called after each optimizer step.
    """

    def __init__(self, quantization_type: str, double_quant: bool) -> None:
        self._quantization_type = quantization_type
        self._double_quant = double_quant
        self._cache: dict[str, tuple[int, int, Tensor]] = {}

    def __len__(self) -> int:
        """Parameters quantised so far."""
        return len(self._cache)

    def invalidate(self) -> None:
        """Quantise anew at the next use: the parameters have changed."""
        self._cache.clear()

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The quantised values of `parameter`, same shape and dtype, differentiable as if it were the parameter."""
        version, address = parameter._version, parameter.data_ptr()
        cached = self._cache.get(name)
        if cached is None or cached[:2] != (version, address):
            cached = (version, address, round_to_4bit(parameter.detach(), self._quantization_type, self._double_quant))
            self._cache[name] = cached
        quantised: Tensor = _StraightThrough.apply(parameter, cached[2])  # type: ignore[no-untyped-call]
        return quantised


def why_unavailable(device: torch.device) -> str | None:
    """Why weights cannot be rounded on a device; None if they can."""
    try:
        round_to_4bit(torch.ones(8, 64, device=device), "nf4", True)
    except Exception as error:  # each backend raises its own kinds
        return first_line(error)
    return None


def round_to_4bit(weight: Tensor, quantization_type: str, double_quant: bool) -> Tensor:
    """Quantise and dequantise by bitsandbytes in blocks of 64.   weight: any shape with an even number of elements.

    The weight is passed flat: the CPU kernel of bitsandbytes 0.50.2 computes the scales of a matrix row by row and applies wrong ones
    where a row is not a multiple of the block (relative error 0.22 instead of 0.09). On a CPU `_rounded_by_table` computes the same values
    to the bit in a third of the time; the library's way takes a fifth of a quickstart step.
    """
    if weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.numel() % BLOCK == 0:
        return _rounded_by_table(weight.reshape(-1), quantization_type, double_quant).view(weight.shape)
    packed, state = _quantised(weight, quantization_type, double_quant)
    rounded: Tensor = bitsandbytes_functional().dequantize_4bit(packed, state)
    return rounded.reshape(weight.shape)


def pack_4bit(weight: Tensor, quantization_type: str, double_quant: bool) -> dict[str, Tensor]:
    """The values of `round_to_4bit`, packed: codes, two a byte, under "", and bitsandbytes' quantisation state under its own names."""
    packed, state = _quantised(weight, quantization_type, double_quant)
    return {"": packed, **state.as_dict(packed=True)}


def unpack_4bit(parts: dict[str, Tensor]) -> Tensor:
    """The weight that `pack_4bit` packed, flat; equal to `round_to_4bit` of it to the bit."""
    functional = bitsandbytes_functional()
    packed = parts[""]
    state = functional.QuantState.from_dict({k: v for k, v in parts.items() if k}, device=packed.device)
    weight: Tensor = functional.dequantize_4bit(packed, state)
    return weight.reshape(-1)


def _quantised(weight: Tensor, quantization_type: str, double_quant: bool) -> tuple[Tensor, Any]:
    packed, state = bitsandbytes_functional().quantize_4bit(
        weight.reshape(-1), blocksize=BLOCK, quant_type=quantization_type, compress_statistics=double_quant
    )
    return packed, state


class _Table(NamedTuple):
    """Lookup of the nearest of the 16 levels of a value in [-1, 1], by the value's bin.

    bound: (2 * BINS + 1,), for each bin the nearest midpoint between two levels.   levels: (2 * (2 * BINS + 1),), for each bin the level
    below and the level above that midpoint.
    """

    bound: Tensor
    levels: Tensor


@functools.cache
def _table(quantization_type: str) -> _Table:
    levels = bitsandbytes_functional().get_4bit_type(quantization_type, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    centres = torch.arange(-BINS, BINS + 1) / BINS
    nearest = (centres[:, None] - bounds).abs().argmin(dim=1)
    return _Table(bounds[nearest], torch.stack((levels[nearest], levels[nearest + 1]), dim=1).flatten())


def _rounded_by_table(flat: Tensor, quantization_type: str, double_quant: bool) -> Tensor:
    """Equal to bitsandbytes' quantise and dequantise, for full blocks.   flat: (n,), n a multiple of BLOCK."""
    functional, table = bitsandbytes_functional(), _table(quantization_type)
    blocks = flat.view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    scales = largest
    if double_quant:
        mean = largest.mean()
        packed, state = functional.quantize_blockwise(largest - mean, blocksize=256)
        scales = functional.dequantize_blockwise(packed, state) + mean
    inverse = 1.0 / largest.clamp(min=1e-38)
    out = torch.empty_like(blocks)
    for start in range(0, len(blocks), PIECE // BLOCK):
        here = slice(start, start + PIECE // BLOCK)
        within = (blocks[here] * inverse[here, None]).flatten()
        bins = torch.add(within, 1).mul_(BINS).to(torch.int32)
        above = within > table.bound.index_select(0, bins)
        levels = table.levels.index_select(0, bins.mul_(2).add_(above))
        torch.mul(levels.view(-1, BLOCK), scales[here, None], out=out[here])
    return out.view(-1)


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded values. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@functools.cache
def bitsandbytes_functional() -> Any:
    """The module bitsandbytes.functional, imported without its warning about an inference kernel that is not used here.

    As it is imported it has torch.compile wrap four functions for devices without kernels of their own, which imports torch's whole
    compiler: half a second of every start. A machine without CUDA never calls them (0.50.2: each has a kernel for CPUs).
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    spared = (
        contextlib.nullcontext()
        if torch.cuda.is_available()
        else mock.patch.object(torch, "compile", lambda f=None, **_: f or (lambda g: g))
    )
    with warnings.catch_warnings(), spared:
        warnings.simplefilter("ignore")
        import bitsandbytes.functional

    return bitsandbytes.functional
