"""4-bit weights: the values of bitsandbytes to the bit, and quantization-aware training with them."""

import pytest
import torch

from bdh_mlflow.config import Config
from bdh_mlflow.model import fourbit
from bdh_mlflow.model.bdh import BDH, PROJECTIONS
from bdh_mlflow.model.fourbit import FourBitView, pack_4bit, round_to_4bit, unpack_4bit
from bdh_mlflow.training.optim import build_optimizer
from tests.model.test_precision import SHAPE, prepared


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
    """Also at and next to the rounding bounds, for zeros, and over several pieces."""
    library = fourbit.bitsandbytes_functional()
    levels = library.get_4bit_type(kind, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    edges = [torch.nextafter(bounds, torch.tensor(side)) for side in (-2.0, 2.0)]
    hard = torch.cat([bounds, *edges, levels, torch.zeros(2), torch.ones(1)])[:64]
    weight = torch.cat([hard, torch.zeros(64), torch.full((64,), 1e-30), torch.randn(3 * fourbit.PIECE)])
    packed, state = library.quantize_4bit(weight, blocksize=fourbit.BLOCK, quant_type=kind, compress_statistics=nested)
    assert torch.equal(round_to_4bit(weight, kind, nested), library.dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_weights_take_at_most_sixteen_values_a_block(kind: str) -> None:
    rounded = round_to_4bit(torch.randn(64 * 10), kind, False).reshape(10, 64)
    assert all(2 < len(block.unique()) <= 16 for block in rounded)


def test_large_weights_take_4_13_bits() -> None:
    parts = pack_4bit(torch.randn(2**20), "nf4", True)
    assert 8 * sum(t.numel() * t.element_size() for t in parts.values()) / 2**20 == pytest.approx(4.13, abs=0.01)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [64 * 64, 100, 18], ids=["blocks", "a short last block", "less than a block"])
def test_packed_weights_are_the_rounded_ones_to_the_bit(kind: str, nested: bool, size: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02
    assert torch.equal(unpack_4bit(pack_4bit(weight, kind, nested)), round_to_4bit(weight, kind, nested))


def test_forward_pass_uses_4bit_weights_and_gradients_reach_the_masters() -> None:
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


def test_generation_and_evaluation_use_4bit_weights_too() -> None:
    model, _, _ = prepared(use_4bit=True, compute_dtype="float32")
    plain = BDH(SHAPE).eval()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(0, 256, (1, 9))
    assert not torch.equal(model.eval()(idx)[0], plain(idx)[0])


def test_weights_are_quantised_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW does not increment the parameters' version counters; the view must be invalidated all the same."""
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


def test_loading_a_checkpoint_invalidates_the_quantised_weights() -> None:
    model, _, _ = prepared(use_4bit=True)
    other = BDH(SHAPE)
    model.load_state_dict(other.state_dict())
    view = model.weight_view
    assert isinstance(view, FourBitView)
    assert torch.equal(view("encoder", model.encoder), round_to_4bit(other.encoder.detach(), "nf4", True))
