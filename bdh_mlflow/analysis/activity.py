"""How many neurons are active: per layer, before and after the gate, and how many never are.

The paper has about 5 % of x and of y active (arXiv:2509.26507, section 4.1); its y is the gate's output, x * y here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bdh_mlflow.analysis.layers import activations
from bdh_mlflow.analysis.results import Finding, Table, figure, svg
from bdh_mlflow.model.bdh import BDH

PAPER = 0.05  # share of active neurons, arXiv:2509.26507, section 4.1
KINDS = ("x", "y", "xy")
LABELS = {"x": "x", "y": "y before the gate", "xy": "x * y"}
BINS = 40  # of the histogram of neurons by how often they are active


@torch.no_grad()
def analyze(model: BDH, windows: Sequence[Tensor], made_of: Mapping[str, Any]) -> Finding:
    """Count active neurons of every layer.   windows: (B, T) ids each, of text that was not trained on.   made_of: its origin."""
    heads, neurons, layers = model.config.n_head, model.neurons, model.config.n_layer
    counts = torch.zeros(layers, len(KINDS), heads, neurons, dtype=torch.float64)
    tokens = 0
    for window in windows:
        for row in window:
            tokens += row.numel()
            for depth, found in enumerate(activations(model, row[None].long())):
                for kind, active in enumerate((found.x > 0, found.y > 0, (found.x > 0) & (found.y > 0))):
                    counts[depth, kind] += active.sum(dim=(0, 2)).cpu()
    shares = counts / max(tokens, 1)
    mean, dead = shares.mean(dim=(2, 3)), (counts == 0).double().mean(dim=(2, 3))
    metrics = {f"analysis/active_{kind}_l{depth}": float(mean[depth, k]) for depth in range(layers) for k, kind in enumerate(KINDS)}
    metrics |= {f"analysis/dead_{kind}_l{depth}": float(dead[depth, k]) for depth in range(layers) for k, kind in enumerate(KINDS)}
    known = {**made_of, "tokens": tokens, "neurons": heads * neurons}
    header = ["layer", *(f"{LABELS[kind]} active" for kind in KINDS), *(f"{LABELS[kind]} never" for kind in KINDS)]
    rows = [[str(d), *(f"{100 * float(v):.2f} %" for v in (*mean[d], *dead[d]))] for d in range(layers)]
    over = [100 * float(mean[:, k].mean()) for k in range(len(KINDS))]
    says = (
        f"of {heads * neurons:,} neurons a token activates {over[0]:.1f} % (x), {over[1]:.1f} % (y) and {over[2]:.1f} % (x * y) on average "
        f"over {layers} layers; the paper's model: about {100 * PAPER:.0f} %"
    )
    drawn = _figure(mean, dead, shares, known)
    return Finding(
        "activity", says, [Table("share of neurons", header, rows)], metrics, known, drawn, {"active": mean.tolist(), "dead": dead.tolist()}
    )


def _figure(mean: Tensor, dead: Tensor, shares: Tensor, made_of: Mapping[str, Any]) -> str:
    made = figure(12, 4, "Active neurons", made_of)
    bars, never, often = made.subplots(1, 3)
    layers, width = range(len(mean)), 0.8 / len(KINDS)
    for k, kind in enumerate(KINDS):
        places = [depth + (k - 1) * width for depth in layers]
        bars.bar(places, 100 * mean[:, k].numpy(), width, label=LABELS[kind])
        never.bar(places, 100 * dead[:, k].numpy(), width, label=LABELS[kind])
        heights, edges = torch.histogram(100 * shares[:, k].flatten(), bins=BINS, range=(0.0, 100.0))
        often.step(edges[1:].numpy(), heights.numpy(), where="pre", label=LABELS[kind])
    bars.axhline(100 * PAPER, color="0.3", linestyle="--", linewidth=1, label="the paper's 5 %")
    top = 140 * max(float(mean.max()), PAPER)  # room for the legend
    bars.set(xlabel="layer", ylabel="% of neurons active at a token", xticks=list(layers), ylim=(0, top))
    never.set(xlabel="layer", ylabel="% of neurons never active", xticks=list(layers))
    often.set(xlabel="% of tokens at which a neuron is active", ylabel="neurons, all layers", yscale="symlog")
    bars.legend(fontsize="small")
    return svg(made)
