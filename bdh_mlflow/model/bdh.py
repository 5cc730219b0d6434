"""The BDH network: bytes in, next-byte logits out, under the published names.

One set of layer weights is applied `n_layer` times. The Python interface and the state dict are those of pathwaycom/bdh, so published
scripts and weights run here; how a layer is computed (see `layer`) is a choice inside. Does not know where weights come from, in which
number format the matmuls run, or that there is a training loop.

B rows, T tokens, V vocabulary, D n_embd, H n_head, N neurons per head, L n_layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdh_mlflow.config import BDHConfig
from bdh_mlflow.model import blocked, layer

__all__ = ["BDH", "BDHConfig"]

INIT_STD = 0.02  # pathwaycom/bdh, bdh.py
KEPT_TURNS = 2**26  # T * N of a table that is kept, 256 MiB
COLDEST = 1e-6  # below this temperature the likeliest token is taken: logits divided by it leave float32
STOPPED = -1  # the token of a row that is done
PROJECTIONS = ("encoder", "encoder_v", "decoder")
"""Parameters that do nearly all the arithmetic; what precision works on."""

WeightView = Callable[[str, Tensor], Tensor]
Form = Literal["reference", "blocked"]


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
        self.product: layer.Product = layer.plain_product
        """reference form: who carries the projections out. Set by `precision`."""
        self.recompute = False
        """reference form: compute activations again in the backward pass instead of keeping L layers of (B, H, T, N) tensors."""
        self.use("reference")
        self._activity: list[layer.Activity] | None = None
        self._tables: dict[tuple[int, torch.device], layer.RopeTable] = {}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits for the byte after each position and, given targets, their mean cross-entropy.

        idx, targets: (B, T) integer ids.   Returns logits (B, T, V) and the loss in nats per token, fp32, or None.
        """
        logits = self._through_layers(self._embedded(idx)).squeeze(1) @ self.lm_head
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(_at_least_float(logits).flatten(0, 1), targets.flatten().long())

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts of one length.   idx: (B, T) ids, T >= 1.   Returns (B, T + max_new_tokens).

        temperature: 0 is greedy.   top_k: sample among the k likeliest only.   top_p: among the likeliest that together reach this
        probability.   generator: source of randomness, the global one if None.   Dropout is off and the cost of a token does not depend on
        the tokens before it.
        """
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p=top_p, generator=generator))
        return torch.cat((idx, *new), dim=1) if new else idx

    @torch.no_grad()
    def stream(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        top_p: float | None = None,
        stop: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` one by one, each (B, 1), as they are made.

        prompts: (B, T) ids, or B one-dimensional tensors of any lengths.   stop: ids after which a row is done; it is STOPPED from the
        token after them on, and nothing more comes when all rows are.
        """
        rows = list(prompts)
        if not rows or any(row.shape[0] == 0 for row in rows):
            raise ValueError("generate needs a prompt of at least one token")
        if max_new_tokens < 1:
            return
        last, states = self._prefill(rows)
        weights = self._weights_by_neuron()
        position = torch.tensor([row.shape[0] for row in rows], device=last.device)
        written: list[list[int]] = [[] for _ in rows]
        done = torch.zeros(len(rows), 1, dtype=torch.bool, device=last.device)
        for _ in range(max_new_tokens):
            token = _sample(last @ self.lm_head, temperature, top_k, top_p, generator).masked_fill(done, STOPPED)
            yield token
            if stop:
                for row, text in enumerate(written):
                    text.append(int(token[row]))
                    done[row] |= text[-len(stop) :] == list(stop)
                if done.all():
                    return
            table = layer.rope_at(position, self.neurons)
            last = self._embedded(token.clamp_min(0))[:, 0, 0]
            for state in states:
                last = layer.recurrent_layer(last, weights, table, state)
            position += 1

    def _prefill(self, prompts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the layers make of the last token of each prompt, (B, D), and their states after it, (B, H, N, D) a layer."""
        weights, lengths = self._layer_weights(), [prompt.shape[0] for prompt in prompts]
        embedded = self.embed.weight
        outs = embedded.new_empty(len(prompts), embedded.shape[1])
        shape = (len(prompts), self.config.n_head, self.neurons, embedded.shape[1])
        states = [embedded.new_empty(shape) for _ in range(self.config.n_layer)]
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            x = self._embedded(torch.stack([prompts[row] for row in rows]))
            cut = self._plan(x)
            arranged, table = blocked.arrange(weights, x.dtype, cut), self._turns(length)
            for state in states:
                x, state[rows] = blocked.prefill(x, arranged, table)
            outs[rows] = x[:, 0, -1]
        return outs, states

    def _weights_by_neuron(self) -> layer.LayerWeights:
        encoder, encoder_v, decoder = self._layer_weights()
        return layer.LayerWeights(encoder, encoder_v.mT.contiguous(), decoder.view(encoder_v.mT.shape))

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

    def use(self, form: Form, compiled: bool = False) -> None:
        """Choose how layers are computed; the values are the same.

        reference: as published, several (B, H, T, N) tensors a layer.   blocked: see `blocked`.   compiled: let torch.compile fuse the
        whole layer (reference) or its elementwise passes (blocked). Quantisation stays outside: bitsandbytes' kernels are not traced
        rightly (0.50.2).
        """
        self.form: Form = form
        self._compiled = compiled
        self._layer = torch.compile(layer.reference_layer) if compiled and form == "reference" else layer.reference_layer

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load a published state dict; its `attn.freqs` is a constant that this model computes."""
        self.load_state_dict({k: v for k, v in state.items() if k != "attn.freqs"})

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, tokens = inputs[0].shape
        self._looked_at += rows * len(range(0, tokens, layer.ACTIVITY_STRIDE))

    def _through_layers(self, x: Tensor) -> Tensor:
        """All layers.   x: (B, 1, T, D), normed.   Returns the same shape, normed."""
        weights = self._layer_weights()
        dropout = self.config.dropout if self.training else 0.0
        if self.form == "blocked":
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            arranged, turns = blocked.arrange(weights, dtype, self._plan(x)), self._turns(x.shape[2])
        else:
            table = self._rope(x.shape[2])
        for depth in range(self.config.n_layer):
            activity = self._activity[depth] if self._activity else None
            if self.form == "blocked":
                x = blocked.blocked_layer(x, arranged, turns, dropout, activity, self._compiled)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._layer, x, weights, table, dropout, None, self.product, use_reentrant=False)
            else:
                x = self._layer(x, weights, table, dropout, activity, self.product)
        return x

    def _embedded(self, idx: Tensor) -> Tensor:
        return layer.norm(self.embed(idx).unsqueeze(1))

    def _layer_weights(self) -> layer.LayerWeights:
        def seen(name: str) -> Tensor:
            parameter: Tensor = getattr(self, name)
            return parameter if self.weight_view is None else self.weight_view(name, parameter)

        return layer.LayerWeights(*map(seen, PROJECTIONS))

    def _plan(self, x: Tensor) -> blocked.Plan:
        return blocked.plan(x.shape[0], x.shape[2], x.shape[3], self.neurons, x.device)

    def _turns(self, tokens: int) -> layer.RopeTable | None:
        """For the blocked form, which makes what is too large to keep span by span."""
        return self._rope(tokens) if tokens * self.neurons <= KEPT_TURNS else None

    def _rope(self, tokens: int) -> layer.RopeTable:
        key = (tokens, self.embed.weight.device)
        if key not in self._tables:
            self._tables = {key: layer.rope_table(0, tokens, self.neurons, key[1])}
        return self._tables[key]


def useful_flops(config: BDHConfig, tokens: int) -> float:
    """Floating-point operations that a training step must do for one token of a text of T, two for each multiplication and addition.

    Forward, per token: 6 D H N a layer for the three projections; H (T - 1) (N + D) a layer for the causal half of the scores and what
    they fetch, or beyond T = 4 D, where a state is cheaper, H ((D - 1) (N + D) + 4 N D) for chunks of D tokens with a state; 2 D V for the
    logits. Backward is twice that. What a form computes again is not useful.
    """
    width, heads = config.n_embd, config.n_head
    neurons = config.mlp_internal_dim_multiplier * width // heads
    pairs = (tokens - 1) * (neurons + width)
    if tokens > blocked.STATE_FROM * width:
        pairs = (width - 1) * (neurons + width) + 4 * neurons * width
    forward = config.n_layer * heads * (6 * width * neurons + pairs) + 2 * width * config.vocab_size
    return 3.0 * forward


def _at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """Next token of each row.   logits: (B, V).   Returns (B, 1)."""
    if temperature < COLDEST:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    likelihood = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = likelihood.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        beyond[:, 0] = False
        likelihood = likelihood.masked_fill(beyond.scatter(-1, order, beyond), 0)
    return torch.multinomial(likelihood, 1, generator=generator)
