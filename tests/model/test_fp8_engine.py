"""What the Transformer Engine adapter relies on, checked against that library's own source.

The library itself runs only where a GPU has it. Everywhere else the adapter is checked against a stub that multiplies in float32, and the
stub against the signatures in the library's wheel (BDH_TE_WHEEL, which .ci/run fetches).
"""

import ast
import contextlib
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

from bdh_mlflow.config import Fp8Config
from bdh_mlflow.model import fp8, precision
from bdh_mlflow.model.bdh import BDH, PROJECTIONS
from bdh_mlflow.model.fp8 import Emulated, Engine
from bdh_mlflow.model.precision import Precision
from tests.model.test_fp8 import LARGEST_E4M3, LARGEST_E5M2, SHAPE, fp8_config, learned

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
"""What the adapter calls, with the arguments it passes; the leading ones by position."""


class _Module(nn.Module):
    created: "list[_Module]" = []
    """By all tests so far; a fixture empties it."""

    def __init__(self) -> None:
        super().__init__()
        _Module.created.append(self)
        self.fp8_meta: dict[str, Any] = {}
        self.calls: list[tuple[int, ...]] = []
        torch.rand(1)  # like the library, which draws weights

    def record(self, inp: Tensor) -> None:
        """Quantisers write into the history whether gradients are enabled or not."""
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
        self.record(inp)
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
        self.record(inp)
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
    """A stub of the library; the recipes of the regions that were entered."""
    entered: list[Any] = []
    _Module.created.clear()

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
    assert [module.calls for module in _Module.created] == [
        3 * [(16, 16)],  # encoder
        3 * [(32, 16)],  # encoder_v
        3 * [(16, 64)],  # decoder
    ], "once a layer, in rows"
    assert list(model.state_dict()) == names
    assert str(engine) == "FP8 (hybrid, delayed scaling by amax most_recent of 16, Transformer Engine)"


def fill(modules: list[_Module], length: int) -> None:
    """Scales and histories as after some steps; row 0 of a history is the one being written, the library keeps the newest last."""
    for module in modules:
        module.fp8_meta["num_gemms"] = 2 if isinstance(module, GroupedLinear) else 1
        module.init_fp8_meta_tensors(types.SimpleNamespace(amax_history_len=length))
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
    filled = list(_Module.created)
    fill(filled, 16)
    saved = engine.state_dict()
    assert {type(t) for own in saved.values() for t in own.values()} == {Tensor}
    newest = saved["encoder_v.weight"]["history"][1]
    assert newest.tolist() == filled[1].fp8_meta["scaling_fwd"].amax_history[-1][[1, 4]].tolist()
    again = Engine(Fp8Config(amax_history_len=length))
    again.load_state_dict(saved)
    assert again.state_dict().keys() == saved.keys(), "a checkpoint right after a resume loses nothing"
    model.product = again.product
    drawn = torch.get_rng_state()
    with torch.no_grad(), again.region():
        model(idx)
    assert torch.equal(torch.get_rng_state(), drawn), "creating modules must not change the training's random numbers"
    kept = min(16, length)
    for name, own in again.state_dict().items():
        assert torch.equal(own["scale"], saved[name]["scale"])
        assert torch.equal(own["history"][:kept], saved[name]["history"][:kept]), "and evaluating must not change them"
        assert own["history"].shape[0] == length
    if length == 16:
        for before, after in zip(filled, _Module.created[3:], strict=True):
            for key, columns in (("scaling_fwd", [0, 1]), ("scaling_bwd", [0])):
                ours, theirs = (m.fp8_meta[key].amax_history.view(16, -1, 3 if key == "scaling_fwd" else 2) for m in (after, before))
                assert torch.equal(ours[:, :, columns], theirs[:, :, columns])


@pytest.mark.usefixtures("regions")
def test_engine_and_emulation_continue_from_each_others_state() -> None:
    model, idx = BDH(SHAPE), torch.randint(0, 256, (2, 8))
    engine, imitation = Engine(Fp8Config(amax_history_len=4)), Emulated(Fp8Config(amax_history_len=4))
    model.product = engine.product
    model(idx)
    fill(_Module.created, 4)
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
    assert fp8.why_unavailable(device) is None
    sys.modules["transformer_engine.pytorch"].is_fp8_available = lambda return_reason: (False, "no cuBLASLt")  # type: ignore[attr-defined]
    assert fp8.why_unavailable(device) == "is refused by Transformer Engine: no cuBLASLt"


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

        monkeypatch.setattr(importlib, "import_module", failing)
        assert f"cannot be imported ({error}): pip install" in str(fp8.why_unavailable(torch.device("cuda", 0)))


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
    entered: list[Any] = []
    library = types.SimpleNamespace(autocast=lambda enabled, recipe: contextlib.nullcontext(entered.append(recipe)))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", library)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    kinds: dict[Any, Any] = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}
    for kind, forward in kinds.items():
        with Engine(Fp8Config(format=kind, amax_history_len=8)).region():
            recipe = entered[-1]
        assert recipe.fp8_format is forward
        assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (8, "max", False)
        assert recipe.fp8_format.value.max_fwd == LARGEST_E4M3
        assert recipe.fp8_format.value.max_bwd == (LARGEST_E5M2 if kind == "hybrid" else LARGEST_E4M3)


@pytest.mark.gpu
@pytest.mark.skipif(fp8.why_unavailable(precision.pick_device()) is not None, reason="needs a CUDA device with FP8 and Transformer Engine")
@pytest.mark.parametrize("kind", ["hybrid", "e4m3"])
def test_engine_computes_what_the_emulation_says(kind: str) -> None:
    """On hardware: five updates of both, whose losses part by less than FP8's rounding of them."""
    curves = []
    for emulate in (False, True):
        torch.manual_seed(0)
        config = fp8_config(format=kind, emulate=emulate)
        model, runs = BDH(config.to_bdh_config()).cuda(), Precision.from_config(config, precision.pick_device())
        runs.prepare(model, PROJECTIONS)
        idx = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
        curves.append(learned(model, runs, idx, 5, 1e-3))
    assert curves[0] == pytest.approx(curves[1], rel=0.01)
