"""Learning-rate schedules against values computed by hand."""

import math

import pytest
import torch

from bdh_mlflow.config import SchedulerConfig, TrainingConfig
from bdh_mlflow.optim import LearningRate, build_optimizer

WARM, END = 4, 12  # warm-up and decay_steps in the table below; peak 1, min_lr 0.1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {4: 1.0, 8: 1.0, 12: 1.0, 100: 1.0}),
        ("linear", {4: 1.0, 6: 0.775, 8: 0.55, 12: 0.1, 100: 0.1}),
        ("cosine", {4: 1.0, 6: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 8: 0.55, 12: 0.1, 100: 0.1}),
        ("exponential", {4: 1.0, 5: 0.5, 6: 0.25, 7: 0.125, 8: 0.1, 100: 0.1}),
        ("plateau", {4: 1.0, 8: 1.0, 100: 1.0}),
    ],
)
def test_schedule_after_warm_up(kind: str, expected: dict[int, float]) -> None:
    scheduler = SchedulerConfig(type=kind, warmup_steps=WARM, decay_steps=END, min_lr=0.1, gamma=0.5)
    rate = LearningRate(1.0, scheduler)
    assert [rate.at(step) for step in range(WARM)] == [0.25, 0.5, 0.75, 1.0]
    assert {step: rate.at(step) for step in expected} == pytest.approx(expected)


def test_plateau_cuts_after_patience_and_starts_counting_again() -> None:
    rate = LearningRate(1.0, SchedulerConfig(type="plateau", factor=0.5, patience=1, min_lr=0.2))
    seen = []
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        rate.observe(loss)
        seen.append(rate.at(0))
    assert seen == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2]


def test_plateau_goes_on_from_its_state() -> None:
    scheduler = SchedulerConfig(type="plateau", factor=0.5, patience=1)
    first, second = LearningRate(1.0, scheduler), LearningRate(1.0, scheduler)
    for loss in (1.0, 2.0):
        first.observe(loss)
    second.load_state_dict(first.state_dict())
    for rate in (first, second):
        rate.observe(2.0)
    assert first.at(0) == second.at(0) == 0.5


def test_optimizer_is_adamw_with_decay_on_every_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3, 3))]
    optimizer = build_optimizer(parameters, TrainingConfig(learning_rate=0.5, weight_decay=0.25))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"], len(group["params"])) == (0.5, 0.25, (0.9, 0.999), 2)
