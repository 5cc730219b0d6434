"""Does activity fall where a text repeats itself? A random word, again and again: what a model knows already needs fewer neurons.

The probe of arXiv:2509.26507, figure 14: a warm-up of the same 13 letters, then a random word of 8 letters 8 times, and that once more
with another word, which is measured: at the beginning of a text a model has nothing to go by. Measured is the share of neurons whose x * y
is not zero, per layer and per band of rotation frequencies. The null is the same text with the letters of each presentation in another
order, which repeats letters but no word. Trains nothing; any model whose tokens include single letters will do.
"""

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_mlflow.analysis.layers import activations
from bdh_mlflow.analysis.results import Finding, Table, figure, svg
from bdh_mlflow.model.bdh import BDH

WARM_UP, WORD, TIMES = 13, 8, 8  # letters, letters and presentations: arXiv:2509.26507, figure 14
BANDS = 8  # of RoPE frequencies, equally many neurons each; fewer where there are fewer neurons
RESAMPLED = 2000  # of words, for confidence intervals
LETTERS = string.ascii_lowercase


class Probe(NamedTuple):
    """Texts of the probe.   repeated, shuffled: (W, 2 (WARM_UP + WORD * TIMES)) ids; rows of the two have the same letters."""

    repeated: Tensor
    shuffled: Tensor


def probe(letters: Tensor, words: int, seed: int) -> Probe:
    """Texts of random words, whose letters are all different.   letters: ids of single letters, at least WARM_UP of them."""
    draw, warm = torch.Generator().manual_seed(seed), letters[:WARM_UP]
    repeated, shuffled = [], []
    for _ in range(words):
        before, word = (letters[torch.randperm(len(letters), generator=draw)[:WORD]] for _ in range(2))
        lead = torch.cat([warm, *[before] * TIMES, warm])
        repeated.append(torch.cat([lead, *[word] * TIMES]))
        others = [word[torch.randperm(WORD, generator=draw)] for _ in range(TIMES - 1)]
        shuffled.append(torch.cat([lead, word, *others]))
    return Probe(torch.stack(repeated), torch.stack(shuffled))


@torch.no_grad()
def analyze(model: BDH, letters: Tensor, words: int, seed: int, made_of: Mapping[str, Any]) -> Finding:
    """The probe on a model.   letters: ids of single letters.   words: how many, each a text of its own."""
    texts = probe(letters, words, seed)
    real, null = (_measured(model, each) for each in texts)
    known = {**made_of, "words": words, "seed": seed, "letters a word": WORD, "presentations": TIMES}
    layers = range(model.config.n_layer)
    ratios, nulls = ([_ratio(shares[:, d, :, 0], seed) for d in layers] for shares in (real, null))
    bands = [[_ratio(real[:, d, :, b], seed).value for b in range(1, real.shape[3])] for d in layers]
    metrics = {f"analysis/repetition_ratio_l{d}": ratios[d].value for d in layers}
    metrics |= {f"analysis/repetition_null_l{d}": nulls[d].value for d in layers}
    shown = [d for d in layers if ratios[d].low > nulls[d].high and ratios[d].low > 1]
    header = ["layer", "first time", "again (2 to 8)", "ratio (95 %)", "shuffled: ratio (95 %)"]
    first, again = (real[:, :, presentations, 0].mean(axis=(0, 2)) for presentations in (slice(0, 1), slice(1, None)))
    rows = [[str(d), f"{100 * first[d]:.2f} %", f"{100 * again[d]:.2f} %", str(ratios[d]), str(nulls[d])] for d in layers]
    data = {"presentations": real[..., 0].mean(axis=0).tolist(), "shuffled": null[..., 0].mean(axis=0).tolist(), "bands": bands}
    tables = [Table("share of active neurons (x * y)", header, rows)]
    return Finding("repetition", _says(shown, ratios, nulls), tables, metrics, known, _figure(real, null, bands, known), data)


class Ratio(NamedTuple):
    """Activity at the first presentation over that of the later ones.   low, high: between which 95 % of resampled words have it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def _says(shown: list[int], ratios: list[Ratio], nulls: list[Ratio]) -> str:
    if not shown:
        best = max(range(len(ratios)), key=lambda d: ratios[d].value - nulls[d].value)
        return (
            "no layer's activity falls more when a word is repeated than when its letters come in another order "
            f"(most in layer {best}: {ratios[best]} against {nulls[best]}): the model, or what it was trained on, is too small to show it"
        )
    best = max(shown, key=lambda d: ratios[d].value)
    where = ", ".join(map(str, shown))
    return (
        f"activity falls when a word is repeated, more than when its letters come in another order, in layers {where}; "
        f"most in layer {best}, {ratios[best].value:.2f} times ({nulls[best].value:.2f} times shuffled)"
    )


def _measured(model: BDH, idx: Tensor) -> NDArray[np.float64]:
    """Share of neurons whose x * y is not zero, of all and of each band, mean over a presentation's letters: (W, L, TIMES, 1 + bands)."""
    device, count = model.embed.weight.device, min(BANDS, model.neurons)
    found = np.zeros((len(idx), model.config.n_layer, TIMES, 1 + count))
    for row, ids in enumerate(idx):
        for depth, layer in enumerate(activations(model, ids[None].to(device))):
            active = ((layer.x > 0) & (layer.y > 0))[0, :, -WORD * TIMES :].double().mean(dim=0)  # over heads: (letters, N)
            shares = torch.stack([part.mean(dim=-1) for part in (active, *active.tensor_split(count, dim=-1))], dim=-1)
            found[row, depth] = shares.view(TIMES, WORD, 1 + count).mean(dim=1).cpu().numpy()
    return found


def _ratio(shares: NDArray[np.float64], seed: int) -> Ratio:
    """shares: (W, TIMES)."""
    first, again = shares[:, 0], shares[:, 1:].mean(axis=1)
    picked = np.random.default_rng(seed).integers(0, len(first), (RESAMPLED, len(first)))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = first[picked].mean(axis=1) / again[picked].mean(axis=1)
        value = first.mean() / again.mean()
    if not np.isfinite(value) or not np.isfinite(resampled).all():
        return Ratio(1.0, 0.0, float("inf"))  # nothing is active: nothing is known
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Ratio(float(value), float(low), float(high))


def _figure(real: NDArray[np.float64], null: NDArray[np.float64], bands: list[list[float]], made_of: Mapping[str, Any]) -> str:
    made = figure(12, 4, "Activity while a random word is repeated", made_of)
    over, by_band = made.subplots(1, 2, width_ratios=(3, 2))
    times = np.arange(1, TIMES + 1)
    for depth in range(real.shape[1]):
        (line,) = over.plot(times, 100 * real[:, depth, :, 0].mean(axis=0), marker="o", label=f"layer {depth}")
        over.plot(times, 100 * null[:, depth, :, 0].mean(axis=0), linestyle=":", color=line.get_color())
    over.set(
        xlabel="presentation of the word", ylabel="% of neurons with x * y > 0", ylim=(0, None), title="dotted: letters in another order"
    )
    over.legend(fontsize="small")
    drawn = by_band.imshow(np.array(bands), aspect="auto", cmap="viridis")
    by_band.set(xlabel="band of frequencies, fast to slow", ylabel="layer", title="first time / again")
    made.colorbar(drawn, ax=by_band)
    return svg(made)
