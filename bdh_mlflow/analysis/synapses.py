"""What a layer remembers while it reads: its strongest synapses over a text.

A synapse of head h leads from neuron i, active in x, to neuron j, active in y: state[i] encoder_v[:, j], what the activity of i at the next
token would add to the input of j. The state is turned to that token (`layers.state_at`). Nothing is remembered before the first token, and
what attention reads is normed, so sizes compare within one moment only. Source: sigma of arXiv:2509.26507, section 6.2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_mlflow.analysis.graph import largest
from bdh_mlflow.analysis.layers import activations, state_at
from bdh_mlflow.analysis.results import Finding, Table, figure, svg
from bdh_mlflow.errors import InputError
from bdh_mlflow.model.bdh import BDH

MOMENTS = 48  # at which synapses are looked at
SHOWN = 24  # synapses
LONGEST = 1024  # tokens
CONTEXT = 12  # tokens before the one at which a synapse grew most


@torch.no_grad()
def analyze(model: BDH, ids: list[int], layer: int, head: int, decode: Callable[[list[int]], str], made_of: Mapping[str, Any]) -> Finding:
    """The strongest synapses after a text, and how they came to be.   ids: of the text.   decode: ids to text.

    Raises InputError for a text that is too short, and a layer or head that there is not.
    """
    check_place(model, layer, head)
    ids = ids[:LONGEST]
    if len(ids) < 2 * CONTEXT:
        raise InputError(f"a text of {len(ids)} token{'s' * (len(ids) != 1)} is too short to remember anything; give {2 * CONTEXT} or more")
    found = activations_at(model, torch.tensor(ids), layer)
    reading = model.layer_weights().encoder_v[head].float()
    moments = np.unique(np.linspace(1, len(ids), min(MOMENTS, len(ids))).astype(int))
    strongest = largest(state_at(found, head, model, len(ids))[0].float().cpu(), reading.cpu(), SHOWN)
    known = {**made_of, "layer": layer, "head": head, "tokens": len(ids)}
    name = f"synapses_l{layer}h{head}"
    if not len(strongest.weights):
        says = f"no synapse of layer {layer}, head {head} is above zero after {len(ids):,} tokens"
        return Finding(name, says, [], {f"analysis/synapse_strength_l{layer}h{head}": 0.0}, known)
    sources, targets = torch.from_numpy(strongest.sources), torch.from_numpy(strongest.targets)
    values = np.array([_values(state_at(found, head, model, int(moment))[0], reading, sources, targets) for moment in moments]).T
    rows = []
    for number, (source, target) in enumerate(zip(strongest.sources, strongest.targets, strict=True)):
        grew = int(moments[int(np.argmax(np.diff(values[number], prepend=0.0)))])
        context = decode(ids[max(0, grew - CONTEXT) : grew])
        rows.append([f"{source} -> {target}", f"{values[number, -1]:.3f}", str(grew), repr(context)])
    share = float(strongest.weights.sum()) / max(strongest.spread, 1e-12) / max(len(strongest.weights), 1)
    says = (
        f"the {len(strongest.weights)} strongest of {model.neurons**2:,} synapses of layer {layer}, head {head} are {share:.0f} standard "
        f"deviations above zero after {len(ids):,} tokens"
    )
    table = Table("strongest synapses", ["neuron x -> y", "after the text", "grew most by token", "which ends"], rows)
    metrics = {f"analysis/synapse_strength_l{layer}h{head}": share}
    data = {"moments": moments.tolist(), "values": values.tolist(), "synapses": [row[0] for row in rows]}
    return Finding(name, says, [table], metrics, known, _figure(values, moments, rows, known), data)


def activations_at(model: BDH, ids: Tensor, layer: int) -> Any:
    """The activations of one layer over one text.   ids: (T,)."""
    for depth, found in enumerate(activations(model, ids[None].to(model.embed.weight.device))):
        if depth == layer:
            return found
    raise AssertionError("checked before")


def check_place(model: BDH, layer: int, head: int) -> None:
    """Raises InputError for a layer or head that a model does not have."""
    for name, value, count in (("layer", layer, model.config.n_layer), ("head", head, model.config.n_head)):
        if not 0 <= value < count:
            raise InputError(f"--{name} {value}: this model has {name}s 0 to {count - 1}")


def _values(state: Tensor, reading: Tensor, sources: Tensor, targets: Tensor) -> list[float]:
    """Of chosen synapses.   state: (N, D).   reading: encoder_v of the head, (D, N)."""
    device = state.device
    values: list[float] = (state.float()[sources.to(device)] * reading[:, targets.to(reading.device)].mT).sum(dim=1).tolist()
    return values


def _figure(values: Any, moments: Any, rows: list[list[str]], made_of: Mapping[str, Any]) -> str:
    made = figure(11, 5.5, "Strongest synapses while a text is read", made_of)
    axes = made.subplots()
    top = float(np.percentile(np.abs(values), 99)) or 1.0
    drawn = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, extent=(0, float(moments[-1]), len(rows) - 0.5, -0.5))
    axes.set(xlabel="tokens read", ylabel="neuron x -> neuron y", yticks=range(len(rows)))
    axes.set_yticklabels([row[0] for row in rows], fontsize="x-small")
    made.colorbar(drawn, ax=axes, label="strength; colours end at the 99th percentile")
    return svg(made)
