"""Neurons and synapses that tell one set of sentences from another.

Each neuron has a mean activity in each sentence, each synapse a strength after it. Mann-Whitney's test compares the two sets, the
rank-biserial correlation says how far they are apart (1: every sentence of the first above every one of the second), and Benjamini and
Hochberg's procedure keeps the share of false findings among many tests at FALSE. The null are the same tests with the sentences dealt to
two sets at random. Source: arXiv:2509.26507, section 6.3, which tests one synapse on 50 sentences against 50.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bdh_mlflow.analysis.layers import state_at
from bdh_mlflow.analysis.results import Finding, Table, figure, svg
from bdh_mlflow.analysis.synapses import LONGEST, activations_at, check_place
from bdh_mlflow.config.messages import found
from bdh_mlflow.config.reading import Scalar, plain_values, read_yaml
from bdh_mlflow.errors import InputError
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.text import is_storable

FEWEST = 8  # sentences of each set: below, no neuron of thousands can pass the correction
FALSE = 0.05  # share of false findings
DEALT = 20  # times that sentences are dealt at random
CANDIDATES = 48  # neurons of x and of y whose synapses are tested: the most active that are not always active
SHOWN = 12


class Sentences(NamedTuple):
    """Two named sets."""

    names: tuple[str, str]
    sets: tuple[list[str], list[str]]


class Tested(NamedTuple):
    """Many tests at once.   r: rank-biserial correlations.   p: corrected.   both (M,); NaN where nothing varies."""

    r: NDArray[np.float64]
    p: NDArray[np.float64]

    @property
    def selective(self) -> NDArray[np.bool_]:
        """Which pass."""
        return np.asarray(self.p < FALSE)


def read(path: Path) -> Sentences:
    """Two lists of sentences under their names, from a YAML file.   Raises InputError."""
    tree = read_yaml(path, "two names, each with a list of sentences")
    sets = {name: _texts(path, name, lines) for name, lines in tree.items() if isinstance(lines, list)}
    if not (len(sets) == len(tree) == 2 and all(name.strip() for name in sets) and all(len(lines) >= FEWEST for lines in sets.values())):
        held = ", ".join(f"{name!r}: {len(v) if isinstance(v, list) else 'no list'}" for name, v in tree.items())
        raise InputError(f"{path}: two lists of at least {FEWEST} sentences each are needed, each under a name; found {held or 'nothing'}")
    (first, ones), (second, others) = sets.items()
    return Sentences((first, second), (ones, others))


def _texts(path: Path, name: str, lines: list[Any]) -> list[str]:
    """Scalars of a list as they are written: a sentence may look like a number.   Raises InputError for one that is no text."""
    texts = [line.text if isinstance(line, Scalar) else line for line in lines]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip() or not is_storable(text):
            raise InputError(f"{path}: {name!r}, item {number}: found {found(plain_values(text))}; accepted: a sentence, as text")
    return texts


def compared(values: NDArray[np.float64], of_first: NDArray[np.bool_]) -> Tested:
    """Test every column.   values: (sentences, M).   of_first: which sentences are of the first set."""
    first, second = values[of_first], values[~of_first]
    varies = values.std(axis=0) > 0
    r, p = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    if varies.any():
        u, found = stats.mannwhitneyu(first[:, varies], second[:, varies], axis=0, method="asymptotic")
        r[varies] = 2 * u / (len(first) * len(second)) - 1
        p[varies] = stats.false_discovery_control(np.clip(found, 0, 1))
    return Tested(r, p)


@torch.no_grad()
def analyze(
    model: BDH, sentences: Sentences, ids: Sequence[list[int]], place: tuple[int, int], seed: int, made_of: Mapping[str, Any]
) -> Finding:
    """Which neurons and synapses tell the sets apart.   ids: of the sentences, first set first.   place: layer and head."""
    layer, head = place
    check_place(model, layer, head)
    if long := next((number for number, each in enumerate(ids) if len(each) > LONGEST), None):
        raise InputError(f"sentence {long + 1} of both sets has {len(ids[long]):,} tokens; at most {LONGEST:,} are taken")
    of_first = np.arange(len(ids)) < len(sentences.sets[0])
    activity, synapses, named = _measured(model, ids, layer, head)
    kinds = {"neurons (x)": activity[0], "neurons (x * y)": activity[1], "synapses": synapses}
    tests = {kind: compared(values, of_first) for kind, values in kinds.items()}
    draw = np.random.default_rng(seed)
    dealt = {
        kind: [int(compared(values, draw.permutation(of_first)).selective.sum()) for _ in range(DEALT)] for kind, values in kinds.items()
    }
    known = {
        **made_of,
        "layer": layer,
        "head": head,
        "sentences": f"{of_first.sum()} and {(~of_first).sum()}",
        "seed": seed,
        "false findings": FALSE,
    }
    rows, metrics = [], {}
    for (kind, test), key in zip(tests.items(), ("x", "xy", "synapses"), strict=True):
        count, tested = int(test.selective.sum()), int(np.isfinite(test.p).sum())
        chance = dealt[kind]
        rows.append([kind, f"{tested:,}", f"{count:,}", f"{np.mean(chance):.1f} (most {max(chance)})", _best(test)])
        metrics[f"analysis/selective_{key}_l{layer}h{head}"] = float(count)
    tables = [Table("selective", ["of", "that vary", "selective", f"sets dealt at random, mean of {DEALT}", "largest correlation"], rows)]
    tables.append(_strongest(tests, named, sentences.names))
    means = tuple(float(np.mean(dealt[kind])) for kind in kinds)
    counts = [int(test.selective.sum()) for test in tests.values()]
    says = (
        f"{counts[0]:,} neurons (x), {counts[1]:,} (x * y) and {counts[2]:,} synapses tell {sentences.names[0]} from {sentences.names[1]}; "
        f"of sets dealt at random {means[0]:.1f}, {means[1]:.1f} and {means[2]:.1f} do"
    )
    data = {"correlations": {kind: np.nan_to_num(test.r).round(4).tolist() for kind, test in tests.items()}, "dealt": dealt}
    return Finding(f"selectivity_l{layer}h{head}", says, tables, metrics, known, _figure(tests, sentences, known), data)


def _measured(
    model: BDH, ids: Sequence[list[int]], layer: int, head: int
) -> tuple[tuple[NDArray[np.float64], ...], NDArray[np.float64], list[str]]:
    """Mean activity of x and x * y in each sentence, (sentences, N) each; strengths of synapses after it, and their names."""
    read = [activations_at(model, torch.tensor(each), layer) for each in ids]
    x = np.stack([each.x[0, head].double().mean(dim=0).cpu().numpy() for each in read])
    xy = np.stack([(each.x * each.y)[0, head].double().mean(dim=0).cpu().numpy() for each in read])
    sources = _candidates(torch.stack([(each.x[0, head] > 0).double().mean(dim=0).cpu() for each in read]))
    targets = _candidates(torch.stack([(each.y[0, head] > 0).double().mean(dim=0).cpu() for each in read]))
    reading = model.layer_weights().encoder_v[head].float()[:, targets]
    strengths = [
        (state_at(each, head, model, each.x.shape[2])[0].float()[sources] @ reading).flatten().double().cpu().numpy() for each in read
    ]
    named = [f"{source} -> {target}" for source in sources.tolist() for target in targets.tolist()]
    return (x, xy), np.stack(strengths), named


def _candidates(shares: Tensor) -> Tensor:
    """Neurons that are active most, of those that are not always.   shares: (sentences, N), of tokens at which they are."""
    mean = shares.mean(dim=0)
    return mean.masked_fill(mean > ALWAYS, -1).topk(min(CANDIDATES, int((mean <= ALWAYS).sum()))).indices.sort().values


ALWAYS = 0.9  # share of tokens from which on a neuron says nothing about any


def _best(test: Tested) -> str:
    if not np.isfinite(test.r).any():
        return "-"
    at = int(np.nanargmax(np.abs(test.r)))
    return f"{test.r[at]:+.2f} (p {_small(test.p[at])})"


def _small(p: float) -> str:
    return f"{p:.2g}" if p else "< 1e-300"


def _strongest(tests: Mapping[str, Tested], named: list[str], names: tuple[str, str]) -> Table:
    rows = []
    for kind, test in tests.items():
        order = np.argsort(-np.abs(np.nan_to_num(test.r)), kind="stable")
        for at in [int(i) for i in order[:SHOWN] if test.selective[i]]:
            name = named[at] if kind == "synapses" else str(at)
            rows.append([kind, name, f"{test.r[at]:+.2f}", f"{_small(test.p[at])}", names[0] if test.r[at] > 0 else names[1]])
    return Table("most selective", ["of", "which", "rank-biserial", "p, corrected", "higher in"], rows)


def _figure(tests: Mapping[str, Tested], sentences: Sentences, made_of: Mapping[str, Any]) -> str:
    made = figure(12, 3.8, f"{sentences.names[0]} against {sentences.names[1]}", made_of)
    for axes, (kind, test) in zip(made.subplots(1, len(tests)), tests.items(), strict=True):
        known = test.r[np.isfinite(test.r)]
        axes.hist(known, bins=41, range=(-1, 1), color="0.8", label=f"all {len(known):,}")
        axes.hist(test.r[test.selective], bins=41, range=(-1, 1), color="C3", label=f"selective {int(test.selective.sum()):,}")
        axes.set(xlabel="rank-biserial correlation", ylabel=kind, yscale="symlog")
        axes.legend(fontsize="small")
    return svg(made)
