"""Attention that fades with distance: what a token reads of one that was d tokens before is multiplied by exp(-rate d).

Each head has a rate: strength * 2^(-8 h / H) for h = 1 .. H, the slopes of ALiBi (arXiv:2108.12409); linear attention that fades so is
retention (arXiv:2307.08621). A state fades as a whole, by the distance to the token that reads it.

H heads, C tokens that attend to each other directly, D n_embd.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Fade(NamedTuple):
    """Factors of all heads.   powers: (H, C + 1), exp(-rate d) for d = 0 .. C.   scores: (H, C, C), of i - j below the diagonal, else 0."""

    powers: Tensor
    scores: Tensor

    def read(self, tokens: int) -> Tensor:
        """Of what each of the first tokens reads of the state before them, (H, tokens, 1)."""
        return self.powers[:, :tokens, None]

    def written(self, tokens: int) -> Tensor:
        """Of what each of so many tokens adds to the state after them, (H, tokens, 1)."""
        return self.powers[:, 1 : tokens + 1, None].flip(1)

    def over(self, tokens: int) -> Tensor:
        """Of a state, over so many tokens, (H, 1, 1)."""
        return self.powers[:, tokens, None, None]

    def on_scores(self, scores: Tensor, head: int) -> Tensor:
        """Scores of a head, causal or not, as far as they have faded, and 0 elsewhere; in place.   scores: (..., tokens, tokens)."""
        return scores.mul_(self.scores[head, : scores.shape[-1], : scores.shape[-1]])


class Fading:
    """How a network's attention fades: the factors for a number of tokens, kept for the next call."""

    def __init__(self, heads: int, strength: float) -> None:
        self._heads, self._strength = heads, strength
        self._kept: Fade | None = None

    def __call__(self, tokens: int, device: torch.device) -> Fade | None:
        """Factors for up to C tokens; None where attention does not fade."""
        if not self._strength:
            return None
        if self._kept is None or self._kept.scores.shape[1] != tokens or self._kept.scores.device != device:
            self._kept = fade(self._heads, self._strength, tokens, device)
        return self._kept


def rates(heads: int, strength: float) -> Tensor:
    """Of each head, (H,), fp64."""
    return strength * 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)


def fade(heads: int, strength: float, tokens: int, device: torch.device | str | None = None) -> Fade:
    """Factors for up to C tokens, fp32."""
    powers = torch.exp(-rates(heads, strength).unsqueeze(1) * torch.arange(tokens + 1)).float().to(device)
    places = torch.arange(tokens, device=device)
    distances = places.unsqueeze(1) - places
    return Fade(powers, powers[:, distances.clamp_min(0)].tril(-1))
