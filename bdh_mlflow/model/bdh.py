"""The BDH network: bytes in, next-byte logits out, under the published names.

One set of layer weights is applied `n_layer` times. The Python interface and the state dict are those of pathwaycom/bdh, so published
scripts and weights run here; how a layer is computed (`layer`, `blocked`) is an implementation choice, made by `BDH.use`. Does not know
where weights come from, in which number format the matmuls run, or that there is a training loop.

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
from bdh_mlflow.model import blocked, blocks, kernels, layer
from bdh_mlflow.model.fade import Fading
from bdh_mlflow.model.observed import Counts
from bdh_mlflow.model.recurrent import RecurrentState
from bdh_mlflow.model.rope import Rope, RopeTable, rope_at, seen_from
from bdh_mlflow.model.sampling import Sampler

__all__ = ["BDH", "BDHConfig"]

INIT_STD = 0.02  # pathwaycom/bdh, bdh.py
MAX_CACHED_ROPE_ELEMENTS = 2**26  # T * N of a RoPE table that is cached: 256 MiB in fp32, cos and sin together
STOPPED = -1  # stands for the tokens of a row after its stop sequence
PROJECTIONS = ("encoder", "encoder_v", "decoder")
"""Parameters that do nearly all the arithmetic; number formats apply to these."""

WeightView = Callable[[str, Tensor], Tensor]
Form = Literal["reference", "blocked"]


class BDH(nn.Module):
    """Baby Dragon Hatchling, the tensor formulation of the paper (BDH-GPU).

    Parameters: embed.weight (V, D), encoder and encoder_v (H, D, N), decoder (H * N, D), lm_head (D, V).   Buffer: attn.freqs (1, 1, 1, N).
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
        self.attn = Rope(self.neurons)
        self.fade = Fading(heads, config.attention_decay)

        self.weight_view: WeightView | None = None
        """What the layers use in place of a projection's parameter: (name, parameter) -> tensor; None = itself. Set by `precision`."""
        self.product: layer.Product = layer.plain_product
        """reference form: the function that multiplies by a projection. Set by `precision`."""
        self.recompute = False
        """reference form: recompute activations in the backward pass instead of keeping L layers of (B, H, T, N) tensors."""
        self.detach_state = False
        """Train without backpropagation through time: no gradient reaches earlier tokens. Values are the same."""
        self.use("reference")
        self._counts: Counts | None = None

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: RecurrentState | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits for the byte after each position and, given targets, their mean cross-entropy.

        idx, targets: (B, T) integer ids.   state: of the text before, and afterwards that of this text, too; in the blocked form no
        gradient comes through it.   Returns logits (B, T, V) and the loss in nats per token, fp32, or None.
        """
        if state is not None:
            state.expect(len(idx))
        logits = self._through_layers(self.embedded(idx), state).squeeze(1) @ self.lm_head
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(_at_least_float(logits).flatten(0, 1), targets.flatten().long())

    def initial_state(self, rows: int) -> RecurrentState:
        """Of a text that nothing has been read of yet.   rows: B."""
        like = self.decoder
        shape = rows, self.config.n_head, self.neurons, self.config.n_embd
        return RecurrentState(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(self.config.n_layer))

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
        probability.   generator: source of randomness, torch's global one if None.   Dropout is off. The cost of a token does not depend on
        how many tokens precede it.
        """
        new = list(self.stream(idx, max_new_tokens, Sampler(temperature, top_k, top_p), generator=generator))
        return torch.cat((idx, *new), dim=1) if new else idx

    @torch.no_grad()
    def stream(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        sampler: Sampler,
        *,
        stop: Sequence[int] = (),
        generator: torch.Generator | None = None,
        state: RecurrentState | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` one by one, each (B, 1), as they are generated.

        prompts: (B, T) ids, or B one-dimensional tensors of any lengths.   stop: sequence of ids that ends a row; the row's tokens after it
        are STOPPED, and the iteration ends when all rows have ended.   state: of B rows, of the text before the prompts; at the end that of
        all tokens but the last one generated.
        """
        rows = list(prompts)
        if not rows or any(row.shape[0] == 0 for row in rows):
            raise ValueError("generate needs a prompt of at least one token")
        if max_new_tokens < 1:
            return
        if state is not None:
            state.expect(len(rows))
        last, states = self._prefill(rows, state)
        weights = self._weights_by_neuron()
        position = torch.tensor([row.shape[0] for row in rows], device=last.device)
        generated: list[list[int]] = [[] for _ in rows]
        done = torch.zeros(len(rows), 1, dtype=torch.bool, device=last.device)
        token: Tensor | None = None
        for _ in range(max_new_tokens):
            if token is not None:
                table, fading = rope_at(position, self.attn.each), self.fade(1, last.device)
                last = self.embedded(token.clamp_min(0))[:, 0, 0]
                for each in states:
                    last = layer.recurrent_layer(last, weights, table, each, fading)
                position += 1
            token = sampler.draw(last @ self.lm_head, generator).masked_fill(done, STOPPED)
            yield token
            for row, ids in enumerate(generated) if stop else ():
                ids.append(int(token[row]))
                done[row] |= ids[-len(stop) :] == list(stop)
            if stop and done.all():
                break
        if state is not None:
            state.layers = [seen_from(each, position, self.attn.each) for each in states]

    def _prefill(self, prompts: list[Tensor], before: RecurrentState | None) -> tuple[Tensor, list[Tensor]]:
        """Output of the last layer at the last token of each prompt, (B, D), and the state of each layer after it, (B, H, N, D)."""
        weights, lengths = self.layer_weights(), [prompt.shape[0] for prompt in prompts]
        outs, states = self.embed.weight.new_empty(len(prompts), self.config.n_embd), self.initial_state(len(prompts)).layers
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            x = self.embedded(torch.stack([prompts[row] for row in rows]))
            arranged, table = blocks.arrange(weights, x.dtype, self._plan(x, x.dtype)), self.rope_by_neuron(length)
            for depth, state in enumerate(states):
                initial = None if before is None else before.layers[depth][rows]
                x, state[rows] = blocked.prefill(x, arranged, table, initial, self.fade(arranged.cut.chunk, x.device))
            outs[rows] = x[:, 0, -1]
        return outs, states

    def _weights_by_neuron(self) -> layer.LayerWeights:
        """As `layer.recurrent_layer` wants them: a row for each neuron in `encoder_v` and `decoder`."""
        encoder, encoder_v, decoder = self.layer_weights()
        return layer.LayerWeights(encoder, encoder_v.mT.contiguous(), decoder.view(encoder_v.mT.shape))

    @contextlib.contextmanager
    def observed(self, summed: Callable[[Tensor], Tensor] = lambda counts: counts) -> Iterator[dict[str, float]]:
        """Count active neurons in every forward pass in the body; the dict is filled at its end, unless it raises.

        summed: adds up float64 counts with those of other processes.

        Per layer i: `bdh/active_x_l{i}` and `bdh/active_xy_l{i}`, mean share of neurons that are not zero for a token, before and after
        the gate; `bdh/dead_x_l{i}` and `bdh/dead_xy_l{i}`, share of neurons that were zero for all of the counted tokens.
        """
        facts: dict[str, float] = {}
        counts = self._counts = Counts(self.config.n_layer, self.config.n_head, self.neurons, self.embed.weight.device)
        handle = self.register_forward_pre_hook(counts.begin)
        try:
            yield facts
        finally:
            handle.remove()
            self._counts = None
        facts |= counts.facts(summed)

    def use(self, form: Form, compiled: bool = False, plan: blocks.Plan | None = None) -> None:
        """Choose how layers are computed; the values are the same.

        reference: as published, several (B, H, T, N) tensors a layer.   blocked: see `blocked`.   compiled: let torch.compile fuse the
        whole layer (reference) or its elementwise passes (blocked, off the CPU; see `kernels`). Quantisation stays outside: bitsandbytes'
        kernels are not traced correctly (0.50.2).   plan: block sizes, for tests and measurements; None = by shape, dtype and device
        (`blocks.plan_blocks`). Prompts are read in blocks whatever the form.
        """
        self.form: Form = form
        self._fixed_plan = plan
        self._compiled = compiled
        self._layer = torch.compile(layer.carried_layer) if compiled and form == "reference" else layer.carried_layer

    def _through_layers(self, x: Tensor, state: RecurrentState | None) -> Tensor:
        """All layers.   x: (B, 1, T, D), normed.   Returns the same shape, normed."""
        weights = self.layer_weights()
        dropout = self.config.dropout if self.training else 0.0
        if self.form == "blocked":
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            arranged, table = blocks.arrange(weights, dtype, self._plan(x, dtype)), self.rope_by_neuron(x.shape[2])
        else:
            rope = self.attn.table(x.shape[2])
        for depth in range(self.config.n_layer):
            activity = self._counts.layers[depth] if self._counts else None
            before = None if state is None else state.layers[depth]
            if self.form == "blocked":
                options = blocked.Options(activity, depth == 0, self._compiled, self.detach_state, self.fade(arranged.cut.chunk, x.device))
                x, after = blocked.carried_layer(x, arranged, table, dropout, options, before)
            elif self.recompute and torch.is_grad_enabled():
                how = layer.LayerOptions(None, self.product, self.detach_state, self.fade(x.shape[2], x.device))
                x, after = checkpoint(self._layer, x, weights, rope, dropout, how, before, use_reentrant=False)
            else:
                how = layer.LayerOptions(activity, self.product, self.detach_state, self.fade(x.shape[2], x.device))
                x, after = self._layer(x, weights, rope, dropout, how, before)
            if state is not None and after is not None:
                state.layers[depth] = seen_from(after, x.shape[2], self.attn.each)
        return x

    def embedded(self, idx: Tensor) -> Tensor:
        """What the first layer is given.   idx: (B, T) ids.   Returns (B, 1, T, D), normed."""
        return layer.norm(self.embed(idx).unsqueeze(1))

    def layer_weights(self) -> layer.LayerWeights:
        """The projections as the layers compute with them: rounded where training is for 4-bit weights."""

        def viewed(name: str) -> Tensor:
            parameter: Tensor = getattr(self, name)
            return parameter if self.weight_view is None else self.weight_view(name, parameter)

        return layer.LayerWeights(*map(viewed, PROJECTIONS))

    def _plan(self, x: Tensor, dtype: torch.dtype) -> blocks.Plan:
        if self._fixed_plan:
            return self._fixed_plan
        one_chunk = self.config.attention_decay and torch.is_grad_enabled()  # see `blocked`
        width = max(x.shape[2:]) if one_chunk else x.shape[3]  # a text is cut where it is much longer than wide
        return blocks.plan_blocks(x.shape[0], x.shape[2], width, self.neurons, dtype, x.device)

    def rope_by_neuron(self, tokens: int) -> RopeTable | Tensor:
        """What the blocked form takes for T tokens: a table, kept for the next call, or the frequencies if it is too large to keep."""
        return self.attn.table(tokens, kernels.by_neuron) if tokens * self.neurons <= MAX_CACHED_ROPE_ELEMENTS else self.attn.each


def useful_flops(config: BDHConfig, tokens: int) -> float:
    """Floating-point operations that a training step must do for one token of a text of T; a multiplication and an addition are two.

    Forward, per token: 6 D H N a layer for the three projections; H (T - 1) (N + D) a layer for the causal half of the scores and their
    product with the values, or beyond T = 4 D, where the state form runs, H ((D - 1) (N + D) + 4 N D) for chunks of D tokens with a state;
    2 D V for the logits. Backward is twice that. Recomputation does not count as useful.
    """
    width, heads = config.n_embd, config.n_head
    neurons = config.mlp_internal_dim_multiplier * width // heads
    pairs = (tokens - 1) * (neurons + width)
    if tokens > blocks.STATE_FROM * width:
        pairs = (width - 1) * (neurons + width) + 4 * neurons * width
    forward = config.n_layer * heads * (6 * width * neurons + pairs) + 2 * width * config.vocab_size
    return 3.0 * forward


def _at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()
