"""Models whose neurons are known."""

import torch

from bdh_mlflow.model.bdh import BDH, BDHConfig


def model(layers: int = 2, width: int = 8, heads: int = 1, multiplier: int = 1, seed: int = 0, scale: float = 20.0) -> BDH:
    """Random weights, large enough that neurons differ."""
    torch.manual_seed(seed)
    made = BDH(BDHConfig(n_layer=layers, n_embd=width, dropout=0.1, n_head=heads, mlp_internal_dim_multiplier=multiplier)).eval()
    with torch.no_grad():
        for weights in made.parameters():
            weights.mul_(scale)
    return made


def with_graph(graph: torch.Tensor) -> BDH:
    """Two layers, one head: decoder is the identity, so that encoder is the graph of N = D neurons."""
    neurons = len(graph)
    made = model(width=neurons)
    with torch.no_grad():
        made.decoder.copy_(torch.eye(neurons))
        made.encoder.copy_(graph.unsqueeze(0))
    return made
