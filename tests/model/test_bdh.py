"""The network against the published implementation, in every form; generation; activity counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.model import layer
from bdh_mlflow.model.bdh import BDH, STOPPED, BDHConfig, useful_flops
from bdh_mlflow.model.blocks import Plan
from bdh_mlflow.model.rope import RopeTable
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.training.optim import build_optimizer

PARITY = np.load(Path(__file__).parents[1] / "resources" / "bdh_reference_small.npz")
GREEDY = Sampler(temperature=0)
TOLERANCE = 1e-5  # relative to the largest value: fp32 sums in another order


def published(name: str) -> Tensor:
    return torch.from_numpy(PARITY[name])


@pytest.fixture
def model() -> BDH:
    """The network whose values are in the parity file."""
    n_layer, n_embd, n_head, multiplier, vocab_size = (int(v) for v in PARITY["config"])
    config = BDHConfig(n_layer, n_embd, 0.0, n_head, multiplier, vocab_size)
    network = BDH(config)
    network.load_state_dict({key.removeprefix("weight/"): published(key) for key in PARITY.files if key.startswith("weight/")})
    return network


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=["reference", "recomputed", "blocked", "chunked"])
def formed(request: pytest.FixtureRequest, model: BDH) -> BDH:
    """The same network in each form; `chunked` is blocked with a state passed on every eight tokens."""
    plan = Plan(rows=1, span=16, chunk=8, neurons=46) if request.param == "chunked" else None
    model.use("reference" if request.param in ("reference", "recomputed") else "blocked", plan=plan)
    model.recompute = request.param == "recomputed"
    return model


def test_logits_loss_and_every_gradient_are_the_published_ones(formed: BDH) -> None:
    model = formed
    logits, loss = model(published("idx"), published("targets"))
    loss.backward()
    errors = {"logits": relative_error(logits.detach(), published("logits")), "loss": relative_error(loss.detach(), published("loss"))}
    for key in (k for k in PARITY.files if k.startswith("grad/")):
        errors[key] = relative_error(model.get_parameter(key.removeprefix("grad/")).grad, published(key))
    assert len(errors) == 7
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_twenty_adamw_losses_are_the_published_ones(formed: BDH) -> None:
    model = formed
    optimizer = build_optimizer(model.parameters(), TrainingConfig(learning_rate=1e-3, weight_decay=0.1))
    losses = []
    for _ in range(20):
        _, loss = model(published("idx"), published("targets"))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.abs(np.array(losses) - PARITY["adamw_losses"]).max() < TOLERANCE


@pytest.mark.parametrize("how", [{"top_k": 1}, {"temperature": 0}])
def test_greedy_tokens_are_the_published_ones(model: BDH, how: dict) -> None:
    prompt, expected = published("greedy_prompt"), published("greedy_tokens")
    found = model.generate(prompt, expected.shape[1] - prompt.shape[1], **how)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("prompt_length", [1, 2, 7, 30])
@pytest.mark.parametrize("plan", [None, Plan(rows=1, span=6, chunk=3, neurons=10)], ids=str)
def test_generation_gives_the_tokens_of_a_full_forward_pass(model: BDH, prompt_length: int, plan: Plan | None) -> None:
    model.use("reference", plan=plan)
    idx = published("idx")[:, :prompt_length]
    tokens = model.generate(idx, 12, temperature=0)
    for stop in range(prompt_length, tokens.shape[1]):
        logits, _ = model(tokens[:, :stop])
        assert torch.equal(logits[:, -1].argmax(-1), tokens[:, stop]), stop


def test_generation_needs_a_prompt(model: BDH) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)


def test_seeded_sampling_repeats_and_leaves_the_global_randomness_alone(model: BDH) -> None:
    before = torch.get_rng_state()
    idx = published("greedy_prompt")
    first, second = (model.generate(idx, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_prompts_of_different_lengths_are_continued_as_if_alone(model: BDH) -> None:
    idx = published("idx")
    prompts = [idx[0, :3], idx[1, :11], idx[0, :1]]
    together = torch.cat(list(model.stream(prompts, 9, GREEDY)), dim=1)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt.unsqueeze(0), 9, temperature=0)
        assert torch.equal(alone[0, prompt.shape[0] :], together[row])


def test_a_row_ends_after_its_stop_bytes_and_the_others_continue(model: BDH) -> None:
    prompts = list(published("idx")[:, :9])
    free = torch.cat(list(model.stream(prompts, 12, GREEDY)), dim=1)
    stop = free[0, 3:5].tolist()
    at = next(i for i in range(1, 12) if free[0, i - 1 : i + 1].tolist() == stop)
    found = torch.cat(list(model.stream(prompts, 12, GREEDY, stop=stop)), dim=1)
    assert torch.equal(found[0, : at + 1], free[0, : at + 1])
    assert (found[0, at + 1 :] == STOPPED).all()
    assert torch.equal(found[1], free[1, : found.shape[1]])
    alone = list(model.stream(prompts[:1], 12, GREEDY, stop=stop))
    assert len(alone) == at + 1


def test_long_texts_have_no_cached_rope_table(model: BDH, monkeypatch: pytest.MonkeyPatch) -> None:
    idx = published("idx")
    expected = model.generate(idx, 3, temperature=0)
    assert isinstance(model.rope_by_neuron(idx.shape[1]), RopeTable)
    monkeypatch.setattr("bdh_mlflow.model.bdh.MAX_CACHED_ROPE_ELEMENTS", 1)
    frequencies = model.rope_by_neuron(idx.shape[1])
    assert isinstance(frequencies, torch.Tensor)
    assert torch.equal(frequencies, model.attn.each)
    assert torch.equal(model.generate(idx, 3, temperature=0), expected)


def test_useful_flops_are_those_of_the_published_form_less_the_half_above_the_diagonal() -> None:
    config, tokens = BDHConfig(n_layer=2, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=8), 12
    network, idx = BDH(config), torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        network(idx, idx)
    neurons = 64
    above = 2 * config.n_layer * config.n_head * (tokens * (tokens + 1) // 2) * (neurons + config.n_embd)
    assert useful_flops(config, tokens) * tokens / 3 == counter.get_total_flops() - above


def test_useful_flops_of_a_token_do_not_grow_with_the_length_of_long_texts() -> None:
    config = BDHConfig()
    assert useful_flops(config, 512) < useful_flops(config, 1024) < useful_flops(config, 1025) * 1.5
    assert useful_flops(config, 1025) == useful_flops(config, 100_000)


def test_dropout_changes_training_only_and_recomputation_sees_the_same_mask() -> None:
    config = BDHConfig(n_layer=2, n_embd=16, dropout=0.5, n_head=2, mlp_internal_dim_multiplier=4)
    model, idx = BDH(config), torch.randint(0, 256, (2, 9))
    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        model(idx, idx)[1].backward()
        grads.append(model.encoder.grad.clone())
    assert torch.equal(*grads)
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_published_state_dict_with_its_frequencies_loads(model: BDH) -> None:
    assert set(model.state_dict()) == {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head", "attn.freqs"}
    other = BDH(model.config)
    other.load_state_dict({**model.state_dict(), "attn.freqs": 2 * model.attn.freqs})
    idx = published("idx")
    assert torch.equal(other.attn.table(9).cos, model.attn.table(17).cos[::2]), "twice as fast"
    assert not torch.equal(other(idx)[0], model(idx)[0])
    without = {name: weight for name, weight in model.state_dict().items() if name != "attn.freqs"}
    rounded = {**without, "attn.freqs": model.attn.freqs.bfloat16()}
    for state in (without, rounded):
        other.load_state_dict(state)
        assert torch.equal(other(idx)[0], model(idx)[0]), "those of an untrained model, as before they were saved"


def test_frequencies_stay_as_they_are_in_a_model_of_fewer_bits(model: BDH) -> None:
    before = model.attn.freqs.clone()
    assert torch.equal(model.bfloat16().attn.freqs, before)
    assert torch.equal(model.double().attn.freqs, before)


def test_default_model_has_25_million_parameters() -> None:
    with torch.device("meta"):
        model = BDH(BDHConfig())
    assert sum(p.numel() for p in model.parameters()) == 3 * 4 * 256 * 8192 + 2 * 256 * 256


@pytest.mark.parametrize("compiled_shape", [(2, 33), (1, 16)], ids=str)
def test_activity_is_the_share_of_neurons_that_are_not_zero(compiled_shape: tuple[int, int]) -> None:
    """Against counting in the activations themselves, at every token that is counted."""
    torch.manual_seed(0)
    network = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.0)).eval()
    with torch.no_grad():
        network.encoder[0, :, 3] = 0  # this neuron is dead in every layer
    observed: list[tuple[torch.Tensor, torch.Tensor]] = []
    neurons: list[torch.Tensor] = []

    def observing(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x @ weight
        if name != "decoder":
            neurons.append(torch.relu(out)[:, :, :: layer.ACTIVITY_STRIDE])
        if name == "encoder_v":
            xs, ys = neurons[-2:]
            observed.append((xs, xs * ys))
        return out

    network.product = observing
    idx = torch.randint(0, 256, compiled_shape)
    with torch.no_grad():
        plain, _ = network(idx)
        observed.clear()
        with network.observed() as facts:
            logits, _ = network(idx)
    assert torch.equal(plain, logits)
    assert set(facts) == {f"bdh/{what}_{name}_l{i}" for what in ("active", "dead") for name in ("x", "xy") for i in (0, 1)}
    for depth, both in enumerate(observed):
        for name, values in zip(("x", "xy"), both, strict=True):
            assert facts[f"bdh/active_{name}_l{depth}"] == pytest.approx((values > 0).float().mean().item())
            dead = ~(values > 0).any(dim=2).any(dim=0)
            assert dead[0, 3]
            assert facts[f"bdh/dead_{name}_l{depth}"] == pytest.approx(dead.float().mean().item())


def test_nothing_is_counted_outside_an_observation() -> None:
    network = BDH(BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4))
    with network.observed() as facts:
        pass
    network(torch.zeros(1, 4, dtype=torch.long))
    assert facts == {}
