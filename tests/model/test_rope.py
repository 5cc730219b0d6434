"""Frequencies as a part of the model."""

import math

import pytest
import torch

from bdh_mlflow.model.rope import Rope, frequencies, rope_at, rope_table, why_no_frequencies


@pytest.mark.parametrize("neurons", [2, 6, 34, 544, 8192])
def test_frequencies_are_the_published_ones(neurons: int) -> None:
    index = torch.arange(0, neurons, 1, dtype=torch.float32)
    published = 1.0 / ((2**16) ** ((index / 2).floor() * 2 / neurons)) / (2 * math.pi)  # pathwaycom/bdh, bdh.py: get_freqs
    assert torch.equal(frequencies(neurons), published)
    assert why_no_frequencies(published) is None


def test_a_table_is_made_of_the_frequencies_it_is_given() -> None:
    freqs = torch.tensor([0.25, 0.25, 0.125, 0.125])
    table = rope_at(torch.tensor([0, 1, 2]), freqs)
    assert torch.allclose(table.cos, torch.tensor([[1, 1], [0, math.sqrt(0.5)], [-1, 0]]), atol=1e-6)
    assert torch.allclose(table.sin, torch.tensor([[0, 0], [1, math.sqrt(0.5)], [0, 1]]), atol=1e-6)


def test_a_cached_table_is_that_of_the_weights_that_are_loaded() -> None:
    rope = Rope(8)
    before = rope.table(5)
    assert rope.table(5) is before
    rope.load_state_dict({"freqs": 3 * rope.freqs})
    assert torch.equal(rope.table(5).cos, rope_table(0, 5, 3 * frequencies(8)).cos)
    assert torch.equal(rope.table(4).sin, rope_table(0, 4, 3 * frequencies(8)).sin)
