"""Attention that fades: its factors, in every form of the layer, in generation and in long texts."""

import math

import pytest
import torch

from bdh_mlflow.model import layer
from bdh_mlflow.model.bdh import BDH, BDHConfig, Form
from bdh_mlflow.model.blocks import Plan
from bdh_mlflow.model.fade import fade, rates
from tests.model.test_bdh import relative_error


def fading(heads: int = 2, decay: float = 2.0, width: int = 12) -> BDH:
    torch.manual_seed(0)
    shape = BDHConfig(n_layer=2, n_embd=width, n_head=heads, dropout=0.0, mlp_internal_dim_multiplier=8, attention_decay=decay)
    return BDH(shape).double()


def idx(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_rates_are_the_slopes_of_alibi() -> None:
    assert rates(8, 1.0).tolist() == [2.0**-h for h in range(1, 9)]  # arXiv:2108.12409, section 3
    found = fade(2, 3.0, 5)
    assert found.scores[1, 4].tolist() == pytest.approx([*(math.exp(-3 * 2**-8 * d) for d in (4, 3, 2, 1)), 0.0])
    assert found.over(5)[0].item() == pytest.approx(math.exp(-3 * 2**-4 * 5))
    assert torch.equal(found.written(3)[1].flatten(), found.powers[1, [3, 2, 1]])


def test_what_is_read_of_a_token_fades_with_its_distance() -> None:
    q, v = torch.rand(1, 2, 6, 4, dtype=torch.float64), torch.rand(1, 1, 6, 3, dtype=torch.float64)
    attended, _ = layer.attend(q, v, fade=fade(2, 1.0, 6))
    for head, rate in enumerate(rates(2, 1.0).tolist()):
        expected = torch.stack([math.exp(-rate * (5 - s)) * (q[0, head, 5] @ q[0, head, s]) * v[0, 0, s] for s in range(5)]).sum(dim=0)
        assert torch.allclose(attended[0, head, 5], expected, atol=1e-6)


def test_no_decay_is_the_published_network_to_the_bit() -> None:
    model = fading(decay=0.0)
    assert model.fade(9, torch.device("cpu")) is None
    without = fading(decay=1e-12)
    assert relative_error(without(idx(2, 9))[0].detach(), model(idx(2, 9))[0].detach()) < 1e-9


@pytest.mark.parametrize("form", ["reference", "blocked"])
@pytest.mark.parametrize("decay", [1e3, 1e308])
def test_a_strong_decay_overflows_nowhere(decay: float, form: Form) -> None:
    """Factors of tokens that come later are infinite, and what divides by a faded state is, too: neither is computed."""
    model = fading(decay=decay)
    model.use(form)
    model(idx(2, 60), idx(2, 60))[1].backward()
    assert all(bool(weights.grad.isfinite().all()) for weights in model.parameters())


@pytest.mark.parametrize("plan", [None, Plan(2, 60, 60, 4), Plan(1, 60, 60, 2)])
def test_gradients_of_blocks_are_those_of_the_definition(plan: Plan | None) -> None:
    """Of a text that is cut into chunks where attention does not fade, too: T > 4 D."""
    model = fading()

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(idx(2, 60), idx(2, 60))[1], list(model.parameters())))

    expected = gradients()
    model.use("blocked", plan=plan)
    for own, exact in zip(gradients(), expected, strict=True):
        assert relative_error(own, exact) < 1e-9


@pytest.mark.parametrize("plan", [None, Plan(1, 8, 4, 6)])
def test_generation_gives_the_tokens_of_a_full_forward_pass(plan: Plan | None) -> None:
    model = fading()
    expected = model(idx(2, 60)[:, :-1])[0].detach()
    model.use("reference", plan=plan)  # a prompt is read in chunks
    text = model.generate(idx(2, 50), 12, temperature=0)
    for step in range(50, 62):
        assert torch.equal(text[:, step], model(text[:, :step])[0][:, -1].argmax(dim=1))
    with torch.no_grad():
        model.use("blocked", plan=plan)
        assert relative_error(model(idx(2, 60)[:, :-1])[0], expected) < 1e-6
