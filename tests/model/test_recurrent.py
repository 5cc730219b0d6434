"""Reading on: windows with a carried state are the windows of one long text."""

import pytest
import torch
from torch import Tensor

from bdh_mlflow.model.bdh import BDH, BDHConfig
from bdh_mlflow.model.blocks import Plan
from bdh_mlflow.model.layer import norm
from bdh_mlflow.model.recurrent import RecurrentState
from bdh_mlflow.model.rope import frequencies, rope_at, rotate, seen_from
from bdh_mlflow.model.sampling import Sampler
from tests.model.test_bdh import relative_error

LONG = Plan(2, 8, 4, 6)  # windows of 12 are one span and a half, in chunks of 4
WINDOW, WINDOWS = 12, 5
ANGLES = 1e-5  # tables of rotations have the precision of fp32


def made(decay: float = 0.0) -> BDH:
    torch.manual_seed(0)
    shape = BDHConfig(n_layer=3, n_embd=12, n_head=2, dropout=0.0, mlp_internal_dim_multiplier=6, attention_decay=decay)
    return BDH(shape).double()


@pytest.fixture(params=["reference", "blocked", "chunks", "recomputed", "detached", "fading", "fading blocked"])
def carrying(request: pytest.FixtureRequest) -> BDH:
    model = made(1.5 if "fading" in request.param else 0.0)
    if request.param in ("blocked", "chunks", "fading blocked"):
        model.use("blocked", plan=LONG if request.param == "chunks" else None)
    model.recompute, model.detach_state = request.param == "recomputed", request.param == "detached"
    return model


def text() -> Tensor:
    return torch.randint(0, 256, (3, WINDOW * WINDOWS + 1), generator=torch.Generator().manual_seed(1))


def windows() -> list[Tensor]:
    return [text()[:, at : at + WINDOW + 1] for at in range(0, WINDOW * WINDOWS, WINDOW)]


@torch.no_grad()
def test_windows_give_the_logits_of_one_long_text_and_leave_its_state(carrying: BDH) -> None:
    whole = carrying.initial_state(3)
    expected, _ = carrying(text()[:, :-1], None, whole)
    state = carrying.initial_state(3)
    found = torch.cat([carrying(window[:, :-1], None, state)[0] for window in windows()], dim=1)
    assert relative_error(found, expected) < ANGLES
    assert relative_error(expected, carrying(text()[:, :-1])[0]) < ANGLES
    for own, long in zip(state.layers, whole.layers, strict=True):
        assert relative_error(own, long) < ANGLES


@torch.no_grad()
def test_windows_of_any_lengths_are_the_text(carrying: BDH) -> None:
    """Also of one token, and across chunks (flash-linear-attention#1140 had others)."""
    state, parts, at = carrying.initial_state(3), [], 0
    for length in (1, 1, 7, 2, 19, 30):
        parts.append(carrying(text()[:, at : at + length], None, state)[0])
        at += length
    assert relative_error(torch.cat(parts, dim=1), carrying(text()[:, :-1])[0]) < ANGLES


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_state_of_other_rows_is_refused(carrying: BDH, rows: int) -> None:
    """One row would be broadcast, and of more the first ones read."""
    with pytest.raises(ValueError, match=f"a state of {rows} rows for a text of 3"):
        carrying(text(), None, carrying.initial_state(rows))
    with pytest.raises(ValueError, match=f"a state of {rows} rows for a text of 3"):
        next(carrying.stream(text(), 1, Sampler(0.0, None, None), state=carrying.initial_state(rows)))


def gradients(model: BDH, losses: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters())))


@pytest.mark.parametrize("carrying", ["reference", "recomputed", "detached", "fading"], indirect=True)  # in blocks the state is a constant
def test_untruncated_gradients_are_those_of_one_long_text(carrying: BDH) -> None:
    state, losses = carrying.initial_state(3), []
    for window in windows():
        losses.append(carrying(window[:, :-1], window[:, 1:], state)[1])
    long = carrying(text()[:, :-1], text()[:, 1:])[1]
    for own, expected in zip(gradients(carrying, losses), gradients(carrying, [WINDOWS * long]), strict=True):
        assert relative_error(own, expected) < ANGLES


def truncated(model: BDH) -> list[Tensor]:
    state, found = model.initial_state(3), []
    for window in windows():
        _, loss = model(window[:, :-1], window[:, 1:], state)
        found.extend(gradients(model, [loss]))
        state = state.detached()
    return found


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("plan", "decay"), [(None, 0.0), (LONG, 0.0), (Plan(1, 4, 4, 2), 0.0), (None, 1.5), (Plan(2, 12, 12, 2), 1.5)])
def test_truncated_gradients_of_blocks_are_those_of_the_definition(plan: Plan | None, decay: float, detach: bool) -> None:
    model = made(decay)
    model.detach_state = detach
    expected = truncated(model)
    model.use("blocked", plan=plan)
    for own, exact in zip(truncated(model), expected, strict=True):
        assert relative_error(own, exact) < 1e-9


def test_a_state_from_before_stays_what_it_was(carrying: BDH) -> None:
    """A training that fails in the middle of an update goes back to it."""
    state = carrying.initial_state(3)
    carrying(windows()[0][:, :-1], None, state)
    before = RecurrentState(state.layers)
    copies = [layer.clone() for layer in before.layers]
    carrying(windows()[1][:, :-1], None, state)
    assert all(torch.equal(kept, copy) for kept, copy in zip(before.layers, copies, strict=True))
    assert not any(torch.equal(kept, now) for kept, now in zip(before.layers, state.layers, strict=True))


def test_a_state_seen_from_later_gives_the_scores_of_the_distance() -> None:
    freqs = frequencies(8)
    key, query, value = (norm(torch.randn(1, size, generator=torch.Generator().manual_seed(size))) for size in (8, 8, 3))
    state = rotate(key, rope_at(torch.tensor([5]), freqs)).T @ value
    far = rotate(query, rope_at(torch.tensor([27]), freqs)) @ state
    near = rotate(query, rope_at(torch.tensor([7]), freqs)) @ seen_from(state[None, None], 20, freqs)[0, 0]
    assert torch.allclose(far, near, atol=1e-5)
