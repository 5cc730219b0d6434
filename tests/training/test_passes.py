"""The random numbers of a pass, and the order in which gradients of passes are summed."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bdh_mlflow.training.passes import TreeSum, seed_pass


def test_what_a_pass_draws_depends_on_seed_step_and_number_only() -> None:
    def drawn(seed: int, step: int, number: int) -> float:
        seed_pass(seed, step, number)
        return torch.rand(()).item()

    places = list(itertools.product((0, 1, 2**62), (0, 1, 12, 112), (0, 1, 2, 12)))
    first = {place: drawn(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert {place: drawn(*place) for place in reversed(places)} == first


def summed(gradients: list[Tensor]) -> Tensor:
    used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    total = TreeSum([used, unused])
    for gradient in gradients:
        used.grad = gradient.clone()
        total.add()
        assert used.grad is None
    total.finish()
    assert unused.grad is None
    assert used.grad is not None
    return used.grad


@pytest.mark.parametrize(
    ("passes", "tree"),
    [
        (1, lambda g: g[0]),
        (2, lambda g: g[0] + g[1]),
        (3, lambda g: (g[0] + g[1]) + g[2]),
        (6, lambda g: ((g[0] + g[1]) + (g[2] + g[3])) + (g[4] + g[5])),
        (8, lambda g: ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7]))),
    ],
)
def test_gradients_are_summed_in_a_tree(passes: int, tree: Callable[[list[Tensor]], Tensor]) -> None:
    gradients = [torch.tensor([1.0, 1e8, -1e8]) * (0.1 + i) ** 3 for i in range(passes)]
    assert torch.equal(summed(gradients), tree(gradients))


@pytest.mark.parametrize(("passes", "processes"), [(2, 2), (4, 2), (8, 2), (8, 4), (6, 3), (12, 3), (3, 3), (5, 5)])
def test_the_sum_of_a_process_is_a_node_of_the_tree(passes: int, processes: int) -> None:
    gradients = [torch.randn(3, generator=torch.Generator().manual_seed(i)) * 10**i for i in range(passes)]
    own = passes // processes
    parts = [summed(gradients[rank * own : (rank + 1) * own]) for rank in range(processes)]
    assert torch.equal(summed(parts), summed(gradients))
