"""Graphs whose edges, degrees and modularity are known."""

import numpy as np
import pytest
import torch

from bdh_mlflow.analysis import graph
from tests.analysis import made

TWO_TRIANGLES = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (2, 3)]


def entries(edges: list[tuple[int, int]], neurons: int = 8) -> torch.Tensor:
    matrix = torch.full((neurons, neurons), -0.1)
    for number, (source, target) in enumerate(edges):
        matrix[source, target] = 2 - 0.1 * number
    return matrix


def test_largest_entries_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(50, 6), torch.randn(6, 50)
    whole = left @ right
    expected = whole.clone().fill_diagonal_(0).flatten().topk(20)
    for rows in (7, 1024):
        monkeypatch.setattr(graph, "ROWS", rows)
        found = graph.largest(left, right, 20)
        assert np.allclose(found.weights, expected.values.numpy())
        assert (50 * found.sources + found.targets).tolist() == expected.indices.tolist()
        assert found.spread == pytest.approx(float(whole.std(unbiased=False)), rel=1e-4)
    assert len(graph.largest(-left.abs(), right.abs(), 20).weights) == 0, "no entry is positive"


def test_modularity_of_two_triangles_with_a_bridge() -> None:
    sources, targets = (np.array(ends) for ends in zip(*TWO_TRIANGLES, strict=True))
    value, communities = graph.modularity(sources, targets, 0)
    assert communities == 2
    assert value == pytest.approx(2 * (3 / 7 - 0.25))  # each triangle: 3 of 7 edges inside, half of the degrees
    assert graph.modularity(np.array([], dtype=int), np.array([], dtype=int), 0) == (0.0, 0)


def test_edges_isolated_neurons_and_degrees_of_a_known_network() -> None:
    found = graph.analyze(made.with_graph(entries(TWO_TRIANGLES)), 0, {"step": 1})
    (rows,) = found.data["heads"]
    assert [row["edges"] for row in rows] == [4, 7]
    assert rows[-1]["isolated"] == pytest.approx(2 / 8)
    assert rows[-1]["modularity"] == pytest.approx(2 * (3 / 7 - 0.25))
    assert rows[-1]["threshold"] == pytest.approx(1.4)
    (degrees,) = found.data["degrees"]
    assert degrees["out"]["tail"] == 6
    assert np.isnan(degrees["out"]["exponent"]), "too few for a power law"
    assert found.tables[1].rows[0][2] == "2", "neuron 2 has two edges out"


def test_communities_are_told_from_shuffled_weights() -> None:
    """Blocks of neurons that excite each other; the same weights permuted within rows show none."""
    torch.manual_seed(0)
    neurons, groups = 128, 8
    of = torch.arange(neurons) % groups
    matrix = torch.randn(neurons, neurons) + 3 * (of[:, None] == of[None])
    shuffled = torch.stack([row[torch.randperm(neurons)] for row in matrix])
    real, null = (graph.analyze(made.with_graph(each), 0, {}) for each in (matrix, shuffled))
    assert real.says.startswith("head 0 has communities: ")
    assert real.metrics["analysis/modularity_h0"] > 0.6
    assert "no head has communities" in null.says


def test_few_edges_say_nothing_of_communities() -> None:
    found = graph.analyze(made.with_graph(torch.randn(8, 8)), 0, {})
    assert found.says.startswith("the model is too small to show communities: at most 30 edges a head")


def test_a_network_without_positive_entries_has_no_graph() -> None:
    found = graph.analyze(made.with_graph(-torch.rand(8, 8)), 0, {})
    assert found.says.startswith("no head has a positive entry")
    assert found.metrics == {}
