"""Delayed scaling, carried out in torch; and what the Transformer Engine adapter relies on, held against that library's own source."""

import ast
import contextlib
import copy
import importlib
import importlib.util
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdh_mlflow.config import Config, Fp8Config
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.model import fp8, precision
from bdh_mlflow.model.bdh import BDH, PROJECTIONS, BDHConfig
from bdh_mlflow.model.fp8 import Emulated, Engine
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


def test_what_outgrows_its_scale_saturates_and_the_next_step_has_room() -> None:
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
    assert scale_of(fp8_, "input") == LARGEST_E4M3 / 4, "and do not stand in the way of what comes after them"


def test_evaluation_uses_the_scales_and_leaves_them() -> None:
    fp8_ = emulated()
    step(fp8_, full(1.0), torch.eye(4))
    before = {name: {k: t.clone() for k, t in own.items()} for name, own in fp8_.state_dict().items()}
    with torch.no_grad(), fp8_.region():
        out = fp8_.product("decoder", full(100.0), torch.eye(4))
    assert out.unique().tolist() == [1.0]
    assert all(torch.equal(t, before[name][k]) for name, own in fp8_.state_dict().items() for k, t in own.items())


def test_projection_that_is_entered_in_every_layer_remembers_the_largest() -> None:
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
    assert shaped.left.shape[0] == (2 if name == "encoder_v" else 1), "scales a head where weights are a head's"


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
    runs = Precision.asked(config, torch.device("cpu"))
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
        model, runs = BDH(config.to_bdh_config()), Precision.asked(config, torch.device("cpu"))
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
    model, runs = BDH(config.to_bdh_config()), Precision.asked(config, torch.device("cpu"))
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
        model, runs = BDH(config.to_bdh_config()), Precision.asked(config, torch.device("cpu"))
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
def test_what_fp8_does_not_go_with_is_refused_by_name(settings: dict[str, dict[str, Any]], message: str) -> None:
    tree = {"low_precision": {"use_fp8": True}, "fp8": {"emulate": True}}
    with pytest.raises(ConfigError) as refusal:
        Config.from_dict({k: {**tree.get(k, {}), **settings.get(k, {})} for k in {*tree, *settings}}, checks=[precision.problems])
    assert message in str(refusal.value)


# Transformer Engine: no machine of ours runs it. What follows holds the adapter against a stand-in that multiplies plainly, and the
# stand-in against the signatures in the library's wheel (BDH_TE_WHEEL, which .ci/run fetches).

WHEEL = os.environ.get("BDH_TE_WHEEL", "")
USED = {
    "transformer_engine/pytorch/module/linear.py": {
        "Linear.__init__": ["in_features", "out_features", "bias", "params_dtype"],
        "Linear.forward": ["inp"],
    },
    "transformer_engine/pytorch/module/grouped_linear.py": {
        "GroupedLinear.__init__": ["num_gemms", "in_features", "out_features", "bias", "params_dtype"],
        "GroupedLinear.forward": ["inp", "m_splits"],
    },
    "transformer_engine/pytorch/module/base.py": {
        "TransformerEngineBaseModule.init_fp8_meta_tensors": ["recipe"],
        "TransformerEngineBaseModule.get_fp8_meta_tensors": [],
        "TransformerEngineBaseModule.reset_fp8_meta_tensors": ["fp8_meta_tensors"],
    },
    "transformer_engine/pytorch/quantization.py": {"autocast.__init__": ["enabled", "recipe"], "is_fp8_available": ["return_reason"]},
}
"""What the adapter calls, with the arguments it gives; the leading ones by position."""


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.calls: list[tuple[int, ...]] = []
        torch.rand(1)  # as the library, which draws weights

    def see(self, inp: Tensor) -> None:
        """Quantisers write into the history whether gradients are wanted or not."""
        if "scaling_fwd" in self.fp8_meta:
            row = self.fp8_meta["scaling_fwd"].amax_history[0]
            torch.maximum(row, inp.detach().abs().max(), out=row)

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        gemms, length = self.fp8_meta["num_gemms"], recipe.amax_history_len
        for key, each in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[key] = types.SimpleNamespace(scale=torch.ones(each * gemms), amax_history=torch.zeros(length, each * gemms))

    def get_fp8_meta_tensors(self) -> dict[str, list[Tensor]] | None:
        if "scaling_fwd" not in self.fp8_meta:
            return None
        return {key: [m.scale.clone(), m.amax_history.clone()] for key, m in self.fp8_meta.items() if key.startswith("scaling")}

    def reset_fp8_meta_tensors(self, fp8_meta_tensors: dict[str, list[Tensor]]) -> None:
        for key, tensors in fp8_meta_tensors.items():
            self.fp8_meta[key].scale.copy_(tensors[0])
            self.fp8_meta[key].amax_history.copy_(tensors[1])


class Linear(_Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, params_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.full((out_features, in_features), float("nan"), dtype=params_dtype))

    def forward(self, inp: Tensor) -> Tensor:
        assert inp.is_contiguous()
        assert self.weight.is_contiguous()
        self.calls.append(tuple(inp.shape))
        self.see(inp)
        return inp @ self.weight.T


class GroupedLinear(_Module):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, params_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        assert not bias
        for i in range(num_gemms):
            setattr(self, f"weight{i}", nn.Parameter(torch.full((out_features, in_features), float("nan"), dtype=params_dtype)))

    def forward(self, inp: Tensor, m_splits: Tensor) -> Tensor:
        assert inp.is_contiguous()
        assert m_splits.dtype == torch.int64
        self.calls.append(tuple(inp.shape))
        self.see(inp)
        parts = inp.split(m_splits.tolist())
        return torch.cat([part @ getattr(self, f"weight{i}").T for i, part in enumerate(parts)])


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


@dataclass
class DelayedScaling:
    fp8_format: Format
    amax_history_len: int
    amax_compute_algo: str
    reduce_amax: bool


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the library; the recipes of the regions that were entered."""
    entered: list[Any] = []

    @contextlib.contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        assert enabled
        entered.append(recipe)
        yield

    engine = types.SimpleNamespace(Linear=Linear, GroupedLinear=GroupedLinear, autocast=autocast)
    engine.is_fp8_available = lambda return_reason: (True, "")
    for name, module in (("pytorch", engine), ("common.recipe", types.SimpleNamespace(Format=Format, DelayedScaling=DelayedScaling))):
        monkeypatch.setitem(sys.modules, f"transformer_engine.{name}", module)
    return entered


def test_engine_multiplies_by_the_published_parameters_and_their_gradients_arrive(regions: list[Any]) -> None:
    torch.manual_seed(0)
    model = BDH(SHAPE)
    names = list(model.state_dict())
    idx = torch.randint(0, 256, (2, 9))
    _, plain = model(idx[:, :-1], idx[:, 1:])
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    engine = Engine(Fp8Config(amax_history_len=16, amax_compute_algo="most_recent"))
    model.product = engine.product
    with engine.region():
        _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-6), name
    assert regions == [DelayedScaling(Format.HYBRID, 16, "most_recent", False)]
    assert {name: module.calls for name, module in engine._modules.items()} == {
        "encoder": 3 * [(16, 16)],
        "encoder_v": 3 * [(32, 16)],
        "decoder": 3 * [(16, 64)],
    }, "once a layer, in rows"
    assert list(model.state_dict()) == names
    assert str(engine) == "FP8 (hybrid, delayed scaling by amax most_recent of 16, Transformer Engine)"


def filled(engine: Engine) -> None:
    """Scales and histories as after some steps; row 0 of a history is the one being written, the library keeps the newest last."""
    for module in engine._modules.values():
        module.fp8_meta["num_gemms"] = 2 if isinstance(module, GroupedLinear) else 1
        module.init_fp8_meta_tensors(engine._recipe)
        for key in ("scaling_fwd", "scaling_bwd"):
            meta = module.fp8_meta[key]
            meta.scale.copy_(torch.rand_like(meta.scale) + 1)
            meta.amax_history[1:] = torch.arange(1, len(meta.amax_history)).float()[:, None] + torch.rand(meta.scale.shape)


@pytest.mark.usefixtures("regions")
@pytest.mark.parametrize("length", [16, 4, 32])
def test_engine_saves_scales_as_plain_tensors_and_takes_them_back(length: int) -> None:
    model, idx = BDH(SHAPE), torch.randint(0, 256, (2, 8))
    engine = Engine(Fp8Config(amax_history_len=16))
    model.product = engine.product
    model(idx)
    filled(engine)
    saved = engine.state_dict()
    assert {type(t) for own in saved.values() for t in own.values()} == {Tensor}
    newest = saved["encoder_v.weight"]["history"][1]
    assert newest.tolist() == engine._modules["encoder_v"].fp8_meta["scaling_fwd"].amax_history[-1][[1, 4]].tolist()
    again = Engine(Fp8Config(amax_history_len=length))
    again.load_state_dict(saved)
    assert again.state_dict().keys() == saved.keys(), "a checkpoint right after a resume loses nothing"
    model.product = again.product
    drawn = torch.get_rng_state()
    with torch.no_grad(), again.region():
        model(idx)
    assert torch.equal(torch.get_rng_state(), drawn), "making modules must not move the training's randomness"
    kept = min(16, length)
    for name, own in again.state_dict().items():
        assert torch.equal(own["scale"], saved[name]["scale"])
        assert torch.equal(own["history"][:kept], saved[name]["history"][:kept]), "and evaluating must leave no trace"
        assert own["history"].shape[0] == length
    if length == 16:
        for name, module in again._modules.items():
            for key, columns in (("scaling_fwd", [0, 1]), ("scaling_bwd", [0])):
                ours, theirs = (
                    m.fp8_meta[key].amax_history.view(16, -1, 3 if key == "scaling_fwd" else 2) for m in (module, engine._modules[name])
                )
                assert torch.equal(ours[:, :, columns], theirs[:, :, columns])


@pytest.mark.usefixtures("regions")
def test_either_goes_on_where_the_other_was() -> None:
    model, idx = BDH(SHAPE), torch.randint(0, 256, (2, 8))
    engine, imitation = Engine(Fp8Config(amax_history_len=4)), Emulated(Fp8Config(amax_history_len=4))
    model.product = engine.product
    model(idx)
    filled(engine)
    imitation.load_state_dict(engine.state_dict())
    model.product = imitation.product
    with imitation.region():
        model(idx)[0].sum().backward()
    assert imitation.state_dict().keys() == engine.state_dict().keys()
    fresh = Engine(Fp8Config(amax_history_len=4))
    fresh.load_state_dict(imitation.state_dict())
    model.product = fresh.product
    model(idx)
    for name, own in fresh.state_dict().items():
        assert torch.equal(own["scale"], imitation.state_dict()[name]["scale"])


def test_engine_is_refused_with_the_librarys_own_reason(regions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.unavailable(device) is None
    sys.modules["transformer_engine.pytorch"].is_fp8_available = lambda return_reason: (False, "no cuBLASLt")  # type: ignore[attr-defined]
    assert fp8.unavailable(device) == "is refused by Transformer Engine: no cuBLASLt"


def test_every_way_in_which_the_library_fails_to_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for error in (
        ImportError("no such"),
        RuntimeError("Found empty transformer-engine meta package"),
        OSError("libnccl"),
        AssertionError("x"),
    ):

        def failing(name: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(fp8.importlib, "import_module", failing)
        assert f"cannot be imported ({error}): pip install" in str(fp8.unavailable(torch.device("cuda", 0)))


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    if not WHEEL:
        pytest.skip("needs Transformer Engine's wheel: set BDH_TE_WHEEL")
    with zipfile.ZipFile(WHEEL) as file:
        yield file


@pytest.mark.parametrize("path", USED)
def test_what_the_adapter_calls_is_in_the_library(wheel: zipfile.ZipFile, path: str) -> None:
    tree = ast.parse(wheel.read(path))
    for name, given in USED[path].items():
        body: list[ast.stmt] = tree.body
        for part in name.split("."):
            (found,) = (n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
            body = found.body
        assert isinstance(found, ast.FunctionDef)
        own = [a.arg for a in (*found.args.args, *found.args.kwonlyargs) if a.arg != "self"]
        assert set(given) <= set(own), name
        by_position = [a for a in given if a not in ("bias", "params_dtype", "enabled", "recipe", "return_reason")]
        assert own[: len(by_position)] == by_position or name.endswith("meta_tensors"), name


def test_weights_carry_the_names_they_are_lent_under(wheel: zipfile.ZipFile) -> None:
    assert 'f"weight{i}"' in wheel.read("transformer_engine/pytorch/module/grouped_linear.py").decode()
    linear = wheel.read("transformer_engine/pytorch/module/linear.py").decode()
    assert 'self.weight_names = ["weight"]' in linear
    assert "getattr(self, name) for name in self.weight_names" in linear


def test_recipe_of_the_library_takes_what_it_is_given(wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own module of recipes, which needs nothing but pydantic."""
    wheel.extract("transformer_engine/common/recipe/__init__.py", tmp_path)
    spec = importlib.util.spec_from_file_location("te_recipes", tmp_path / "transformer_engine/common/recipe/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    recipes = importlib.util.module_from_spec(spec)
    sys.modules["te_recipes"] = recipes
    spec.loader.exec_module(recipes)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    for kind, forward in (("hybrid", recipes.Format.HYBRID), ("e4m3", recipes.Format.E4M3)):
        recipe = Engine(Fp8Config(format=kind, amax_history_len=8))._recipe
        assert recipe.fp8_format is forward
        assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (8, "max", False)
        assert recipe.fp8_format.value.max_fwd == LARGEST_E4M3
        assert recipe.fp8_format.value.max_bwd == (LARGEST_E5M2 if kind == "hybrid" else LARGEST_E4M3)


@pytest.mark.gpu
@pytest.mark.skipif(fp8.unavailable(precision.pick_device()) is not None, reason="needs a CUDA device with FP8 and Transformer Engine")
@pytest.mark.parametrize("kind", ["hybrid", "e4m3"])
def test_engine_computes_what_the_emulation_says(kind: str) -> None:
    """On hardware: five updates of both, whose losses part by less than FP8's rounding of them."""
    curves = []
    for emulate in (False, True):
        torch.manual_seed(0)
        config = fp8_config(format=kind, emulate=emulate)
        model, runs = BDH(config.to_bdh_config()).cuda(), Precision.asked(config, precision.pick_device())
        runs.prepare(model, PROJECTIONS)
        idx = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
        curves.append(learned(model, runs, idx, 5, 1e-3))
    assert curves[0] == pytest.approx(curves[1], rel=0.01)
