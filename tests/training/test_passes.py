"""The random numbers of a pass, and the order in which gradients of passes are summed."""

import itertools

import torch

from bdh_mlflow.training.passes import seed_pass


def test_what_a_pass_draws_depends_on_seed_step_and_number_only() -> None:
    def drawn(seed: int, step: int, number: int) -> float:
        seed_pass(seed, step, number)
        return torch.rand(()).item()

    places = list(itertools.product((0, 1, 2**62), (0, 1, 12, 112), (0, 1, 2, 12)))
    first = {place: drawn(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert {place: drawn(*place) for place in reversed(places)} == first
