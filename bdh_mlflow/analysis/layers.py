"""A forward pass that shows what it computes: the activations of every layer, and the state that a layer has read into.

B rows, T tokens, D n_embd, H n_head, N neurons a head, L n_layer. Weights are those that the model computes with (4-bit ones rounded).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_mlflow.model import layer
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.rope import RopeTable, rope_table, rotate


class Activations(NamedTuple):
    """Of one layer.   x: the first activations.   y: the second, before the gate; both (B, H, T, N).   value: (B, T, D), the layer's input.

    The paper's y is the gate's output, x * y.
    """

    x: Tensor
    y: Tensor
    value: Tensor


@torch.no_grad()
def activations(model: BDH, idx: Tensor) -> Iterator[Activations]:
    """Of each layer in turn, without dropout.   idx: (B, T) ids. Holds one layer's tensors at a time."""
    weights = model.layer_weights()
    table = rope_table(0, idx.shape[1], model.attn.each)
    x = model.embedded(idx)
    for _ in range(model.config.n_layer):
        xs = F.relu(x @ weights.encoder)
        ys = F.relu(layer.norm(layer.attend(rotate(xs, table), x, fade=model.fade(idx.shape[1], x.device))[0]) @ weights.encoder_v)
        yield Activations(xs, ys, x.squeeze(1))
        read = (xs * ys).transpose(1, 2).flatten(2).unsqueeze(1) @ weights.decoder
        x = layer.norm(x + layer.norm(read))


def state_at(found: Activations, head: int, model: BDH, position: int) -> Tensor:
    """What a layer remembers in one head before it reads the token at a position, (B, N, D), turned to that position.

    Row n times the activation of neuron n at that token is what attention reads from it: sum over earlier s of
    rotation(position - s) x[s] value[s]^T, each as far as it has faded.
    """
    freqs = model.attn.each
    distances = torch.arange(position, 0, -1, device=freqs.device)  # of the tokens 0 .. position - 1
    angles = torch.remainder(distances.float().unsqueeze(1) * freqs[0::2], 1) * (2 * torch.pi)
    back = RopeTable(torch.cos(angles), -torch.sin(angles))  # by the distance, against the direction in which positions turn
    values, fading = found.value[:, :position], model.fade(position, freqs.device)
    return rotate(found.x[:, head, :position], back).mT @ (values if fading is None else values * fading.written(position)[head])
