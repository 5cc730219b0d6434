"""What the network computes is what analyses see."""

import pytest
import torch

from bdh_mlflow.analysis.layers import activations, state_at
from bdh_mlflow.model import layer
from bdh_mlflow.model.fade import Fading
from bdh_mlflow.model.rope import rope_at, rotate
from tests.analysis import made


def test_activations_are_those_that_an_evaluation_counts() -> None:
    model = made.model(layers=3, heads=2, multiplier=4)
    idx = torch.randint(0, 256, (2, 2 * layer.ACTIVITY_STRIDE + 1))
    with model.observed() as facts, torch.no_grad():
        model(idx)
    for depth, found in enumerate(activations(model, idx)):
        counted = (found.x[:, :, :: layer.ACTIVITY_STRIDE] > 0, (found.x * found.y)[:, :, :: layer.ACTIVITY_STRIDE] > 0)
        for name, active in zip(("x", "xy"), counted, strict=True):
            assert abs(float(active.float().mean()) - facts[f"bdh/active_{name}_l{depth}"]) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_a_state_is_what_attention_reads_at_its_token(decay: float) -> None:
    model = made.model(heads=2, multiplier=4)
    model.fade = Fading(2, decay)
    idx = torch.randint(0, 256, (1, 30))
    first = next(iter(activations(model, idx)))
    table = rope_at(torch.arange(30), model.attn.each)
    attended = layer.attend(rotate(first.x, table), first.value.unsqueeze(1), fade=model.fade(30, first.x.device))[0]
    for head in (0, 1):
        for position in (1, 7, 29):
            read = first.x[0, head, position] @ state_at(first, head, model, position)[0]
            assert torch.allclose(read, attended[0, head, position], rtol=1e-3, atol=1e-3 * float(attended.abs().max()))
