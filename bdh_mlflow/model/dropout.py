"""Dropout masks as a hash of their place: nothing is drawn, kept or synchronised, and a mask can be made again wherever it is needed.

A neuron is dropped where its 16 bits of the hash are below a threshold. A mask costs a few passes over a quarter of its elements, in
integers, and is the same on every device; a generator seeded for each block takes twelve times as long on two cores.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Increment, shifts and factors of splitmix64."""
HASHED_AT_ONCE = 2**20  # elements of a mask, a multiple of 4; bounds the memory for hashing to 6 MiB


class Dropout(NamedTuple):
    """Of the activations of one block.   probability: of dropping a neuron.   key: of the block's mask."""

    probability: float
    key: int

    @property
    def threshold(self) -> int:
        """A neuron is kept if its 16 random bits, as a signed number, reach it."""
        return _dropped_of_65536(self.probability) - 2**15

    @property
    def seed(self) -> int:
        """Of splitmix64: the hashed key, unsigned."""
        return _mixed(self.key % 2**64)


def keep_probability(dropout: float) -> float:
    """With which `keep_mask` keeps a neuron: 1 - dropout, rounded to a multiple of 2^-16."""
    return 1 - _dropped_of_65536(dropout) / 2**16


def keep_mask(like: Tensor, dropout: float, key: int) -> Tensor:
    """1 where dropout keeps a neuron, 0 where it drops it: int16, of the shape and device of `like`, the same for the same key."""
    mask = torch.empty(like.shape, dtype=torch.int16, device=like.device)
    kept, threshold = mask.view(-1), Dropout(dropout, key).threshold
    for start in range(0, kept.numel(), HASHED_AT_ONCE):
        piece = kept[start : start + HASHED_AT_ONCE]
        bits = _hashed(key, start // 4, -(-len(piece) // 4), like.device).view(torch.int16)
        torch.ge(bits[: len(piece)], threshold, out=piece)
    return mask


def _dropped_of_65536(dropout: float) -> int:
    return min(round(dropout * 2**16), 2**16 - 1)


def _hashed(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """splitmix64 with a hashed key as its seed: (count,) int64 of random bits, from number `start` of the key's sequence on.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014); its product with GOLDEN is that of the counter.
    """
    seed = _signed(_mixed(key % 2**64) + start * GOLDEN)
    x = _counters(device)[:count] + seed
    shifted = torch.empty_like(x)
    for shift, factor in MIXING:
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # torch's shift of a negative number keeps its sign
        if factor != 1:
            x *= _signed(factor)
    return x


def _mixed(x: int) -> int:
    """The same hash of one number, unsigned."""
    for shift, factor in MIXING:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x


@functools.lru_cache(maxsize=1)
def _counters(device: torch.device) -> Tensor:
    return torch.arange(HASHED_AT_ONCE // 4, device=device) * _signed(GOLDEN)


def _signed(x: int) -> int:
    """The int64 with the same bits as x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63
