"""The network against the published implementation, and its forms against each other."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.model import (
    blocked,
    layer,
)
from bdh_mlflow.model.bdh import BDH, STOPPED, BDHConfig, useful_flops
from bdh_mlflow.training.optim import build_optimizer

PARITY = np.load(Path(__file__).parents[1] / "resources" / "bdh_reference_small.npz")
TOLERANCE = 1e-5  # relative to the largest value: fp32 sums in another order


def published(name: str) -> Tensor:
    return torch.from_numpy(PARITY[name])


@pytest.fixture
def model() -> BDH:
    """The network whose values are in the parity file."""
    n_layer, n_embd, n_head, multiplier, vocab_size = (int(v) for v in PARITY["config"])
    config = BDHConfig(n_layer, n_embd, 0.0, n_head, multiplier, vocab_size)
    network = BDH(config)
    network.load_published({key.removeprefix("weight/"): published(key) for key in PARITY.files if key.startswith("weight/")})
    return network


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=["reference", "recomputed", "blocked", "chunked"])
def formed(request: pytest.FixtureRequest, model: BDH, monkeypatch: pytest.MonkeyPatch) -> BDH:
    """The same network in each form; `chunked` is blocked with a state handed on every eight tokens."""
    model.use("reference" if request.param in ("reference", "recomputed") else "blocked")
    model.recompute = request.param == "recomputed"
    if request.param == "chunked":
        monkeypatch.setattr(blocked, "plan", lambda *args: blocked.Plan(rows=1, span=16, chunk=8, neurons=46))
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
@pytest.mark.parametrize("cut", [None, blocked.Plan(rows=1, span=6, chunk=3, neurons=10)], ids=str)
def test_generation_gives_the_tokens_of_the_whole_forward_pass(
    model: BDH, prompt_length: int, cut: blocked.Plan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cut is not None:
        monkeypatch.setattr(blocked, "plan", lambda *args: cut)
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


def test_top_k_never_takes_another_token(model: BDH) -> None:
    logits, _ = model(published("greedy_prompt"))
    allowed = set(logits[0, -1].topk(3).indices.tolist())
    drawn = {int(model.generate(published("greedy_prompt"), 1, temperature=5.0, top_k=3)[0, -1]) for _ in range(50)}
    assert drawn <= allowed
    assert len(drawn) > 1


def test_prompts_of_different_lengths_are_continued_as_if_alone(model: BDH) -> None:
    whole = published("idx")
    prompts = [whole[0, :3], whole[1, :11], whole[0, :1]]
    together = torch.cat(list(model.stream(prompts, 9, temperature=0)), dim=1)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt.unsqueeze(0), 9, temperature=0)
        assert torch.equal(alone[0, prompt.shape[0] :], together[row])


def test_a_row_ends_after_its_stop_bytes_and_the_others_go_on(model: BDH) -> None:
    prompts = list(published("idx")[:, :9])
    free = torch.cat(list(model.stream(prompts, 12, temperature=0)), dim=1)
    stop = free[0, 3:5].tolist()
    at = next(i for i in range(1, 12) if free[0, i - 1 : i + 1].tolist() == stop)
    found = torch.cat(list(model.stream(prompts, 12, temperature=0, stop=stop)), dim=1)
    assert torch.equal(found[0, : at + 1], free[0, : at + 1])
    assert (found[0, at + 1 :] == STOPPED).all()
    assert torch.equal(found[1], free[1, : found.shape[1]])
    alone = list(model.stream(prompts[:1], 12, temperature=0, stop=stop))
    assert len(alone) == at + 1


def test_top_p_keeps_the_likeliest_that_reach_it(model: BDH) -> None:
    with torch.no_grad():
        logits, _ = model(published("greedy_prompt"))
    likelihood = (logits[0, -1] / 3).softmax(-1).sort(descending=True)
    for top_p, kept in ((1e-6, 1), (float(likelihood.values[:3].sum()) - 1e-5, 3)):
        allowed = set(likelihood.indices[:kept].tolist())
        drawn = {int(token) for _ in range(40) for token in model.stream(published("greedy_prompt"), 1, 3.0, top_p=top_p)}
        assert drawn <= allowed
        assert len(drawn) > (kept > 1)


def test_extreme_sampling_still_takes_the_likeliest(model: BDH) -> None:
    with torch.no_grad():
        likeliest = model(published("greedy_prompt"))[0][0, -1].argmax()
    for how in ({"temperature": 1e-40}, {"temperature": 1.0, "top_p": 0.0}):
        (token,) = model.stream(published("greedy_prompt"), 1, **how)
        assert token[0, 0] == likeliest


def test_long_texts_have_no_table_of_all_their_turns(model: BDH, monkeypatch: pytest.MonkeyPatch) -> None:
    idx = published("idx")
    expected = model.generate(idx, 3, temperature=0)
    monkeypatch.setattr("bdh_mlflow.model.bdh.KEPT_TURNS", 1)
    model._tables.clear()
    assert torch.equal(model.generate(idx, 3, temperature=0), expected)
    assert not model._tables


def test_inactive_neurons_are_neither_read_nor_written() -> None:
    torch.manual_seed(0)
    weights = layer.LayerWeights(torch.randn(2, 4, 6), torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    weights.encoder[1] = 0  # no neuron of this head is ever active
    state = torch.randn(1, 2, 6, 4)
    state[:, 1] = torch.nan
    weights.encoder_v[1] = weights.decoder[1] = torch.nan
    table = layer.rope_at(torch.tensor([3]), 6)
    before = state[0, 0].clone()
    out = layer.recurrent_layer(layer.norm(torch.randn(1, 4)), weights, table, state)
    assert out.isfinite().all()
    assert not torch.equal(state[0, 0], before)
    assert state[0, 1].isnan().all()


def test_useful_flops_are_those_of_the_published_form_less_the_half_above_the_diagonal() -> None:
    config, tokens = BDHConfig(n_layer=2, n_embd=16, dropout=0.0, n_head=2, mlp_internal_dim_multiplier=8), 12
    network, idx = BDH(config), torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        network(idx, idx)
    neurons = 64
    above = 2 * config.n_layer * config.n_head * (tokens * (tokens + 1) // 2) * (neurons + config.n_embd)
    assert useful_flops(config, tokens) * tokens / 3 == counter.get_total_flops() - above


def test_useful_flops_of_a_token_do_not_grow_beyond_where_a_state_is_cheaper() -> None:
    config = BDHConfig()
    assert useful_flops(config, 512) < useful_flops(config, 1024) < useful_flops(config, 1025) * 1.5
    assert useful_flops(config, 1025) == useful_flops(config, 100_000)


def test_first_token_attends_to_nothing() -> None:
    q, v = torch.rand(2, 3, 5, 4), torch.rand(2, 1, 5, 6)
    assert torch.equal(layer.attend(q, v)[:, :, 0], torch.zeros(2, 3, 6))


def test_attention_is_the_sum_over_earlier_tokens() -> None:
    q, v = torch.rand(1, 1, 4, 3), torch.rand(1, 1, 4, 2)
    expected = sum((q[0, 0, 3] @ q[0, 0, s]) * v[0, 0, s] for s in range(3))
    assert torch.allclose(layer.attend(q, v)[0, 0, 3], expected)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    x = torch.rand(16)
    table = layer.rope_table(0, 50, 16, torch.device("cpu"))
    turned = layer.rotate(x.expand(50, 16), table)
    assert torch.allclose(turned.norm(dim=-1), x.norm().expand(50), atol=1e-5)
    assert torch.allclose(turned[3] @ turned[10], turned[30] @ turned[37], atol=1e-4)


def test_a_table_from_the_middle_is_the_middle_of_a_table() -> None:
    whole, part = (layer.rope_table(start, 40, 8, torch.device("cpu")) for start in (0, 25))
    assert torch.equal(whole.cos[25:], part.cos)
    assert torch.equal(whole.sin[25:], part.sin)


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
    state = {**model.state_dict(), "attn.freqs": torch.zeros(1)}
    BDH(model.config).load_published(state)
    assert set(model.state_dict()) == {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head"}


def test_default_model_has_25_million_parameters() -> None:
    with torch.device("meta"):
        model = BDH(BDHConfig())
    assert sum(p.numel() for p in model.parameters()) == 3 * 4 * 256 * 8192 + 2 * 256 * 256


@pytest.mark.parametrize("compiled_shape", [(2, 33), (1, 16)], ids=str)
def test_activity_is_the_share_of_neurons_that_are_not_zero(compiled_shape: tuple[int, int]) -> None:
    """Against counting in the neurons themselves, at every token that is looked at."""
    torch.manual_seed(0)
    network = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.0)).eval()
    with torch.no_grad():
        network.encoder[0, :, 3] = 0  # this neuron is dead in every layer
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    neurons: list[torch.Tensor] = []

    def watched(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x @ weight
        if name != "decoder":
            neurons.append(torch.relu(out)[:, :, :: layer.ACTIVITY_STRIDE])
        if name == "encoder_v":
            xs, ys = neurons[-2:]
            seen.append((xs, xs * ys))
        return out

    network.product = watched
    idx = torch.randint(0, 256, compiled_shape)
    with torch.no_grad():
        plain, _ = network(idx)
        seen.clear()
        with network.observed() as facts:
            logits, _ = network(idx)
    assert torch.equal(plain, logits)
    assert set(facts) == {f"bdh/{what}_{name}_l{i}" for what in ("active", "dead") for name in ("x", "xy") for i in (0, 1)}
    for depth, both in enumerate(seen):
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


FIRST_CALLS = """
import json, math
from torch.profiler import ProfilerActivity, profile

def train():
    import torch
    from bdh_mlflow import host
    from bdh_mlflow.config import TrainingConfig
    from bdh_mlflow.model import BDH, BDHConfig
    from bdh_mlflow.training.optim import build_optimizer
    host.compiler = lambda: None  # eager: what is compiled calls no MKL
    for form, bits in (("blocked", 32), ("reference", 8), ("reference", 4)):
        model = BDH(BDHConfig(1, 128, 0.1, 2, 8, 256))
        model.use(form)
        optimizer = build_optimizer(model.parameters(), TrainingConfig(), bits)
        ids = torch.randint(0, 256, (2, 65))
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()

with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
    train()
calls = {}
for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
    if event.name.startswith("aten::"):
        sizes = [math.prod(shape) for shape in event.input_shapes or [] if shape is not None]
        calls.setdefault(event.name.removeprefix("aten::").rstrip("_"), []).append(max(sizes, default=0))
print(json.dumps({name: [sizes[0], max(sizes)] for name, sizes in calls.items()}))
"""
MKL_FUNCTIONS = {"acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"}
MKL_FUNCTIONS |= {"cosh", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"}
ONE_THREAD = 2048  # elements that torch gives to one thread


@pytest.mark.slow  # MKL picks its low-precision kernel in a first call by two threads: 5 of 91 starts had it; a fresh process
def test_no_function_of_mkl_is_called_by_two_threads_at_once_the_first_time() -> None:
    """Or one of them may get a kernel of low precision, and a run other numbers than the next."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True)
    calls = {name: sizes for name, sizes in json.loads(done.stdout.splitlines()[-1]).items() if name in MKL_FUNCTIONS}
    assert {"cos", "sin", "sqrt"} <= {name for name, (_, most) in calls.items() if most > ONE_THREAD}
    assert {name: first for name, (first, _) in calls.items() if first > ONE_THREAD} == {}
