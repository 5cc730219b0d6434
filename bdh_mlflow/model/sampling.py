"""How the next token is chosen from logits: greedily, or drawn after temperature, top-k and top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bdh_mlflow.errors import NonFiniteError

GREEDY_BELOW_TEMPERATURE = 1e-6  # dividing logits by less can overflow float32


@dataclass(frozen=True)
class Sampler:
    """temperature: 0 always takes the likeliest.   top_k: draw among the k likeliest only.   top_p: among the likeliest that together
    reach this probability; at least one.   None: no such limit.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next token of each row.   logits: (B, V).   generator: torch's global one if None.   Returns (B, 1).

        Raises NonFiniteError for logits that are not finite: no token is likelier than another then.
        """
        if not bool(torch.isfinite(logits).all()):  # the caller waits for each token anyway
            raise NonFiniteError("the model gives non-finite values: its weights, or the numbers they are computed in, are not finite")
        if self.temperature < GREEDY_BELOW_TEMPERATURE:
            return logits.argmax(dim=-1, keepdim=True)
        logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        likelihood = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = likelihood.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            beyond[:, 0] = False
            likelihood = likelihood.masked_fill(beyond.scatter(-1, order, beyond), 0)
        return torch.multinomial(likelihood, 1, generator=generator)
