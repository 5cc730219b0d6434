"""Learning-rate schedules against values computed by hand; states of few bits, counted."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdh_mlflow import host
from bdh_mlflow.config import Config, SchedulerConfig, TrainingConfig
from bdh_mlflow.errors import CheckpointError, ConfigError
from bdh_mlflow.training import optim
from bdh_mlflow.training.optim import LearningRate, build_optimizer

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
def test_schedule_after_warm_up(kind: Any, expected: dict[int, float]) -> None:
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


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler is: seconds instead of half a minute."""
    monkeypatch.setattr(host, "compiler", lambda: None)


def parameters() -> list[nn.Parameter]:
    """Two that are large enough for few bits, one that is too small, one whose size no block of 4-bit states divides."""
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((64, 64), (128, 96), (10, 10), (1000, 33))]


def tensors_of(state: object) -> list[torch.Tensor]:
    """Tensors in a nested state."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors_of(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def updated(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step()


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize(("bits", "low"), [(32, 0), (8, 3), (4, 2)])
def test_bytes_of_states_are_what_is_said_of_them(bits: int, low: int) -> None:
    own = parameters()
    optimizer = build_optimizer(own, TrainingConfig(), bits)
    updated(own, optimizer, range(2))
    said = optim.described(own, bits)
    each = optim.state_bytes(optimizer.state_dict()) / sum(p.numel() for p in own)
    assert f"{each:.2f} bytes a parameter" in said
    assert bits == 32 or f"in {low} of 4 parameters" in said


@pytest.mark.usefixtures("_eager")
def test_states_of_large_models_take_8_2_and_1_bytes_a_parameter() -> None:
    for bits, expected in ((32, 8.0), (8, 2.031), (4, 1.063)):
        own = [nn.Parameter(torch.randn(512, 512))]
        optimizer = build_optimizer(own, TrainingConfig(), bits)
        updated(own, optimizer, range(1))
        assert optim.state_bytes(optimizer.state_dict()) / 512**2 == pytest.approx(expected, abs=0.001)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_follow_adamw(bits: int) -> None:
    """Within a fifth of what 32 bits move the weights, after ten noisy updates."""
    start, exact, own = parameters(), parameters(), parameters()
    updated(exact, build_optimizer(exact, TrainingConfig(), 32), range(10))
    updated(own, build_optimizer(own, TrainingConfig(), bits), range(10))
    for before, e, o in zip(start, exact, own, strict=True):
        assert (o - e).norm() < 0.2 * (e - before).norm()
        assert not torch.equal(e, before)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("keys", ["names", "numbers, as in format 1"])
def test_saved_states_open_without_the_library_and_continue_to_the_bit(bits: int, keys: str, tmp_path: Path) -> None:
    straight = parameters()
    optimizer = build_optimizer(straight, TrainingConfig(), bits)
    updated(straight, optimizer, range(3))
    state = optim.named_state(optimizer, nn.ParameterList(straight)) if keys == "names" else optimizer.state_dict()
    assert list(state["state"]) == state["param_groups"][0]["params"] == ([*"0123"] if keys == "names" else [0, 1, 2, 3])
    torch.save({"o": state, "p": [p.detach() for p in straight]}, tmp_path / "s.pt")
    updated(straight, optimizer, range(3, 6))

    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    again = [nn.Parameter(p) for p in saved["p"]]
    optimizer = build_optimizer(again, TrainingConfig(), bits)
    optim.load_named_state(optimizer, nn.ParameterList(again), saved["o"])
    updated(again, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))
    assert all(type(t) is torch.Tensor for state in saved["o"]["state"].values() for t in tensors_of(state))


def test_state_of_other_parameters_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model.parameters(), TrainingConfig())
    updated(list(model.parameters()), optimizer, range(1))
    state = optim.named_state(optimizer, model)
    state["state"]["gain"] = state["state"].pop("bias")
    with pytest.raises(CheckpointError, match="the optimizer's state has a parameter 'gain'; the model has weight, bias"):
        optim.load_named_state(optimizer, model, state)


@pytest.mark.slow
@pytest.mark.skipif(host.compiler() is None, reason="needs a C++ compiler")
def test_compiled_4bit_update_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, plain = parameters()[:1], parameters()[:1]
    updated(compiled, build_optimizer(compiled, TrainingConfig(), 4), range(2))
    monkeypatch.setattr(host, "compiler", lambda: None)
    updated(plain, build_optimizer(plain, TrainingConfig(), 4), range(2))
    assert torch.allclose(compiled[0], plain[0], atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_names_that_contradict_each_other_are_refused(bits: int) -> None:
    tree = {"low_precision": {"use_4bit_optimizer": True, "optimizer_bits": bits}}
    with pytest.raises(ConfigError, match=f"optimizer_bits: {bits} cannot be combined with low_precision.use_4bit_optimizer true: set one"):
        Config.from_dict(tree)


def test_missing_library_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = optim.problems(Config.from_dict({"low_precision": {"use_4bit_optimizer": True}}))
    assert problem.key == "low_precision.use_4bit_optimizer"
    assert "pip install torchao" in problem.message


def test_model_too_small_for_few_bits_is_refused() -> None:
    small = {"n_embd": 8, "n_head": 1, "mlp_internal_dim_multiplier": 4}
    (problem,) = optim.problems(Config.from_dict({"model": small, "low_precision": {"optimizer_bits": 8}}))
    assert "those of this model have 256 and 2048" in problem.message


def muon(own: list[nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(own, TrainingConfig(optimizer="muon", learning_rate=0.02, betas=(0.8, 0.95)), projections=own[:2])


def matrices() -> list[nn.Parameter]:
    """A projection of two heads, one that is a matrix, and a parameter that Muon leaves to AdamW."""
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((2, 8, 16), (32, 8), (10, 8))]


def test_muon_updates_each_head_as_torch_does_a_matrix_and_the_rest_by_adamw() -> None:
    own, others = matrices(), matrices()
    heads = [nn.Parameter(head.detach().clone()) for head in others[0]]
    theirs = [
        torch.optim.Muon([*heads, others[1]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others[2:], lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), fused=True),
    ]
    optimizer = muon(own)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter, other in zip(own, others, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            other.grad = parameter.grad.clone()
        for head, gradient in zip(heads, others[0].grad, strict=True):
            head.grad = gradient.clone()
        for each in (optimizer, *theirs):
            each.step()
    assert torch.equal(own[0], torch.stack([head.detach() for head in heads]))
    assert torch.equal(own[1], others[1])
    assert torch.equal(own[2], others[2])
    said = optim.described(own, 32, own[:2])
    bytes_each = optim.state_bytes(optimizer.state_dict()) / sum(p.numel() for p in own)
    assert said == f"Muon for 2 of 3 parameters (torch), AdamW for the others, {bytes_each:.2f} bytes a parameter"


def test_muon_continues_to_the_bit() -> None:
    straight = matrices()
    optimizer = muon(straight)
    updated(straight, optimizer, range(3))
    state = optim.named_state(optimizer, nn.ParameterList(straight))
    saved, weights = copy.deepcopy(state), [p.detach().clone() for p in straight]
    assert [list(each) for each in saved["state"].values()] == [["momentum_buffer"]] * 2 + [["step", "exp_avg", "exp_avg_sq"]]
    updated(straight, optimizer, range(3, 6))
    again = [nn.Parameter(weight) for weight in weights]
    optimizer = muon(again)
    optim.load_named_state(optimizer, nn.ParameterList(again), saved)
    updated(again, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again, straight, strict=True))
