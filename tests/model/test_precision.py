"""What is asked for runs, counted, or is refused."""

from typing import Any

import pytest
import torch

from bdh_mlflow import host
from bdh_mlflow.config import Config, LowPrecisionConfig
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.model import (
    fourbit,
    precision,
)
from bdh_mlflow.model.bdh import BDH, PROJECTIONS, BDHConfig
from bdh_mlflow.model.fourbit import FourBitView, round_to_4bit
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.training.optim import build_optimizer

CPU = torch.device("cpu")
SHAPE = BDHConfig(n_layer=2, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=4)


def prepared(**wish: Any) -> tuple[BDH, Precision, str]:
    torch.manual_seed(0)
    model, runs = BDH(SHAPE), Precision(CPU, LowPrecisionConfig(**wish))
    return model, runs, runs.prepare(model, PROJECTIONS)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.0921), ("fp4", 0.122)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 32), (4, 64, 64), (3, 10, 6)], ids=str)
def test_4bit_rounding_has_the_error_of_the_format_for_rows_of_any_length(kind: str, error: float, nested: bool, shape: tuple) -> None:
    """Normal weights: relative RMS error 0.092 for nf4, 0.122 for fp4 (measured on a million of them); few weights scatter."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    rounded = round_to_4bit(weight, kind, nested)
    assert rounded.shape == weight.shape
    assert float((rounded - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_values_are_those_of_the_library_to_the_bit(kind: str, nested: bool) -> None:
    """Also at and beside the bounds between levels, for zeros, and over several pieces."""
    levels = fourbit._bitsandbytes().get_4bit_type(kind, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    edges = [torch.nextafter(bounds, torch.tensor(side)) for side in (-2.0, 2.0)]
    hard = torch.cat([bounds, *edges, levels, torch.zeros(2), torch.ones(1)])[:64]
    weight = torch.cat([hard, torch.zeros(64), torch.full((64,), 1e-30), torch.randn(3 * fourbit.PIECE)])
    packed, state = fourbit._quantised(weight, kind, nested)
    assert torch.equal(round_to_4bit(weight, kind, nested), fourbit._bitsandbytes().dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_weights_take_at_most_sixteen_values_a_block(kind: str) -> None:
    rounded = round_to_4bit(torch.randn(64 * 10), kind, False).reshape(10, 64)
    assert all(2 < len(block.unique()) <= 16 for block in rounded)


def test_forward_pass_sees_4bit_weights_and_gradients_reach_the_masters() -> None:
    model, _, described = prepared(use_4bit=True, compute_dtype="float32")
    idx = torch.randint(0, 256, (2, 9))
    _, loss = model(idx, idx)
    loss.backward()
    rounded = BDH(SHAPE)
    rounded.load_state_dict(model.state_dict())
    for name in PROJECTIONS:
        rounded.get_parameter(name).data = round_to_4bit(model.get_parameter(name).detach(), "nf4", True)
    _, expected = rounded(idx, idx)
    expected.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, rounded.get_parameter(name).grad), name
    assert described == "float32 matmuls; nf4 weights with double-quantised scales in 3 of 3 projections, float32 masters; cpu"


def test_generation_and_evaluation_see_4bit_weights_too() -> None:
    model, _, _ = prepared(use_4bit=True, compute_dtype="float32")
    plain = BDH(SHAPE).eval()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(0, 256, (1, 9))
    assert not torch.equal(model.eval()(idx)[0], plain(idx)[0])


def test_weights_are_quantised_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW does not count its writes in the parameters' versions; the view must learn of them all the same."""
    model, runs, _ = prepared(use_4bit=True)
    optimizer = build_optimizer(model.parameters(), Config().training)
    runs.prepare(model, PROJECTIONS, optimizer)
    calls: list[int] = []
    real = fourbit.round_to_4bit
    monkeypatch.setattr(fourbit, "round_to_4bit", lambda *a: calls.append(1) or real(*a))
    for _ in range(3):
        for _ in range(2):
            idx = torch.randint(0, 256, (1, 5))
            model(idx, idx)[1].backward()
        optimizer.step()
    model(idx)
    assert len(calls) == 3 * len(PROJECTIONS)  # after each of three updates; the first weights were quantised by `prepare`


def test_loading_a_checkpoint_renews_the_quantised_weights() -> None:
    model, _, _ = prepared(use_4bit=True)
    other = BDH(SHAPE)
    model.load_state_dict(other.state_dict())
    view = model.weight_view
    assert isinstance(view, FourBitView)
    assert torch.equal(view("encoder", model.encoder), round_to_4bit(other.encoder.detach(), "nf4", True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compute_dtype_is_the_one_of_the_matmuls_and_masters_stay_fp32(dtype: str) -> None:
    model, runs, described = prepared(use_4bit=False, compute_dtype=dtype)
    idx = torch.randint(0, 256, (1, 5))
    with runs.autocast():
        logits, loss = model(idx, idx)
    loss.backward()
    assert logits.dtype == getattr(torch, dtype)
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert described.startswith(dtype)
    assert runs.scaler().is_enabled() == (dtype == "float16")


def test_fp8_without_a_capable_device_is_refused_with_what_was_asked() -> None:
    recipe = {"format": "e4m3", "amax_history_len": 16, "amax_compute_algo": "most_recent"}
    tree = {"low_precision": {"use_fp8": True, "use_4bit": False}, "fp8": recipe}
    with pytest.raises(ConfigError, match=r"use_fp8: true \(e4m3, amax most_recent of 16 steps\) needs CUDA capability 8.9 or newer; this"):
        Config.from_dict(tree, checks=[precision.problems])


@pytest.mark.parametrize(
    ("capability", "message"),
    [((8, 0), "cuda:0 has CUDA capability 8.0"), ((9, 0), "needs Transformer Engine, which cannot be imported")],
)
def test_fp8_on_cuda_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], message: str) -> None:
    monkeypatch.setattr(precision, "pick_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(precision, "_no_float16", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    (problem,) = precision.problems(Config.from_dict({"low_precision": {"use_fp8": True, "use_4bit": False}}))
    assert message in problem.message
    assert "fp8.emulate" in problem.message


def test_float16_on_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_dict({"low_precision": {"compute_dtype": "float16"}})
    assert list(precision.problems(config)) == []
    monkeypatch.setattr(precision.torch, "ones", lambda *shape, **how: _refusing())
    (problem,) = precision.problems(config)
    assert problem.key == "low_precision.compute_dtype"
    assert "not implemented for 'Half'" in problem.message


def _refusing() -> None:
    raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")


def test_missing_bitsandbytes_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    (problem,) = precision.problems(Config())
    assert "pip install bitsandbytes" in problem.message


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiler", lambda: None)
    (problem,) = precision.problems(Config.from_dict({"training": {"compile": True}}))
    assert problem.key == "training.compile"


@pytest.mark.slow
@pytest.mark.skipif(host.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore:The .grad attribute:UserWarning")  # torch's own, while tracing
def test_compiled_layers_with_4bit_weights_give_the_same_loss() -> None:
    model, _, _ = prepared(use_4bit=True, compute_dtype="float32")
    idx = torch.randint(0, 256, (2, 9))
    _, plain = model(idx, idx)
    model.use("reference", compiled=True)
    _, compiled = model(idx, idx)
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_forward_on_cuda_is_finite() -> None:
    model = BDH(SHAPE).cuda()
    runs = Precision(precision.pick_device(), LowPrecisionConfig(use_4bit=True))
    runs.prepare(model, PROJECTIONS)
    idx = torch.randint(0, 256, (2, 9), device="cuda")
    with runs.autocast():
        assert torch.isfinite(model(idx, idx)[1])
