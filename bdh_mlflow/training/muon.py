"""Muon for the three projections, which do nearly all the arithmetic, AdamW for the embedding and the head; both torch's own.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by the nearest orthogonal one, by a few steps of Newton and Schulz in bfloat16.
A projection (H, D, N) is a matrix for each head, as heads are independent. Its steps are scaled to those of AdamW (arXiv:2502.16982,
section 2.2), so that one learning rate and one weight decay serve both.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = "momentum_buffer"


class Muon(torch.optim.Optimizer):
    """One optimizer to its users: two groups of parameters, and a state for each parameter in its own shape."""

    def __init__(self, parameters: Iterable[nn.Parameter], projections: Sequence[nn.Parameter], **adamw: Any) -> None:
        """projections: those of the parameters that Muon updates.   adamw: lr, weight_decay and betas."""
        own = {id(parameter) for parameter in projections}
        others = [parameter for parameter in parameters if id(parameter) not in own]
        rates = {"lr": adamw["lr"], "weight_decay": adamw["weight_decay"]}
        super().__init__([{"params": list(projections), **rates}, {"params": others, **adamw}], {})
        self._adamw = torch.optim.AdamW(others, fused=True, **adamw)
        self._matrices = {parameter: [nn.Parameter(part.detach()) for part in _parts(parameter)] for parameter in projections}
        every = [matrix for matrices in self._matrices.values() for matrix in matrices]
        self._muon = torch.optim.Muon(every, adjust_lr_fn="match_rms_adamw", **rates)
        self.state.update(self._adamw.state)  # empty by now; its entries are shared from the first step on

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        muon, adamw = self.param_groups
        for group, inner in ((muon, self._muon), (adamw, self._adamw)):
            for name in ("lr", "weight_decay", "betas"):
                if name in group:
                    inner.param_groups[0][name] = group[name]
        for parameter, matrices in self._matrices.items():
            if parameter.grad is None:
                continue
            if MOMENTUM not in self.state[parameter]:
                self._share(parameter, torch.zeros_like(parameter))
            for matrix, part in zip(matrices, _parts(parameter.grad), strict=True):
                matrix.grad = part
        self._muon.step()  # type: ignore[no-untyped-call]
        for matrices in self._matrices.values():
            for matrix in matrices:
                matrix.grad = None
        self._adamw.step()
        self.state.update(self._adamw.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        super().load_state_dict(state_dict)
        for parameter in self.param_groups[1]["params"]:
            if parameter in self.state:
                self._adamw.state[parameter] = self.state[parameter]
        for parameter in self._matrices:
            if MOMENTUM in self.state.get(parameter, {}):
                self._share(parameter, self.state[parameter][MOMENTUM])

    def _share(self, parameter: nn.Parameter, momentum: Tensor) -> None:
        """One momentum for the parameter, of which each of its matrices has a part."""
        self.state[parameter] = {MOMENTUM: momentum}
        for matrix, part in zip(self._matrices[parameter], _parts(momentum), strict=True):
            self._muon.state[matrix][MOMENTUM] = part


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Its matrices, in the same memory.   tensor: (H, D, N) or a matrix already."""
    return tensor.unbind(0) if tensor.ndim == 3 else [tensor]
