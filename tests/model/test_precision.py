"""The requested number formats run and are described, or are refused with a reason."""

import importlib.util
from typing import Any

import pytest
import torch

from bdh_mlflow import host
from bdh_mlflow.config import Config, LowPrecisionConfig, Machine, resolve
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.model import (
    precision,
)
from bdh_mlflow.model.bdh import BDH, PROJECTIONS, BDHConfig
from bdh_mlflow.model.precision import Precision

CPU = torch.device("cpu")
SHAPE = BDHConfig(n_layer=2, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=4)


def prepared(**wish: Any) -> tuple[BDH, Precision, str]:
    torch.manual_seed(0)
    model, runs = BDH(SHAPE), Precision(CPU, LowPrecisionConfig(**wish))
    return model, runs, runs.prepare(model, PROJECTIONS)


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


def test_fp8_without_a_capable_device_is_refused_with_what_was_requested() -> None:
    recipe = {"format": "e4m3", "amax_history_len": 16, "amax_compute_algo": "most_recent"}
    tree = {"low_precision": {"use_fp8": True, "use_4bit": False}, "fp8": recipe}
    with pytest.raises(ConfigError, match=r"use_fp8: true \(e4m3, amax most_recent of 16 steps\) needs CUDA capability 8.9 or newer; this"):
        Config.from_dict(tree, checks=[precision.problems])


@pytest.mark.parametrize(
    ("capability", "message"),
    [((8, 0), "cuda:0 has CUDA capability 8.0"), ((9, 0), "needs Transformer Engine, which cannot be imported")],
)
def test_fp8_on_cuda_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], message: str) -> None:
    monkeypatch.setattr(precision, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    (problem,) = precision.problems(Config.from_dict({"low_precision": {"use_fp8": True, "use_4bit": False}}))
    assert message in problem.message
    assert "fp8.emulate" in problem.message


def test_float16_on_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_dict({"low_precision": {"compute_dtype": "float16"}})
    assert list(precision.problems(config)) == []
    monkeypatch.setattr(torch, "ones", lambda *shape, **how: _refusing())
    (problem,) = precision.problems(config)
    assert problem.key == "low_precision.compute_dtype"
    assert "not implemented for 'Half'" in problem.message


def _refusing() -> None:
    raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")


def test_missing_bitsandbytes_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
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


def complaints(*settings: str) -> list[str]:
    return [str(problem) for problem in precision.problems(Config.from_dict({}, settings))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a CUDA device")
def test_a_device_that_is_not_here_is_refused_with_what_is() -> None:
    version = torch.__version__
    assert complaints("training.device=cuda") == [
        f"training.device: cuda cannot be used: torch {version} finds no CUDA device; auto takes what is there"
    ]
    assert complaints("training.device=mps") == [
        f"training.device: mps cannot be used: torch {version} finds no Apple GPU; auto takes what is there"
    ]
    assert complaints("training.device=cpu") == complaints() == []
    assert precision.pick_device("mps") == precision.pick_device("cuda:1") == precision.pick_device() == torch.device("cpu")


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert precision.pick_device("cuda:1") == torch.device("cuda:1")
    assert precision.pick_device("cuda") == precision.pick_device() == torch.device("cuda:0")
    assert precision.pick_device("cpu") == torch.device("cpu")
    assert precision.why_device_unavailable("cuda:2") == "this machine has 2 CUDA devices, numbered from 0"


def test_what_apples_gpu_does_not_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be told without one: the operations themselves were not run."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert precision.pick_device("mps") == torch.device("mps")
    found = complaints(
        "training.device=mps", "training.layer_form=blocked", "low_precision.compute_dtype=float16", "low_precision.optimizer_bits=8"
    )
    assert [line.partition(":")[0] for line in found[:4]] == [
        "low_precision.compute_dtype",
        "training.layer_form",
        "low_precision.optimizer_bits",
        "low_precision.use_4bit",
    ]
    settled = resolve(Config.from_dict({}, ["training.device=mps", "low_precision.use_4bit=false"]), Machine("mps", 2**33)).config
    assert (settled.training.layer_form, settled.training.compile) == ("reference", False)
