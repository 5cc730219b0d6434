"""Gradient clipping: a largest norm, and ZClip's limit for outliers."""

import math

import pytest
import torch

from bdh_mlflow.training.clipping import WARMUP, Clipping, ZClip


def warmed_up(norms: list[float]) -> ZClip:
    zclip = ZClip(2.5)
    assert [zclip.limit(norm) for norm in norms] == [math.inf] * WARMUP
    return zclip


def test_an_outlier_is_clipped_to_the_papers_limit() -> None:
    """Norms 1 and 3 in turn: mean 2 - 1/25, variance 1 - 1/625; at 10, z = 8.05 and the limit m + s 2.5^2 / z."""
    zclip = warmed_up([1.0, 3.0] * (WARMUP // 2) + [1.0])
    mean, deviation = 49 / 25, math.sqrt(624 / 625)
    z = (10 - mean) / deviation
    limit = zclip.limit(10.0)
    assert limit == pytest.approx(mean + 6.25 / z * deviation)
    state = zclip.state_dict()
    assert state["mean"] == pytest.approx(0.97 * mean + 0.03 * limit)
    assert state["variance"] == pytest.approx(0.97 * deviation**2 + 0.03 * (limit - state["mean"]) ** 2)


def test_ordinary_and_equal_norms_are_left_alone() -> None:
    assert warmed_up([1.0, 3.0] * (WARMUP // 2) + [1.0]).limit(4.0) == math.inf
    assert warmed_up([2.0] * WARMUP).limit(9.0) == math.inf, "without any spread there is no outlier"


def test_it_continues_where_its_state_was_taken() -> None:
    straight, again = ZClip(2.5), ZClip(2.5)
    norms = [1.0 + (7 * i % 5) / 4 for i in range(40)]
    for i, norm in enumerate(norms):
        if i == 17:
            again.load_state_dict(straight.state_dict())
        assert straight.limit(norm) == (again.limit(norm) if i >= 17 else math.inf)
    assert straight.state_dict() == again.state_dict()


def test_gradients_are_clipped_by_whichever_limit_is_smaller_and_the_norm_before_is_returned() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))

    def clip(largest: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_([parameter], largest)

    clipping = Clipping(clip, 5.0, 2.5)
    for norm in [1.0, 3.0] * (WARMUP // 2) + [1.0, 10.0]:
        parameter.grad = torch.tensor([norm])
        assert float(clipping()) == norm
    assert float(parameter.grad) == pytest.approx(49 / 25 + 6.25 / (10 - 49 / 25) * 624 / 625, rel=1e-5)
    parameter.grad = torch.tensor([math.nan])
    assert math.isnan(float(clipping())), "what is not finite is not taken in; the trainer stops"
    assert Clipping(clip, 5.0, 0.0).state_dict() == {}
