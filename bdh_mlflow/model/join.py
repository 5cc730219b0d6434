"""Larger models from trained ones, by their weights alone: several side by side, or one with more copies of its neurons.

What has a neuron's index is concatenated: `encoder`, `encoder_v`, `decoder` and the frequencies. Attention sums over neurons and is normed
afterwards, and so is what `decoder` reads: of both only the direction counts (but for the epsilon of LayerNorm), which is why neurons can
be laid side by side at all.

D n_embd, H n_head, N neurons a head, K copies or models.   Source: arXiv:2509.26507, section 7.1.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bdh_mlflow.model.rope import FREQUENCIES

Weights = Mapping[str, Tensor]
"""A state dict of `BDH`."""

SPREAD = 0.1  # of the factors, around 1, by which copies of a neuron differ in `decoder`


def concatenated(models: Sequence[Weights]) -> dict[str, Tensor]:
    """K models of one shape, their neurons side by side; `embed` and `lm_head` are their means.   Returns a state dict of K N neurons.

    `decoder` is divided by K, so that K times the same model is that model.
    """
    first = models[0]
    heads = first["encoder"].shape[0]
    joined = {name: torch.stack([model[name].float() for model in models]).mean(dim=0) for name in ("embed.weight", "lm_head")}
    for name in ("encoder", "encoder_v"):
        joined[name] = torch.cat([model[name].float() for model in models], dim=2)
    decoders = [model["decoder"].float().view(heads, -1, model["decoder"].shape[1]) for model in models]
    joined["decoder"] = torch.cat(decoders, dim=1).flatten(0, 1) / len(models)
    joined[FREQUENCIES] = torch.cat([model[FREQUENCIES].float() for model in models], dim=-1)
    return joined


def grown(model: Weights, copies: int, seed: int = 0) -> dict[str, Tensor]:
    """K copies of each neuron, and the same function.   Returns a state dict of K N neurons.

    Copies have 1 / sqrt(K) of the activation, so scores keep their size, and what they write adds up to what one neuron wrote. Copies that
    are alike would have the same gradients and stay alike, so each has another share of that: its row of `decoder` is multiplied by 1 plus
    normal noise (SPREAD, drawn from `seed`) that adds up to zero over the copies.
    """
    heads = model["encoder"].shape[0]
    decoder = model["decoder"].float().view(heads, -1, model["decoder"].shape[1])
    noise = torch.randn((copies, *decoder.shape[:2], 1), generator=torch.Generator().manual_seed(seed)) * SPREAD
    shares = 1 + noise - noise.mean(dim=0)
    return {
        "embed.weight": model["embed.weight"].float(),
        "lm_head": model["lm_head"].float(),
        "encoder": model["encoder"].float().repeat(1, 1, copies) / math.sqrt(copies),
        "encoder_v": model["encoder_v"].float().repeat(1, 1, copies),
        "decoder": torch.cat(list(decoder * shares / math.sqrt(copies)), dim=1).flatten(0, 1),
        FREQUENCIES: model[FREQUENCIES].float().repeat(1, 1, 1, copies),
    }


def likeness(one: Weights, other: Weights) -> float:
    """How much two models of one shape point the same way: the smallest cosine of a projection's weights, neuron by neuron in order.

    Near 1 for forks of one model, near 0 for models of other random weights, whose neurons have nothing in common but their numbers.
    """
    names = ("encoder", "encoder_v", "decoder")
    return min(float(torch.cosine_similarity(one[name].flatten().double(), other[name].flatten().double(), dim=0)) for name in names)
