"""Masks: how often, how independent, and always the same."""

import math

import pytest
import torch
from torch import Tensor

from bdh_mlflow.model.dropout import HASHED_AT_ONCE, keep_mask, keep_probability

SIDE = 1024
SIGMAS = 5.0  # of a mean over SIDE^2 elements; each assertion fails by chance once in two million


def kept(dropout: float, key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return keep_mask(torch.empty(SIDE, SIDE, dtype=dtype), dropout, key).float()


def within(share: float, expected: float, count: int) -> bool:
    return abs(share - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_neurons_are_dropped_with_the_probability_wherever_they_stand(dropout: float) -> None:
    mask = kept(dropout, 7)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    for lane in range(4):  # four neurons share a number of the hash
        part = mask[:, lane::4]
        assert within(part.mean().item(), 1 - dropout, part.numel()), lane
    for part in (mask[: SIDE // 2], mask[SIDE // 2 :]):
        assert within(part.mean().item(), 1 - dropout, part.numel())
    deviation = math.sqrt(dropout * (1 - dropout) / SIDE)
    for means in (mask.mean(0), mask.mean(1)):
        assert ((means - 1 + dropout) / deviation).square().mean().item() == pytest.approx(1, abs=0.25), (
            "rows and columns vary as they should"
        )


@pytest.mark.parametrize("shift", [1, 2, 3, 4, SIDE])
def test_neighbours_are_independent(shift: int) -> None:
    mask = kept(0.5, 11).view(-1)
    both = (mask[shift:] * mask[:-shift]).mean().item()
    assert within(both, 0.25, mask.numel() - shift)


@pytest.mark.parametrize("other", [12, 11 + SIDE, 11 + SIDE * SIDE // 4, -11, 11 + 2**63])
def test_masks_of_different_keys_are_independent(other: int) -> None:
    both = (kept(0.5, 11) * kept(0.5, other)).mean().item()
    assert within(both, 0.25, SIDE * SIDE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_depends_on_its_key_and_size_only(dtype: torch.dtype) -> None:
    assert torch.equal(kept(0.3, 5), kept(0.3, 5, dtype))
    torch.manual_seed(1)
    assert torch.equal(kept(0.3, 5), kept(0.3, 5))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4097, HASHED_AT_ONCE + 3])
def test_any_number_of_neurons_gets_the_beginning_of_the_same_sequence(size: int) -> None:
    long = keep_mask(torch.empty(2 * HASHED_AT_ONCE), 0.3, 9)
    assert torch.equal(keep_mask(torch.empty(size), 0.3, 9), long[:size])
    assert not torch.equal(long[:HASHED_AT_ONCE], long[HASHED_AT_ONCE:])


@pytest.mark.parametrize(("dropout", "keep"), [(0.1, 1 - 6554 / 65536), (0.5, 0.5), (1e-9, 1.0), (1 - 1e-9, 1 / 65536)])
def test_the_probability_is_rounded_and_the_expectation_exact(dropout: float, keep: float) -> None:
    assert keep_probability(dropout) == keep
    assert within(kept(dropout, 3).mean().item(), keep, SIDE * SIDE) or keep == kept(dropout, 3).mean().item()
