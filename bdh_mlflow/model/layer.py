"""The BDH layer: its definition, for all tokens at once, and its recurrent form, for one token and a state.

The same layer, with the same weights, is applied at every depth. A token's vector (D) activates a sparse set of N neurons in each of H
heads (`encoder`, ReLU). Linear attention with keys = queries, both the rotated activations, sums the vectors of earlier tokens. Its
result, normed, activates neurons again (`encoder_v`, ReLU); the product of the two activations, a gate, is projected back to D
(`decoder`) and added to the residual. `reference_layer` computes this as written; `recurrent_layer` keeps the sum over earlier tokens in a
state (N, D) per head. `blocked` computes the same values for training with less memory.

B rows, T tokens, D n_embd, H n_head, N neurons per head. Knows parameters only as tensors it is given.
Source: arXiv:2509.26507; pathwaycom/bdh, bdh.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_mlflow.model.fade import Fade
from bdh_mlflow.model.rope import RopeTable, rotate

ACTIVITY_STRIDE = 64  # tokens; active neurons are counted at every 64th, well under 1 % of a forward pass
SPARSE_BELOW_SHARE = 0.25  # of active neurons, for indexed reads; on the CPU measured they cost as much as dense ones at 0.33 to 0.5


class LayerWeights(NamedTuple):
    """The three projections as the layer uses them, after any quantisation.

    encoder: (H, D, N).   encoder_v: (H, D, N).   decoder: (H * N, D).
    """

    encoder: Tensor
    encoder_v: Tensor
    decoder: Tensor


Product = Callable[[str, Tensor, Tensor], Tensor]
"""(name, x, weight) -> x @ weight for a projection, named as in LayerWeights. Other number formats replace `plain_product`."""


class Activity(NamedTuple):
    """How often each neuron was active in a layer.   x: the first activations; xy: after the gate.   Both (H, N), tokens counted, fp32.

    Every `ACTIVITY_STRIDE`-th token of a text is counted.
    """

    x: Tensor
    xy: Tensor


def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without gain or bias, in fp32 at least."""
    return F.layer_norm(x if x.dtype is torch.float64 else x.float(), x.shape[-1:])


def attend(
    q: Tensor, v: Tensor, detach: bool = False, initial_state: Tensor | None = None, fade: Fade | None = None
) -> tuple[Tensor, Tensor | None]:
    """Strictly causal linear attention with keys equal to queries.

    out[t] = q[t] initial_state + sum over s < t of <q[t], q[s]> v[s]. The diagonal is excluded: without an initial state out[0] is exactly
    zero.   detach: no gradient reaches the keys and values, so none reaches earlier tokens: the state is taken as it is, without
    backpropagation through time.   q: (B, H, T, N), sparse activations after rotation.   v: (B, 1, T, D), shared by all heads.
    initial_state: (B, H, N, D), the sum of q[s] v[s]^T over the text before.   fade: of scores with distance, for T tokens.
    Returns (B, H, T, D) and, given an initial state, that sum after the last token.
    Cost: 2 T^2 (N + D) FLOPs per head and T^2 scores, against 4 T N D and an (N, D) state for the recurrent form.
    """
    keys, values = (q.detach(), v.detach()) if detach else (q, v)
    scores = (q @ keys.mT).tril(diagonal=-1)
    attended = (scores if fade is None else scores * fade.scores) @ values
    if initial_state is None:
        return attended, None
    if fade is None:
        return attended + q @ initial_state, initial_state + keys.mT @ values
    tokens = q.shape[2]
    kept, added = fade.over(tokens) * initial_state, keys.mT @ (fade.written(tokens) * values)
    return attended + fade.read(tokens) * (q @ initial_state), kept + added


def plain_product(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, in the dtype of the tensors or of autocast."""
    return x @ weight


class LayerOptions(NamedTuple):
    """activity: added to, if given.   product: multiplies by the projections.   detach, fade: see `attend`."""

    activity: Activity | None = None
    product: Product = plain_product
    detach: bool = False
    fade: Fade | None = None


PLAIN = LayerOptions()


def reference_layer(x: Tensor, weights: LayerWeights, table: RopeTable, dropout: float, options: LayerOptions = PLAIN) -> Tensor:
    """`carried_layer` for a text that begins and ends here."""
    return carried_layer(x, weights, table, dropout, options)[0]


def carried_layer(
    x: Tensor,
    weights: LayerWeights,
    table: RopeTable,
    dropout: float,
    options: LayerOptions = PLAIN,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One layer, equation by equation: the definition every other form is tested against.

    x: (B, 1, T, D), normed.   table: T positions.   dropout: probability, 0 outside training.   initial_state: (B, H, N, D), of the text
    before, as seen from position 0.   Returns (B, 1, T, D), normed, and, given an initial state, the one after the last token, still seen
    from position 0.   Holds several (B, H, T, N) tensors at a time.
    """
    activity, product, detach, fade = options
    xs = F.relu(product("encoder", x, weights.encoder))
    attended, final_state = attend(rotate(xs, table), x, detach, initial_state, fade)
    ys = F.relu(product("encoder_v", norm(attended), weights.encoder_v))
    gated = xs * ys
    if activity is not None:
        for total, neurons in ((activity.x, xs), (activity.xy, gated)):
            total += (neurons[:, :, ::ACTIVITY_STRIDE] > 0).sum(dim=(0, 2))
    xy = F.dropout(gated, dropout)
    read = product("decoder", xy.transpose(1, 2).flatten(2).unsqueeze(1), weights.decoder)
    return norm(x + norm(read)), final_state


def recurrent_layer(x: Tensor, weights: LayerWeights, table: RopeTable, state: Tensor, fade: Fade | None = None) -> Tensor:
    """One layer for one more token of each row, at a cost that does not depend on how many came before.

    x: (B, D), normed.   weights: `encoder_v` and `decoder` with a row for each neuron, (H, N, D).   table: (B, N / 2), a position a row.
    state: (B, H, N, D), sum over earlier tokens of q[s] v[s]^T; updated in place.   fade: of it, with each token.   Returns (B, D), normed.

    On a CPU the rows of inactive neurons are skipped: never read from the state or `decoder`; neither written to the state nor read from
    `encoder_v` while fewer than SPARSE_BELOW_SHARE of the neurons are active.
    """
    batch, heads = x.shape[0], weights.encoder.shape[0]
    xs = F.relu(torch.matmul(x, weights.encoder)).transpose(0, 1)
    q = rotate(xs, RopeTable(table.cos.unsqueeze(1), table.sin.unsqueeze(1))).to(state.dtype)
    read = torch.zeros_like(x)
    for row in range(batch):
        for head in range(heads):
            keys, memory, value = q[row, head], state[row, head], x[row].to(state.dtype)
            active = _active(keys)
            attended = norm(_combined(keys, memory, active)).to(x.dtype)
            if active is not None and len(active) < SPARSE_BELOW_SHARE * len(keys):
                memory.index_add_(0, active, torch.outer(keys[active], value))
            else:
                memory.addr_(keys, value)
            if fade is not None:
                memory.mul_(fade.powers[head, 1])
            neurons = xs[row, head]
            if not neurons.is_cuda and int(neurons.count_nonzero()) < SPARSE_BELOW_SHARE * len(neurons):
                active = neurons.nonzero().squeeze(1)
                gated = torch.zeros_like(neurons)
                gated[active] = F.relu(weights.encoder_v[head].index_select(0, active) @ attended) * neurons[active]
            else:
                gated = F.relu(weights.encoder_v[head] @ attended) * neurons
            read[row] += _combined(gated, weights.decoder[head], _active(gated))
    return norm(x + norm(read))


def _active(neurons: Tensor) -> Tensor | None:
    """Indices of those that are not zero.   neurons: (N,).   None on CUDA, where finding them means waiting for the device."""
    return None if neurons.is_cuda else neurons.nonzero().squeeze(1)


def _combined(factors: Tensor, rows: Tensor, which: Tensor | None) -> Tensor:
    """factors @ rows, reading only the rows `which`, in two halves for two cores.   factors: (N,), zero elsewhere.   rows: (N, D)."""
    if which is None:
        return factors @ rows
    halves = torch.tensor([0, len(which) // 2])
    return F.embedding_bag(which, rows, halves, mode="sum", per_sample_weights=factors[which]).sum(dim=0)
