"""Rotations of neurons by the position of their token (RoPE), and the frequencies that they turn with, which are a part of the model.

Neurons 2i and 2i + 1 of every head are a pair and turn together. How fast is data, not a rule: a model whose neurons were joined from
several keeps the frequency of each. T positions, N neurons a head.   Source: arXiv:2509.26507; pathwaycom/bdh, bdh.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROPE_THETA = 2.0**16  # pathwaycom/bdh, bdh.py
FREQUENCIES = "attn.freqs"
"""Their name in a state dict."""

# MKL chooses its kernel for a function in the function's first call. Where two threads make that call at once, one may get a kernel of 11
# bits, and the angles of half a table would be wrong for a whole training (pytorch/pytorch#188792). One element is one thread's work.
for _function in (torch.cos, torch.sin):
    _function(torch.zeros(1))


class RopeTable(NamedTuple):
    """Rotations of neuron pairs by position.   cos, sin: (T, N / 2), fp32."""

    cos: Tensor
    sin: Tensor


def frequencies(neurons: int, device: torch.device | str | None = None) -> Tensor:
    """Those of an untrained model: theta^(-2i / N) / (2 pi) full turns a token for neurons 2i and 2i + 1 of N.   Returns (N,), fp32."""
    pair = torch.arange(neurons, dtype=torch.float32, device=device) // 2 * 2
    return 1.0 / (ROPE_THETA ** (pair / neurons)) / (2 * math.pi)


def rope_table(start: int, stop: int, freqs: Tensor) -> RopeTable:
    """Rotations for positions start <= t < stop.   freqs: (N,), full turns a token, on the device of the result."""
    return rope_at(torch.arange(start, stop, device=freqs.device), freqs)


def rope_at(positions: Tensor, freqs: Tensor) -> RopeTable:
    """Rotations for any positions.   positions: (P,), integers.   freqs: (N,), full turns a token.   Returns a table of P rows.

    The published code computes the angle in full turns and takes it modulo 1 in fp32 before cos and sin; the same is done here, so the
    values agree to the bit.
    """
    angle = ((positions.float().unsqueeze(1) * freqs[0::2]) % 1) * (2 * math.pi)
    return RopeTable(torch.cos(angle), torch.sin(angle))


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate neuron pairs by position.   x: (..., T, N).   Returns the same shape and dtype; computed in fp32."""
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * table.cos - odd * table.sin, odd * table.cos + even * table.sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def seen_from(state: Tensor, tokens: int | Tensor, freqs: Tensor) -> Tensor:
    """A sum of rotated keys times values as it is seen from a token `tokens` positions later, which then has position 0.

    The scores of queries and keys depend on their distance only; counted from there, no position outgrows what fp32 can hold.
    state: (B, H, N, D).   tokens: of all rows, or of each, (B,).   freqs: (N,), full turns a token.   Returns the same shape, computed in
    fp32 at least.
    """
    later = torch.as_tensor(tokens, device=freqs.device).view(-1)
    cos, sin = (t[:, None, :, None] for t in rope_at(later, freqs))
    even, odd = state[..., 0::2, :], state[..., 1::2, :]
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-2).flatten(-3, -2)


def why_no_frequencies(freqs: Tensor) -> str | None:
    """What is wrong with frequencies; None if nothing is.   freqs: (..., N)."""
    if not bool(torch.isfinite(freqs).all()):
        return "not all of them are finite"
    if not torch.equal(freqs[..., 0::2], freqs[..., 1::2]):
        return "the two neurons of a pair turn at different speeds"
    return None


class Rope(nn.Module):
    """The frequencies of a model, under their published name `attn.freqs`, and the last table made of them.

    freqs: (1, 1, 1, N), full turns a token, fp32 whatever the dtype of the model: rounded to bfloat16 they would be other frequencies.
    """

    freqs: Tensor

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.register_buffer("freqs", frequencies(neurons).view(1, 1, 1, -1))
        self._cached: tuple[tuple[int, bool], RopeTable] | None = None

    @property
    def each(self) -> Tensor:
        """Of each neuron, (N,)."""
        return self.freqs.view(-1)

    def table(self, tokens: int, arranged: Callable[[RopeTable], RopeTable] | None = None) -> RopeTable:
        """For the first T positions, kept for the next call.   arranged: reorders it."""
        key = (tokens, arranged is not None)
        if self._cached is None or self._cached[0] != key:
            table = rope_table(0, tokens, self.each)
            self._cached = key, table if arranged is None else arranged(table)
        return self._cached[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        before, self._cached = self.freqs, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.freqs.dtype is not torch.float32:
            self.freqs = before.to(self.freqs.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Weights without frequencies have those of an untrained model; rounded ones of it, saved in fewer bits, are those as well."""
        own = frequencies(self.freqs.numel(), self.freqs.device).view_as(self.freqs)
        given = state_dict.get(f"{prefix}freqs", own)
        rounded = given.dtype is not torch.float32 and torch.equal(given.to(own.device), own.to(given.dtype))
        state_dict[f"{prefix}freqs"] = own if rounded else given
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *rest)
