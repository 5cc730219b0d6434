"""The BDH network: bytes in, next-byte logits out, under the published names.

One set of layer weights is applied `n_layer` times. The Python interface and the state dict are those of pathwaycom/bdh, so published
scripts and weights run here; how a layer is computed (see `layer`) is a choice inside. Does not know where weights come from, in which
number format the matmuls run, or that there is a training loop.

B rows, T tokens, V vocabulary, D n_embd, H n_head, N neurons per head, L n_layer.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdh_mlflow import layer
from bdh_mlflow.config import BDHConfig

__all__ = ["BDH", "BDHConfig"]

INIT_STD = 0.02  # pathwaycom/bdh, bdh.py
PROJECTIONS = ("encoder", "encoder_v", "decoder")
"""Parameters that do nearly all the arithmetic; what precision works on."""

WeightView = Callable[[str, Tensor], Tensor]


class BDH(nn.Module):
    """Baby Dragon Hatchling, in the form for GPUs.

    Parameters: embed.weight (V, D), encoder and encoder_v (H, D, N), decoder (H * N, D), lm_head (D, V).
    """

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config = config
        heads, width = config.n_head, config.n_embd
        self.neurons = config.mlp_internal_dim_multiplier * width // heads
        # Created in the published order, so one seed gives the published initial weights.
        self.decoder = nn.Parameter(torch.zeros((heads * self.neurons, width)).normal_(std=INIT_STD))
        self.encoder = nn.Parameter(torch.zeros((heads, width, self.neurons)).normal_(std=INIT_STD))
        self.embed = nn.Embedding(config.vocab_size, width)
        self.encoder_v = nn.Parameter(torch.zeros((heads, width, self.neurons)).normal_(std=INIT_STD))
        self.lm_head = nn.Parameter(torch.zeros((width, config.vocab_size)).normal_(std=INIT_STD))
        nn.init.normal_(self.embed.weight, mean=0.0, std=INIT_STD)

        self.weight_view: WeightView | None = None
        """How projections are seen by the layers: (name, parameter) -> tensor; None = as they are. Set by `precision`."""
        self.recompute = False
        """Compute activations again in the backward pass instead of keeping L layers of (B, H, T, N) tensors; the values are the same."""
        self._layer = layer.reference_layer
        self._activity: list[layer.Activity] | None = None
        self._tables: dict[tuple[int, int, torch.device], layer.RopeTable] = {}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits for the byte after each position and, given targets, their mean cross-entropy.

        idx, targets: (B, T) integer ids.   Returns logits (B, T, V) and the loss in nats per token, fp32, or None.
        """
        weights = self._layer_weights()
        table = self._rope(0, idx.shape[1])
        dropout = self.config.dropout if self.training else 0.0
        x = self._embedded(idx)
        for depth in range(self.config.n_layer):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._layer, x, weights, table, dropout, use_reentrant=False)
            else:
                x = self._layer(x, weights, table, dropout, self._activity[depth] if self._activity else None)
        logits = x.squeeze(1) @ self.lm_head
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long())

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt.   idx: (B, T) ids, T >= 1.   Returns (B, T + max_new_tokens).

        temperature: 0 is greedy.   top_k: sample among the k likeliest only.   generator: source of randomness, the global one if None.
        Dropout is off and the cost of a token does not depend on the tokens before it.
        """
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, generator=generator))
        return torch.cat((idx, *new), dim=1) if new else idx

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` one by one, each (B, 1), as they are made."""
        if idx.shape[1] == 0:
            raise ValueError("generate needs a prompt of at least one token")
        weights = self._layer_weights()
        x, states = self._embedded(idx), []
        table = self._rope(0, idx.shape[1])
        for _ in range(self.config.n_layer):
            states.append(layer.prefill_state(x, weights, table))
            x = layer.reference_layer(x, weights, table, dropout=0.0)
        for position in range(idx.shape[1], idx.shape[1] + max_new_tokens):
            token = _sample(x[:, 0, -1] @ self.lm_head, temperature, top_k, generator)
            yield token
            table = layer.rope_table(position, position + 1, self.neurons, idx.device)
            x = self._embedded(token)
            for state in states:
                x = layer.recurrent_layer(x, weights, table, state)

    @contextlib.contextmanager
    def observed(self) -> Iterator[dict[str, float]]:
        """Look at the neurons of every forward pass in the body; the dict is filled at its end.

        Per layer i: `bdh/active_x_l{i}` and `bdh/active_xy_l{i}`, mean share of neurons that are not zero for a token, before and after
        their gate; `bdh/dead_x_l{i}` and `bdh/dead_xy_l{i}`, share of neurons that were so for none of the tokens looked at.
        """
        facts: dict[str, float] = {}
        shape = (self.config.n_head, self.neurons)
        device = self.embed.weight.device
        self._looked_at = 0
        self._activity = [
            layer.Activity(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(self.config.n_layer)
        ]
        handle = self.register_forward_pre_hook(self._count)
        try:
            yield facts
        finally:
            handle.remove()
            counted, self._activity = self._activity, None
            for depth, activity in enumerate(counted):
                for name, counts in zip(activity._fields, activity, strict=True):
                    if self._looked_at:
                        facts[f"bdh/active_{name}_l{depth}"] = counts.mean().item() / self._looked_at
                        facts[f"bdh/dead_{name}_l{depth}"] = (counts == 0).float().mean().item()

    def compile_layers(self) -> None:
        """Let torch.compile fuse the layer. Quantisation stays outside: bitsandbytes' kernels are not traced rightly (0.50.2)."""
        self._layer = torch.compile(layer.reference_layer)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load a published state dict; its `attn.freqs` is a constant that this model computes."""
        self.load_state_dict({k: v for k, v in state.items() if k != "attn.freqs"})

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, tokens = inputs[0].shape
        self._looked_at += rows * len(range(0, tokens, layer.ACTIVITY_STRIDE))

    def _embedded(self, idx: Tensor) -> Tensor:
        return layer.norm(self.embed(idx).unsqueeze(1))

    def _layer_weights(self) -> layer.LayerWeights:
        def seen(name: str) -> Tensor:
            parameter: Tensor = getattr(self, name)
            return parameter if self.weight_view is None else self.weight_view(name, parameter)

        return layer.LayerWeights(*map(seen, PROJECTIONS))

    def _rope(self, start: int, stop: int) -> layer.RopeTable:
        key = (start, stop, self.embed.weight.device)
        if key not in self._tables:
            self._tables = {key: layer.rope_table(start, stop, self.neurons, key[2])}
        return self._tables[key]


def activation_bytes(config: BDHConfig, batch: int, tokens: int, itemsize: int) -> int:
    """Memory for the activations that a backward pass without recomputation keeps, in bytes.

    Counted on the reference form: eight (B, H, T, N) tensors a layer (neurons, rotated neurons, both gates, their product and masks).
    """
    return 8 * config.n_layer * batch * tokens * config.mlp_internal_dim_multiplier * config.n_embd * itemsize


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Next token of each row.   logits: (B, V).   Returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
