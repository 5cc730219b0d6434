"""Delayed scaling, emulated in torch: rounding, scales and their history, and training with it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_mlflow.config import Config, Fp8Config
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.model import fp8, precision
from bdh_mlflow.model.bdh import BDH, PROJECTIONS, BDHConfig
from bdh_mlflow.model.fp8 import Emulated
from bdh_mlflow.model.precision import Precision

LARGEST_E4M3, LARGEST_E5M2 = 448.0, 57344.0
SHAPE = BDHConfig(n_layer=3, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=4)


def emulated(**recipe: Any) -> Emulated:
    return Emulated(Fp8Config(**{"amax_history_len": 3, **recipe}))


def step(fp8_: Emulated, x: Tensor, weight: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One region of training with one product: its value, and the gradients of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with fp8_.region():
        out = fp8_.product("decoder", x, weight)
    out.backward(torch.ones_like(out) if grad is None else grad)
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


def full(value: float) -> Tensor:
    return torch.full((1, 1, 2, 4), value)


def scale_of(fp8_: Emulated, operand: str) -> float:
    return float(fp8_.state_dict()[f"decoder.{operand}"]["scale"])


WEIGHT = torch.ones(4, 4)


def test_products_of_values_that_fp8_holds_are_exact() -> None:
    x = torch.tensor([[[[1.0, -2.0, 0.5, 16.0], [448.0, 0.0, 3.5, -1.75]]]])
    weight = torch.tensor([[1.0, 2.0], [0.5, -4.0], [0.0, 8.0], [1.0, 1.0]])
    out, d_x, d_weight = step(emulated(), x, weight)
    assert torch.equal(out, x @ weight)
    assert torch.equal(d_x, torch.ones(1, 1, 2, 2) @ weight.T)
    assert torch.equal(d_weight, x[0, 0].T @ torch.ones(2, 2))


def test_operands_are_rounded_to_three_bits_and_gradients_to_two() -> None:
    """Between 1 and 2, e4m3 has steps of 1/8 and e5m2 of 1/4."""
    fp8_ = emulated()
    _, d_x, _ = step(fp8_, full(1.0), torch.eye(4), full(1.0 + 1 / 8 + 0.01))
    assert d_x.unique().tolist() == [1.25]
    out, _, _ = step(emulated(), full(1.0 + 1 / 16 + 0.01), torch.eye(4))
    assert out.unique().tolist() == [1.125]
    _, d_x, _ = step(emulated(format="e4m3"), full(1.0), torch.eye(4), full(1.0 + 1 / 8 + 0.01))
    assert d_x.unique().tolist() == [1.125]


def test_scale_brings_the_largest_value_seen_to_the_largest_of_the_format() -> None:
    fp8_ = emulated()
    step(fp8_, full(7.0), WEIGHT * 0.02, full(1e-6))
    assert scale_of(fp8_, "input") == LARGEST_E4M3 / 7
    assert scale_of(fp8_, "weight") == pytest.approx(LARGEST_E4M3 / 0.02)
    assert scale_of(fp8_, "gradient") == pytest.approx(LARGEST_E5M2 / 1e-6)


def test_first_step_has_scale_one_as_the_hardware_recipe_has() -> None:
    """Gradients of 1e-6 are below e5m2's smallest (2^-16) then, and vanish; one step later they do not."""
    fp8_ = emulated()
    _, lost, _ = step(fp8_, full(1.0), WEIGHT, full(1e-6))
    _, kept, _ = step(fp8_, full(1.0), WEIGHT, full(1e-6))
    assert lost.abs().max() == 0
    assert torch.allclose(kept, full(4e-6), rtol=0.13)


@pytest.mark.parametrize(
    ("algorithm", "largest"), [("max", [8.0, 8.0, 8.0, 2.0, 2.0, 1.0]), ("most_recent", [8.0, 1.0, 2.0, 1.0, 1.0, 1.0])]
)
def test_scale_follows_the_history(algorithm: str, largest: list[float]) -> None:
    """Of three steps, or of the last one."""
    fp8_ = emulated(amax_compute_algo=algorithm)
    seen = []
    for value in (8.0, 1.0, 2.0, 1.0, 1.0, 1.0):
        step(fp8_, full(value), WEIGHT)
        seen.append(LARGEST_E4M3 / scale_of(fp8_, "input"))
    assert seen == largest


def test_values_beyond_their_scale_saturate_and_the_next_step_adapts() -> None:
    fp8_ = emulated()
    step(fp8_, full(1.0), torch.eye(4))
    out, _, _ = step(fp8_, full(100.0), torch.eye(4))
    assert out.unique().tolist() == [1.0]
    out, _, _ = step(fp8_, full(100.0), torch.eye(4))
    assert out.unique().tolist() == pytest.approx([100.0])


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_nan_and_zero_leave_the_scale_alone(algorithm: str) -> None:
    fp8_ = emulated(amax_compute_algo=algorithm, amax_history_len=8)
    step(fp8_, full(2.0), WEIGHT)
    for value in (0.0, float("nan"), float("inf")):
        step(fp8_, full(value), WEIGHT)
        assert scale_of(fp8_, "input") == LARGEST_E4M3 / 2, value
    step(fp8_, full(4.0), WEIGHT)
    assert scale_of(fp8_, "input") == LARGEST_E4M3 / 4, "and later steps update it as usual"


def test_evaluation_uses_the_scales_and_does_not_change_them() -> None:
    fp8_ = emulated()
    step(fp8_, full(1.0), torch.eye(4))
    before = {name: {k: t.clone() for k, t in own.items()} for name, own in fp8_.state_dict().items()}
    with torch.no_grad(), fp8_.region():
        out = fp8_.product("decoder", full(100.0), torch.eye(4))
    assert out.unique().tolist() == [1.0]
    assert all(torch.equal(t, before[name][k]) for name, own in fp8_.state_dict().items() for k, t in own.items())


def test_projection_used_in_every_layer_records_the_largest_amax() -> None:
    fp8_ = emulated()
    with fp8_.region():
        for value in (1.0, 4.0, 2.0):
            fp8_.product("decoder", full(value), WEIGHT.clone().requires_grad_())
    assert scale_of(fp8_, "input") == LARGEST_E4M3 / 4


@pytest.mark.parametrize("name", PROJECTIONS)
def test_shapes_of_all_projections_are_those_of_the_plain_product(name: str) -> None:
    model = BDH(SHAPE)
    heads = {"encoder": 1, "encoder_v": 2, "decoder": 1}[name]
    weight = getattr(model, name).detach()
    x = torch.randn(3, heads, 5, weight.shape[-2])
    shaped = fp8.shape(name, x, weight)
    assert torch.allclose(shaped.restore(shaped.left @ shaped.right), x @ weight, atol=1e-6)
    assert shaped.left.shape[0] == (2 if name == "encoder_v" else 1), "scales per head where weights are per head"


def fp8_config(**recipe: Any) -> Config:
    tree = {
        "model": {"n_layer": 3, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.0},
        "training": {"block_size": 8, "batch_size": 2},
        "low_precision": {"use_fp8": True, "use_4bit": False, "compute_dtype": "float32"},
        "fp8": {"emulate": True, "amax_history_len": 4, **recipe},
    }
    return Config.from_dict(tree, checks=[precision.problems])


def learned(model: BDH, runs: Precision, idx: Tensor, steps: int, rate: float) -> list[float]:
    """Losses of AdamW updates on one batch."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), []
    for _ in range(steps):
        with runs.autocast():
            _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_projection_of_every_layer_runs_in_fp8_and_the_network_still_learns() -> None:
    torch.manual_seed(0)
    config = fp8_config()
    model = BDH(config.to_bdh_config())
    names = list(model.state_dict())
    runs = Precision.from_config(config, torch.device("cpu"))
    assert runs.prepare(model, PROJECTIONS).startswith("FP8 (hybrid, delayed scaling by amax max of 4, emulated) in all 3 projections")
    calls: list[str] = []
    product = model.product
    model.product = lambda name, x, weight: calls.append(name) or product(name, x, weight)  # type: ignore[func-returns-value]
    losses = learned(model, runs, torch.randint(0, 8, (2, 9), generator=torch.Generator().manual_seed(1)), 30, 3e-3)
    assert sorted(calls) == sorted(30 * SHAPE.n_layer * list(PROJECTIONS))
    assert losses[-1] < 0.7 * losses[0]
    assert list(model.state_dict()) == names, "scales must not enter the published weights"


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_training_continues_from_saved_scales_to_the_bit(algorithm: str) -> None:
    config = fp8_config(amax_compute_algo=algorithm)
    idx = torch.randint(0, 256, (8, 2, 9))

    def trained(batches: Tensor, model: BDH, runs: Precision) -> list[Tensor]:
        losses = []
        for batch in batches:
            with runs.autocast():
                _, loss = model(batch[:, :-1], batch[:, 1:])
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            losses.append(loss.detach())
        return losses

    def new() -> tuple[BDH, Precision]:
        model, runs = BDH(config.to_bdh_config()), Precision.from_config(config, torch.device("cpu"))
        runs.prepare(model, PROJECTIONS)
        return model, runs

    model, runs = new()
    trained(idx[:4], model, runs)
    weights, scales = ({k: v.clone() for k, v in model.state_dict().items()}, runs.state_dict())
    scales = {name: {k: t.clone() for k, t in own.items()} for name, own in scales.items()}
    straight = trained(idx[4:], model, runs)
    again, runs = new()
    again.load_state_dict(weights)
    runs.load_state_dict(scales)
    assert all(torch.equal(a, b) for a, b in zip(trained(idx[4:], again, runs), straight, strict=True))
    forgetful, runs = new()
    forgetful.load_state_dict(weights)
    assert not torch.equal(trained(idx[4:], forgetful, runs)[0], straight[0])


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_emulation_returns_to_its_savepoint_to_the_bit(updates: int) -> None:
    """Also to one before the first pass, and after passes whose gradients are added up."""
    config = fp8_config()
    model, runs = BDH(config.to_bdh_config()), Precision.from_config(config, torch.device("cpu"))
    runs.prepare(model, PROJECTIONS)

    def passes(count: int, scale: int) -> None:
        for number in range(count):
            idx = (torch.arange(18).view(2, 9) * (number + scale)) % 256
            with runs.autocast():
                _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()

    passes(2 * updates, 1)
    restore = runs.savepoint()
    before = copy.deepcopy(runs.state_dict())
    passes(2, 7)
    assert runs.state_dict().keys() == {f"{name}.{role}" for name in PROJECTIONS for role in fp8.ROLES}
    restore()
    after = runs.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name][key], own[key]) for name, own in before.items() for key in own)
    assert bool(before) == bool(updates)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = fp8_config()
        model, runs = BDH(config.to_bdh_config()), Precision.from_config(config, torch.device("cpu"))
        runs.prepare(model, PROJECTIONS)
        model.recompute = recompute
        idx = torch.arange(18).view(2, 9)
        for _ in range(2):
            model.zero_grad()
            with runs.autocast():
                _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
        gradients.append(model.encoder.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_precision": {"use_4bit": True}}, "low_precision.use_4bit: true cannot be combined with low_precision.use_fp8 true"),
        (
            {"low_precision": {"use_4bit": False, "compute_dtype": "float16"}},
            'low_precision.compute_dtype: "float16" cannot be combined with',
        ),
        (
            {"low_precision": {"use_4bit": False}, "training": {"layer_form": "blocked"}},
            'training.layer_form: "blocked" cannot be combined with',
        ),
        (
            {"low_precision": {"use_4bit": False}, "training": {"compile": True}},
            "training.compile: true cannot be combined with low_precision.use_fp8 true",
        ),
        ({"fp8": {"format": "e5m2"}}, 'fp8.format: found the text "e5m2"; its 2 bits of mantissa are too few for weights and activations'),
        ({"model": {"n_embd": 24, "n_head": 2}}, "model.n_embd: D is 24; FP8 products need a multiple of 16"),
        ({"training": {"block_size": 9, "batch_size": 3}}, "training.block_size: batch_size * block_size is 27; FP8"),
    ],
)
def test_settings_that_fp8_cannot_be_combined_with_are_refused_by_name(settings: dict[str, dict[str, Any]], message: str) -> None:
    tree = {"low_precision": {"use_fp8": True}, "fp8": {"emulate": True}}
    with pytest.raises(ConfigError) as refusal:
        Config.from_dict({k: {**tree.get(k, {}), **settings.get(k, {})} for k in {*tree, *settings}}, checks=[precision.problems])
    assert message in str(refusal.value)
