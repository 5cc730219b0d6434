"""4-bit weights: block-wise NF4 or FP4 values by bitsandbytes, seen by the model in training and packed for a file.

Blocks of 64 weights share a scale, the largest absolute value among them; `double_quant` keeps the scales in 8 bits (QLoRA,
arXiv:2305.14314). Knows parameters only by name and value.
"""

import functools
import logging
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # weights sharing one scale; the default of bitsandbytes and of QLoRA
PIECE = 2**17  # weights rounded at a time on a CPU: what its caches hold
BINS = 4096  # between 0 and 1; narrower than half the smallest distance of two bounds between levels (fp4: 1/192)


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
    where a row is not a multiple of the block (relative error 0.22 instead of 0.09). On a CPU the values are found by `_rounded_by_table`,
    the same to the bit: the library's way takes three times as long, a fifth of a quickstart step.
    """
    if weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.numel() % BLOCK == 0:
        return _rounded_by_table(weight.reshape(-1), quantization_type, double_quant).view(weight.shape)
    packed, state = _quantised(weight, quantization_type, double_quant)
    rounded: Tensor = _bitsandbytes().dequantize_4bit(packed, state)
    return rounded.reshape(weight.shape)


def pack_4bit(weight: Tensor, quantization_type: str, double_quant: bool) -> dict[str, Tensor]:
    """What `round_to_4bit` rounds to, packed: codes, two a byte, under "", and bitsandbytes' quantisation state by its names."""
    packed, state = _quantised(weight, quantization_type, double_quant)
    return {"": packed, **state.as_dict(packed=True)}


def unpack_4bit(parts: dict[str, Tensor]) -> Tensor:
    """The values of `pack_4bit`'s weight, flat, to the bit those of `round_to_4bit`."""
    functional = _bitsandbytes()
    packed = parts[""]
    state = functional.QuantState.from_dict({k: v for k, v in parts.items() if k}, device=packed.device)
    weight: Tensor = functional.dequantize_4bit(packed, state)
    return weight.reshape(-1)


def _quantised(weight: Tensor, quantization_type: str, double_quant: bool) -> tuple[Tensor, Any]:
    packed, state = _bitsandbytes().quantize_4bit(
        weight.reshape(-1), blocksize=BLOCK, quant_type=quantization_type, compress_statistics=double_quant
    )
    return packed, state


class _Table(NamedTuple):
    """How to find the nearest level of a value by its bin.   bound: (2 * BINS + 1,), between two levels, the one nearest to the bin.
    levels: (2 * (2 * BINS + 1),), for each bin the level below and the level above that bound.
    """

    bound: Tensor
    levels: Tensor


@functools.cache
def _table(quantization_type: str) -> _Table:
    levels = _bitsandbytes().get_4bit_type(quantization_type, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    centres = torch.arange(-BINS, BINS + 1) / BINS
    nearest = (centres[:, None] - bounds).abs().argmin(dim=1)
    return _Table(bounds[nearest], torch.stack((levels[nearest], levels[nearest + 1]), dim=1).flatten())


def _rounded_by_table(flat: Tensor, quantization_type: str, double_quant: bool) -> Tensor:
    """What bitsandbytes' quantise and dequantise make of whole blocks.   flat: (n,), n a multiple of BLOCK."""
    functional, table = _bitsandbytes(), _table(quantization_type)
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
