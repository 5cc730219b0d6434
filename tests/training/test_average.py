"""The moving average of the weights."""

import torch
from torch import nn

from bdh_mlflow.training.average import WeightAverage


def test_it_follows_the_weights_by_a_decay_that_grows() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, 0.25)
    for step, weight in ((1, 1.0), (2, 1.0), (9, 2.0)):
        nn.init.constant_(model.weight, weight)
        average.update(step)
    expected = 0.0
    for decay, weight in ((2 / 11, 1.0), (3 / 12, 1.0), (0.25, 2.0)):
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(average.state_dict()["weight"], torch.tensor([[expected]]))


def test_the_model_has_it_in_the_body_and_its_own_weights_afterwards() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    with average.in_place():
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, b + 1) for p, b in zip(model.parameters(), before, strict=True))


def test_a_training_without_one_leaves_it_at_its_weights() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    average.load_state_dict({})
    assert torch.equal(average.state_dict()["weight"], model.weight)
