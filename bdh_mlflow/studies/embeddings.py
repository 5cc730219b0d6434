"""A look at a model's tokens: how long their vectors are, which are near each other, and a map of all in two dimensions.

Vectors are the rows of `embed.weight`. Nearness is the cosine after their mean is taken away, as the mean alone makes all of them alike.
The map has the two directions of largest variance (principal components); tokens that stand for no text are left out.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.text import verbatim
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.vocabulary import Tokenizer

CELLS = 14, 18  # of the map, across and up: the first whole character or word of each has its text beside it
CLASSES = {"letters": str.isalpha, "digits": str.isdigit, "spaces": str.isspace}
"""By what tokens are coloured: all their characters are, spaces around them left out."""


FOLDER = "embeddings"
"""Among the artifacts of a run."""


def log(picture: Path, run_id: str, config: TrackingConfig) -> None:
    """Store a picture as an artifact of a run.   Raises TrackingError."""
    client = store.connect(config)
    with store.reported(f"run {run_id}: the picture cannot be stored there"):
        Artifacts(client.get_run(run_id).info.artifact_uri, client.tracking_uri).put(picture, FOLDER)


class Neighbour(NamedTuple):
    """A token near another one.   cosine: of their centred vectors."""

    token: int
    cosine: float


class Embeddings:
    """Vectors of tokens.   vectors: (V, D).   tokenizer: what the ids stand for."""

    def __init__(self, vectors: Tensor, tokenizer: Tokenizer) -> None:
        self._vectors = vectors.detach().float().cpu()
        self._tokenizer = tokenizer
        self.ids = [token for token, piece in enumerate(tokenizer.pieces) if piece and token < len(self._vectors)]
        """Those that stand for text."""
        centred = self._vectors - self._vectors[self.ids].mean(dim=0)
        self._directions = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self._centred = centred

    @property
    def norms(self) -> NDArray[np.float64]:
        """Lengths of the vectors, (V,)."""
        norms: NDArray[np.float64] = self._vectors.norm(dim=1).double().numpy()
        return norms

    def nearest(self, token: int, count: int) -> list[Neighbour]:
        """Other tokens by falling cosine."""
        cosines = self._directions[self.ids] @ self._directions[token]
        order = cosines.argsort(descending=True, stable=True).tolist()
        found = [Neighbour(self.ids[place], float(cosines[place])) for place in order if self.ids[place] != token]
        return found[:count]

    def token_of(self, text: str) -> int:
        """The one token that a text is.   Raises InputError for a text of several."""
        ids = self._tokenizer.encode(text)
        if len(ids) > 1 and not self._tokenizer.pieces[ids[0]].strip():  # a space that the tokenizer puts first
            ids = ids[1:]
        if len(ids) != 1:
            pieces = " ".join(repr(self._tokenizer.decode([token])) for token in ids)
            raise InputError(f"{text!r}: {len(ids)} tokens ({pieces or 'none'}); accepted: the text of one token")
        return ids[0]

    def plane(self) -> tuple[NDArray[np.float64], float]:
        """Places of the tokens `ids` in the plane of largest variance, (tokens, 2), and the share of the variance that it holds.

        Signs are such that the coordinate of largest size is positive in each direction.
        """
        centred = self._centred[self.ids].double()
        _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
        places = centred @ directions[:2].T
        signs = torch.sign(places[places.abs().argmax(dim=0), torch.arange(2)])
        return (places * signs).numpy(), float((sizes[:2] ** 2).sum() / (sizes**2).sum())

    def picture(self) -> bytes:
        """The map as a PNG."""
        places, share = self.plane()
        kinds = [self._kind(token) for token in self.ids]
        figure = Figure(figsize=(11, 8), layout="constrained")
        axes = figure.subplots()
        for number, kind in enumerate((*CLASSES, "other")):
            rows = [row for row, each in enumerate(kinds) if each == kind]
            axes.scatter(places[rows, 0], places[rows, 1], s=9, color=f"C{number}", label=f"{kind} ({len(rows):,})", alpha=0.6)
        for row in self._named(places):
            label = verbatim(repr(self._tokenizer.decode([self.ids[row]]))[1:-1])
            axes.annotate(label, places[row], fontsize=7, xytext=(2, 2), textcoords="offset points")
        axes.set(
            title=f"{len(self.ids):,} tokens, {100 * share:.0f} % of the variance", xlabel="first component", ylabel="second component"
        )
        axes.legend(fontsize="small")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        return picture.getvalue()

    def _named(self, places: NDArray[np.float64]) -> list[int]:
        """Rows of the tokens that are named on the map, one a cell, of the longest vectors."""
        low, high = places.min(axis=0), places.max(axis=0)
        cells = np.floor((places - low) / np.maximum(high - low, 1e-12) * (np.array(CELLS) - 1e-9)).astype(int)
        norms, taken = self.norms[self.ids], dict[tuple[int, ...], int]()
        for row in np.argsort(-norms, kind="stable").tolist():
            if "\ufffd" not in self._tokenizer.decode([self.ids[row]]):
                taken.setdefault(tuple(cells[row].tolist()), row)
        return sorted(taken.values())

    def table(self, tokens: Sequence[int], count: int) -> list[list[str]]:
        """A row for each token: its text, the length of its vector, and its neighbours."""
        rows, norms = [], self.norms
        for token in tokens:
            near = "  ".join(f"{self._tokenizer.decode([n.token])!r} {n.cosine:.2f}" for n in self.nearest(token, count))
            rows.append([repr(self._tokenizer.decode([token])), str(token), f"{norms[token]:.3f}", near])
        return rows

    def _kind(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        inner = text.strip() or text
        return next((name for name, test in CLASSES.items() if test(inner)), "other")
