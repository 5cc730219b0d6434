"""The graph of neurons of each head, and whether it has communities.

G = decoder[h] encoder[h] (N, N): entry (i, j) is how much neuron i, when it writes to the residual stream, excites neuron j of the same
head in the next layer (D_x E of arXiv:2509.26507, section 5.5). An edge is an entry at or above a threshold. Thresholds are given by how
many edges they leave, which compares heads, steps and models. Two random graphs with as many edges say what is no structure: edges
anywhere, and the largest entries of a product of two random matrices of the same sizes.

N neurons a head, D n_embd, E edges.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_mlflow.analysis.powerlaw import Fit, fit
from bdh_mlflow.analysis.results import Finding, Table, figure, svg
from bdh_mlflow.model.bdh import BDH

EDGES_PER_NEURON = (0.5, 1.0, 2.0, 4.0)
"""Thresholds, as edges a neuron. The paper's clearest is 46,820 of 8,192 neurons; Louvain of networkx takes seconds for as many."""
MAX_EDGES = 2**15
ROWS = 1024  # of G that are computed at once


class Edges(NamedTuple):
    """The largest entries of a matrix.   sources, targets: (E,).   weights: (E,), falling.   spread: standard deviation of all entries."""

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64]
    spread: float


class Measured(NamedTuple):
    """A head's graph at one threshold.

    isolated: share of the neurons without an edge.   modularity: Louvain's, of the neurons that have edges; isolated ones do not change it.
    anywhere, product: the same of the two random graphs.   communities: how many Louvain finds.
    """

    edges: int
    threshold: float
    isolated: float
    modularity: float
    anywhere: float
    product: float
    communities: int


def largest(left: Tensor, right: Tensor, count: int) -> Edges:
    """The `count` largest positive entries of left @ right, without its diagonal.   left: (N, D).   right: (D, N). Block by block."""
    values, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    total, squares = 0.0, 0.0
    neurons = right.shape[1]
    for start in range(0, len(left), ROWS):
        block = left[start : start + ROWS] @ right
        total, squares = total + float(block.double().sum()), squares + float(block.double().square().sum())
        rows = torch.arange(len(block))
        block[rows, rows + start] = 0
        flat = block.flatten()
        best = flat.topk(min(count, flat.numel()))
        values = torch.cat([values, best.values])
        places = torch.cat([places, best.indices + start * neurons])
        kept = values.topk(min(count, len(values)))
        values, places = kept.values, places[kept.indices]
    places, values = places[values > 0], values[values > 0]
    size = len(left) * neurons
    spread = float(np.sqrt(max(squares / size - (total / size) ** 2, 0.0)))
    return Edges((places // neurons).numpy(), (places % neurons).numpy(), values.double().numpy(), spread)


def modularity(sources: NDArray[np.int64], targets: NDArray[np.int64], seed: int) -> tuple[float, int]:
    """Louvain's modularity of a graph, directions left out, and its number of communities.   Returns 0, 0 for no edges."""
    graph = nx.Graph()
    graph.add_edges_from(zip(sources.tolist(), targets.tolist(), strict=True))
    if not graph.number_of_edges():
        return 0.0, 0
    communities = nx.community.louvain_communities(graph, seed=seed)
    return float(nx.community.modularity(graph, communities)), len(communities)


@torch.no_grad()
def analyze(model: BDH, seed: int, made_of: Mapping[str, Any]) -> Finding:
    """The graphs of all heads."""
    weights, neurons, heads = model.layer_weights(), model.neurons, model.config.n_head
    counts = sorted({min(int(each * neurons), MAX_EDGES) for each in EDGES_PER_NEURON})
    draw = torch.Generator().manual_seed(seed)
    width = model.config.n_embd
    noise = largest(torch.randn(neurons, width, generator=draw), torch.randn(width, neurons, generator=draw), counts[-1])
    anywhere = _anywhere(neurons, counts[-1], seed)

    @functools.cache
    def nulls(count: int) -> tuple[float, float]:
        first, second = (modularity(e.sources[:count], e.targets[:count], seed)[0] for e in (anywhere, noise))
        return first, second

    decoder = weights.decoder.view(heads, neurons, -1).float().cpu()
    encoder = weights.encoder.float().cpu()
    found: list[list[Measured]] = []
    graphs: list[Edges] = []
    for head in range(heads):
        edges = largest(decoder[head], encoder[head], counts[-1])
        graphs.append(edges)
        there = sorted({min(count, len(edges.weights)) for count in counts} - {0})
        found.append([_measured(edges, count, nulls(count), neurons, seed) for count in there])
    fits = [{way: fit(_degrees(ends, neurons)) for way, ends in (("out", g.sources), ("in", g.targets))} for g in graphs]
    known = {**made_of, "neurons a head": neurons, "seed": seed, "communities by": "Louvain, once, of connected neurons"}
    metrics = {f"analysis/modularity_h{h}": rows[-1].modularity for h, rows in enumerate(found) if rows}
    metrics |= {f"analysis/isolated_h{h}": rows[-1].isolated for h, rows in enumerate(found) if rows}
    tables = [_sweep_table(found), _degree_table(graphs, fits, neurons)]
    drawn = _figure(found, graphs, fits, neurons, known) if any(found) else None
    data = {
        "heads": [[row._asdict() for row in rows] for rows in found],
        "degrees": [{way: one._asdict() for way, one in each.items()} for each in fits],
        "excess": [_excess(g) for g in graphs],
    }
    return Finding("graph", _says(found), tables, metrics, known, drawn, data)


def _anywhere(neurons: int, count: int, seed: int) -> Edges:
    """Edges between any two neurons, each at most once."""
    draw = np.random.default_rng(seed)
    places = draw.permutation(np.unique(draw.integers(0, neurons * neurons, 2 * count + 16)))
    sources, targets = places // neurons, places % neurons
    between = sources != targets
    return Edges(sources[between][:count], targets[between][:count], np.ones(count), 1.0)


def _measured(edges: Edges, count: int, nulls: tuple[float, float], neurons: int, seed: int) -> Measured:
    sources, targets = edges.sources[:count], edges.targets[:count]
    found, communities = modularity(sources, targets, seed)
    connected = len(np.union1d(sources, targets))
    return Measured(count, float(edges.weights[count - 1]), 1 - connected / neurons, found, *nulls, communities)


def _excess(edges: Edges) -> float:
    """How many times as many entries lie above the last threshold as normal noise of the same spread would have, log10; the heavy tail."""
    from scipy.special import log_ndtr

    if not edges.spread or not len(edges.weights):
        return 0.0
    expected = float(log_ndtr(-edges.weights[-1] / edges.spread)) / np.log(10)
    return float(np.log10(len(edges.weights)) - expected)


def _degrees(ends: NDArray[np.int64], neurons: int) -> NDArray[np.int64]:
    return np.bincount(ends, minlength=neurons)


MARGIN = 0.05  # of modularity, above both random graphs
FEWEST_EDGES = 200  # below, one random graph differs from the next by more than MARGIN
NAMED_HEADS = 8  # in a legend


def _says(found: list[list[Measured]]) -> str:
    last = [rows[-1] for rows in found if rows]
    if not last:
        return "no head has a positive entry: there is no graph"
    most = max(row.edges for row in last)
    if most < FEWEST_EDGES:
        return f"the model is too small to show communities: at most {most:,} edges a head, and below {FEWEST_EDGES} chance makes as many"
    structured = [h for h, row in enumerate(last) if row.modularity > max(row.anywhere, row.product) + MARGIN]
    best = max(last, key=lambda row: row.modularity)
    if not structured:
        return (
            f"no head has communities beyond those of random graphs with {best.edges:,} edges (highest modularity {best.modularity:.2f}; "
            f"random: {best.anywhere:.2f} and {best.product:.2f})"
        )
    heads = f"head{'s' * (len(structured) > 1)} {', '.join(map(str, structured))} {'have' if len(structured) > 1 else 'has'} communities"
    return (
        f"{heads}: modularity up to {best.modularity:.2f} at {best.edges:,} edges, where random graphs have "
        f"{best.anywhere:.2f} (edges anywhere) and {best.product:.2f} (product of random matrices)"
    )


def _sweep_table(found: list[list[Measured]]) -> Table:
    header = ["head", "edges", "threshold", "modularity", "edges anywhere", "random product", "communities", "isolated neurons"]
    rows = [
        [
            str(h),
            f"{m.edges:,}",
            *(f"{value:.3f}" for value in (m.threshold, m.modularity, m.anywhere, m.product)),
            f"{m.communities:,}",
            f"{100 * m.isolated:.1f} %",
        ]
        for h, each in enumerate(found)
        for m in each
    ]
    return Table("communities; isolated neurons do not count in modularity", header, rows)


def _degree_table(graphs: list[Edges], fits: list[dict[str, Fit]], neurons: int) -> Table:
    header = ["head", "degree", "largest", "from", "exponent", "tail", "against exponential", "against log-normal"]
    rows = []
    for head, (graph, each) in enumerate(zip(graphs, fits, strict=True)):
        for way, ends in (("out", graph.sources), ("in", graph.targets)):
            rows.append([str(head), way, str(int(_degrees(ends, neurons).max(initial=0))), *each[way].cells()])
    return Table("power law of degrees at the lowest threshold; ratio of likelihoods, above 0 for the power law, and p", header, rows)


def _figure(found: list[list[Measured]], graphs: list[Edges], fits: list[dict[str, Fit]], neurons: int, made_of: Mapping[str, Any]) -> str:
    made = figure(13, 4, "Graph of neurons", made_of)
    sweep, out_degree, in_degree = made.subplots(1, 3)
    for head, rows in enumerate(found):
        sweep.plot([m.edges for m in rows], [m.modularity for m in rows], marker="o", label=f"head {head}")
    most = max(found, key=len)
    for name, style, label in (("anywhere", ":", "edges anywhere"), ("product", "--", "random product")):
        sweep.plot([m.edges for m in most], [getattr(m, name) for m in most], style, color="0.4", label=label)
    sweep.set(xscale="log", xlabel="edges above the threshold", ylabel="modularity", ylim=(0, 1))
    if len(found) <= NAMED_HEADS:
        sweep.legend(fontsize="small")
    for axes, way in ((out_degree, "out"), (in_degree, "in")):
        for head, graph in enumerate(graphs):
            degrees = np.sort(_degrees(graph.sources if way == "out" else graph.targets, neurons))[::-1]
            degrees = degrees[degrees > 0]
            if not len(degrees):
                continue
            axes.plot(degrees, np.arange(1, len(degrees) + 1) / neurons, label=f"head {head}: {fits[head][way].exponent:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=f"{way} degree", ylabel="share of neurons with as many or more")
        if len(graphs) <= NAMED_HEADS and axes.lines:
            axes.legend(fontsize="small", title="exponent")
    return svg(made)
