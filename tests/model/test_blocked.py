"""The blocked form against the definition: values, gradients, masks, memory."""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdh_mlflow.model import blocked, blocks, dropout, layer
from bdh_mlflow.model.bdh import BDH, BDHConfig
from bdh_mlflow.model.blocks import Plan, arrange, plan_blocks
from bdh_mlflow.model.kernels import by_neuron
from bdh_mlflow.model.layer import LayerWeights
from bdh_mlflow.model.rope import RopeTable, frequencies, rope_table
from tests.model.test_bdh import relative_error

FP32 = 1e-5  # relative to the largest value: fp32 sums in another order
FP64 = 1e-12
NAMES = ("out", "x", "encoder", "encoder_v", "decoder")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _memory_is_filled_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch: int, heads: int, tokens: int, width: int = 24, neurons: int = 30, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """x, encoder, encoder_v, decoder and the gradient of the output, at the scales of a real layer."""
    made = torch.Generator().manual_seed(tokens + 7 * batch + 31 * heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    x = layer.norm(random(batch, 1, tokens, width))
    weights = (random(heads, width, neurons) * 0.1, random(heads, width, neurons) * 0.1, random(heads * neurons, width) * 0.1)
    return tuple(t.to(dtype) for t in (x, *weights, random(batch, 1, tokens, width)))


def results(given: tuple[Any, ...], run: Any) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in given[:4]]
    table = rope_table(0, leaves[0].shape[2], frequencies(leaves[1].shape[2]))
    out = run(leaves[0], LayerWeights(*leaves[1:]), table)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, given[4].to(out.dtype))), strict=True))


def by_blocks(plan: Plan | None = None, *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> Any:
    def run(x: Tensor, weights: LayerWeights, table: RopeTable | Tensor) -> Tensor:
        cut = plan or plan_blocks(x.shape[0], x.shape[2], x.shape[3], weights.encoder.shape[2], dtype or x.dtype, CPU)
        rope = by_neuron(table) if isinstance(table, RopeTable) else table
        return blocked.blocked_layer(x, arrange(weights, dtype or x.dtype, cut), rope, dropout)

    return run


def detached(plan: Plan) -> Any:
    def run(x: Tensor, weights: LayerWeights, table: RopeTable) -> Tensor:
        return blocked.blocked_layer(x, arrange(weights, x.dtype, plan), by_neuron(table), 0.0, blocked.Options(detach=True))

    return run


def by_definition(x: Tensor, weights: LayerWeights, table: RopeTable) -> Tensor:
    return layer.reference_layer(x, weights, table, 0.0)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the largest value; absolute where all are zero, as with one token, which attends to nothing."""
    return {
        name: relative_error(found[name].double(), exact.double()) if exact.any() else float(found[name].abs().max())
        for name, exact in expected.items()
    }


PLANS = [None, Plan(2, 64, 64, 30), Plan(3, 64, 64, 4), Plan(1, 12, 4, 8), Plan(3, 6, 3, 30), Plan(2, 64, 16, 22)]
"""Neurons in one block, in blocks that leave a shorter one, and texts in one chunk, in chunks of one span and of several."""


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 1), (5, 3, 2), (1, 3, 33), (5, 1, 33)])
def test_values_and_every_gradient_are_those_of_the_definition(batch: int, heads: int, tokens: int, plan: Plan | None) -> None:
    given = inputs(batch, heads, tokens)
    found = errors(results(given, by_blocks(plan)), results(given, by_definition))
    assert max(found.values()) < FP64, found


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 511), (5, 3, 1000), (1, 3, 1000)])
def test_lengths_that_divide_by_nothing_in_fp32(batch: int, heads: int, tokens: int) -> None:
    """Against the definition in fp64. With D = 24 the longer ones are cut into chunks with a state."""
    given = inputs(batch, heads, tokens)
    assert (plan_blocks(batch, tokens, 24, 30, torch.float32, CPU).chunk < tokens) == (tokens > 4 * 24)
    exact = results(given, by_definition)
    found = errors(results(tuple(t.float() for t in given), by_blocks()), exact)
    assert max(found.values()) < FP32, found


@pytest.mark.parametrize("tokens", [64, 300, 512])
def test_bfloat16_is_no_further_from_the_truth_than_the_published_form(tokens: int) -> None:
    given = inputs(2, 2, tokens, width=64, neurons=256)
    exact = results(given, by_definition)
    single = tuple(t.float() for t in given)
    with torch.autocast("cpu", torch.bfloat16):
        published = results(single, by_definition)
    ours = results(single, by_blocks(dtype=torch.bfloat16))

    def distance(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    distances = {name: (distance(ours, name), distance(published, name)) for name in NAMES}
    assert {name: pair for name, pair in distances.items() if not pair[0] <= 1.1 * pair[1]} == {}  # 1.1: two draws of rounding errors
    assert distances["out"][0] < 0.006, distances  # bf16 has 8 bits: half a unit is 0.002


@pytest.mark.parametrize("plan", [Plan(2, 9, 9, 8), Plan(1, 6, 3, 30)], ids=str)
def test_dropout_is_the_same_mask_forward_and_backward(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, given the mask in the published order."""
    given = inputs(3, 2, 9)
    torch.manual_seed(5)
    found = results(given, by_blocks(plan, dropout=0.3))
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    full = torch.full((3, 2, 9, 30), torch.nan, dtype=torch.float64)
    for block, head, rows in plan.blocks(3, 2):
        for start, first in itertools.product(range(0, 9, plan.span), range(0, 30, plan.neurons)):
            part = full[rows, head, start : start + plan.span, first : first + plan.neurons].permute(2, 0, 1)
            part.copy_(dropout.keep_mask(part, 0.3, seed + (block * 9 + start) * 30 + first))
    full /= dropout.keep_probability(0.3)
    assert 0.6 < (full > 0).double().mean() < 0.8
    assert full.max() == pytest.approx(1 / 0.7, rel=1e-5)
    assert not torch.equal(full[0], full[1])
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda neurons, p: neurons * full)
    assert max(errors(found, results(given, by_definition)).values()) < FP64


@pytest.mark.parametrize(("tokens", "plan"), [(5, Plan(2, 5, 5, 4)), pytest.param(7, Plan(1, 4, 2, 6), marks=pytest.mark.slow)], ids=str)
def test_gradients_are_finite_differences(tokens: int, plan: Plan) -> None:
    x, *weights, _ = inputs(2, 2, tokens, width=4, neurons=6)
    table = rope_table(0, tokens, frequencies(6))

    def run(*leaves: Tensor) -> Tensor:
        torch.manual_seed(1)
        return by_blocks(plan, dropout=0.2)(leaves[0], LayerWeights(*leaves[1:]), table)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (x, *weights)))


def test_rotations_computed_span_by_span_give_the_same_values() -> None:
    given, run = inputs(2, 2, 33), by_blocks(Plan(1, 12, 4, 8))

    def without_table(x: Tensor, weights: LayerWeights, table: RopeTable) -> Tensor:
        out: Tensor = run(x, weights, frequencies(weights.encoder.shape[2]))
        return out

    assert max(errors(results(given, without_table), results(given, by_definition)).values()) < FP64


@pytest.mark.parametrize("plan", [Plan(2, 33, 33, 8), Plan(1, 12, 4, 8)], ids=["one chunk", "chunks with a state"])
def test_without_backpropagation_through_time_values_stay_and_gradients_are_those_of_constants(plan: Plan) -> None:
    given = inputs(2, 2, 33)
    found = results(given, detached(plan))
    expected = results(given, lambda x, weights, table: layer.reference_layer(x, weights, table, 0.0, layer.LayerOptions(detach=True)))
    assert max(errors(found, expected).values()) < FP64
    through = results(given, by_definition)
    assert torch.equal(expected["out"], through["out"])
    assert errors(found, through)["encoder"] > 0.01
    x = given[0].clone().requires_grad_()
    out = layer.reference_layer(x, LayerWeights(*given[1:4]), rope_table(0, 33, frequencies(30)), 0.0, layer.LayerOptions(detach=True))
    (gradient,) = torch.autograd.grad(out[:, :, 20].sum() + out[:, :, 20, 0].sum(), x)
    assert torch.equal(gradient[:, :, :20], torch.zeros_like(gradient[:, :, :20])), "earlier tokens are constants"
    assert gradient[:, :, 20].any()


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x, *weights, _ = inputs(1, 1, 4)
    x.requires_grad_()
    out = by_blocks()(x, LayerWeights(*weights), rope_table(0, 4, frequencies(30)))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_copies_of_the_weights_are_freed_by_the_backward_pass() -> None:
    x, *weights, grad = inputs(1, 1, 4)
    arranged = arrange(LayerWeights(*(w.requires_grad_() for w in weights)), torch.float32, plan_blocks(1, 4, 24, 30, torch.float32, CPU))
    copy = weakref.ref(arranged.compute[0])
    out = blocked.blocked_layer(x, arranged, rope_table(0, 4, frequencies(30)), 0.0)
    del arranged
    assert copy() is not None
    out.backward(grad)
    assert copy() is None


def test_activity_is_counted_as_in_the_definition() -> None:
    torch.use_deterministic_algorithms(False)
    network = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)).eval()
    idx = torch.randint(0, 256, (3, 300))
    seen = []
    for form in ("reference", "blocked"):
        network.use(form)  # type: ignore[arg-type]
        with torch.no_grad(), network.observed() as facts:
            network(idx)
        seen.append(facts)
    assert seen[0] == pytest.approx(seen[1], abs=1e-4)
    assert all(0 < seen[0][f"bdh/active_{name}_l1"] < 1 for name in ("x", "xy"))


@pytest.mark.slow  # that differences do not grow; single steps are quick tests
def test_curves_of_a_hundred_steps_are_those_of_the_definition() -> None:
    """In fp64: in fp32 two orders of one sum come apart by more than the forms do."""
    torch.use_deterministic_algorithms(False)
    curves = []
    for form in ("reference", "blocked"):
        torch.manual_seed(0)
        network = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)).double()
        network.use(form)  # type: ignore[arg-type]
        optimizer, losses = torch.optim.AdamW(network.parameters(), lr=3e-3), []
        for _ in range(100):
            idx = torch.randint(97, 101, (2, 80)).cumsum(1) % 256
            _, loss = network(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-8


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("tokens", [64, 512])
def test_no_tensor_holds_the_neurons_of_all_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCK_TOKENS, "cpu", 128)
    given = inputs(4, 4, tokens, width=16, neurons=512, dtype=torch.float32)
    with _Largest() as in_blocks:
        results(given, by_blocks())
    with _Largest() as definition:
        results(given, by_definition)
    assert definition.elements == 4 * 4 * tokens * 512
    assert in_blocks.elements <= max(4 * 4 * tokens * 64, 256 * 512)  # scores of all heads and texts; activations of one head for a block


class _Products(TorchDispatchMode):
    """FLOPs of all matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {"mm": args[:2], "bmm": args[:2], "addmm_": args[1:3], "baddbmm_": args[1:3]}.get(func.overloadpacket.__name__)
        if factors:
            self.flops += 2 * factors[0].numel() * factors[1].shape[-1]
        return func(*args, **(kwargs or {}))


def test_flops_are_those_of_the_derivation() -> None:
    """The table in the docstring of `blocked`, for two rows and two heads. Chunks save the products with the first and the last state."""
    tokens, width, neurons, step = 512, 128, 256, 128
    projections, square = tokens * neurons * width, tokens**2
    expected = {
        by_definition: (6 * projections + 2 * square * (neurons + width), 12 * projections + 4 * square * (neurons + width)),
        by_blocks(): (
            6 * projections + tokens * (tokens + step) * neurons + 2 * square * width,
            16 * projections + 2 * square * neurons + 4 * square * width,
        ),
        by_blocks(Plan(1, 256, 128, 128)): (
            10 * projections + tokens * (128 + step) * neurons + 2 * tokens * 128 * width - 4 * 128 * neurons * width,
            26 * projections + 2 * tokens * 128 * neurons + 4 * tokens * 128 * width - 10 * 128 * neurons * width,
        ),
    }
    x, *weights, grad = inputs(2, 2, tokens, width, neurons, torch.float32)
    for run, (forward, backward) in expected.items():
        with _Products() as products:
            out = run(x.requires_grad_(), LayerWeights(*(w.requires_grad_() for w in weights)), rope_table(0, tokens, frequencies(neurons)))
        assert products.flops == 4 * forward, run
        with _Products() as products:
            out.backward(grad)
        assert products.flops == 4 * backward, run


def test_long_texts_are_cut_into_chunks() -> None:
    wide, narrow = torch.float32, torch.bfloat16
    assert plan_blocks(8, 1024, 256, 8192, wide, CPU) == Plan(1, 1024, 1024, 1024)
    assert plan_blocks(8, 1025, 256, 8192, wide, CPU) == Plan(1, 1024, 256, 1024)
    assert plan_blocks(8, 512, 256, 8192, wide, CPU) == Plan(1, 512, 512, 2048)
    assert plan_blocks(8, 512, 256, 8192, narrow, CPU) == Plan(1, 512, 512, 4096)
    assert plan_blocks(8, 128, 96, 384, wide, CPU) == Plan(4, 128, 128, 384)
    assert plan_blocks(64, 512, 256, 8192, wide, torch.device("cuda")) == Plan(64, 512, 512, 8192)
