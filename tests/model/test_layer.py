"""The layer's parts against their definition: attention, rotation, the recurrent form; and the start-up order of MKL functions."""

import json
import subprocess
import sys

import pytest
import torch

from bdh_mlflow.model import layer, rope


def test_first_token_attends_to_nothing() -> None:
    q, v = torch.rand(2, 3, 5, 4), torch.rand(2, 1, 5, 6)
    assert torch.equal(layer.attend(q, v)[0][:, :, 0], torch.zeros(2, 3, 6))


def test_attention_is_the_sum_over_earlier_tokens() -> None:
    q, v = torch.rand(1, 1, 4, 3), torch.rand(1, 1, 4, 2)
    expected = sum((q[0, 0, 3] @ q[0, 0, s]) * v[0, 0, s] for s in range(3))
    assert isinstance(expected, torch.Tensor)
    assert torch.allclose(layer.attend(q, v)[0][0, 0, 3], expected)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    x = torch.rand(16)
    table = rope.rope_table(0, 50, rope.frequencies(16))
    turned = rope.rotate(x.expand(50, 16), table)
    assert torch.allclose(turned.norm(dim=-1), x.norm().expand(50), atol=1e-5)
    assert torch.allclose(turned[3] @ turned[10], turned[30] @ turned[37], atol=1e-4)


def test_a_table_from_the_middle_is_the_middle_of_a_table() -> None:
    whole, part = (rope.rope_table(start, 40, rope.frequencies(8)) for start in (0, 25))
    assert torch.equal(whole.cos[25:], part.cos)
    assert torch.equal(whole.sin[25:], part.sin)


def test_inactive_neurons_are_neither_read_nor_written() -> None:
    torch.manual_seed(0)
    weights = layer.LayerWeights(torch.randn(2, 4, 6), torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    weights.encoder[1] = 0  # no neuron of this head is ever active
    state = torch.randn(1, 2, 6, 4)
    state[:, 1] = torch.nan
    weights.encoder_v[1] = weights.decoder[1] = torch.nan
    table = rope.rope_at(torch.tensor([3]), rope.frequencies(6))
    before = state[0, 0].clone()
    out = layer.recurrent_layer(layer.norm(torch.randn(1, 4)), weights, table, state)
    assert out.isfinite().all()
    assert not torch.equal(state[0, 0], before)
    assert state[0, 1].isnan().all()


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


@pytest.mark.slow  # a fresh process
def test_no_function_of_mkl_is_called_by_two_threads_at_once_the_first_time() -> None:
    """Or one of them may get a kernel of low precision, and runs differ: 5 of 91 starts did."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True)
    calls = {name: sizes for name, sizes in json.loads(done.stdout.splitlines()[-1]).items() if name in MKL_FUNCTIONS}
    assert {"cos", "sin", "sqrt"} <= {name for name, (_, most) in calls.items() if most > ONE_THREAD}
    assert {name: first for name, (first, _) in calls.items() if first > ONE_THREAD} == {}
