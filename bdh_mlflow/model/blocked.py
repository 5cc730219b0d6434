"""The BDH layer for training: the reference's values in blocks, without a (B, H, T, N) tensor.

One autograd operation a layer. It works through blocks of some rows, one head and some neurons; scores and what neurons read are summed
over the blocks, and what is kept for the backward pass grows with T * D: there neurons are lit again. Scores are computed at and below
the diagonal only. Keys are queries, so their gradient is one product with dS + dS^T. Beyond T = 4 D attention runs by chunks that hand a
state (N, D) on, and the cost of a token stops growing with T; the backward pass walks the chunks back and takes each one's share out of
the state again instead of keeping states.

In each block of neurons the even ones stand before the odd ones, so that a rotation works on two contiguous halves; no sum over neurons
notices. B rows, T tokens, D n_embd, H n_head, N neurons per head, R rows of a block, M neurons of a block, S tokens of a span, C tokens of
a chunk (S a multiple of C). Knows parameters only as tensors it is given. Source: arXiv:2509.26507, and `layer` for the definition.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh_mlflow.model.layer import ACTIVITY_STRIDE, Activity, LayerWeights, RopeTable, norm, rope_table

STATE_FROM = 4  # times D: from this many tokens on, a state costs less than all pairs
BLOCK_TOKENS = {"cpu": 2**9, "cuda": 2**15}
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
"""Tokens, and tokens times neurons, of a block: on a CPU what the cores' caches hold, on CUDA what fills the GPU."""
DIAGONAL = 128  # tokens of the steps in which scores follow the diagonal


class Plan(NamedTuple):
    """How a (B, T) batch is cut.   rows, span, neurons: of a block.   chunk: tokens that attend to each other directly."""

    rows: int
    span: int
    chunk: int
    neurons: int

    def blocks(self, batch: int, heads: int) -> Iterator[tuple[int, int, slice]]:
        """Number, head and rows of each pass through tokens and neurons."""
        groups = range(0, batch, self.rows)
        for head in range(heads):
            for group, first in enumerate(groups):
                yield head * len(groups) + group, head, slice(first, min(first + self.rows, batch))


def plan(batch: int, tokens: int, width: int, neurons: int, device: torch.device) -> Plan:
    """Block sizes for T tokens in B rows of width D and N neurons a head."""
    chunk = span = max(1, tokens)
    if tokens > STATE_FROM * width:
        chunk = -(-width // ACTIVITY_STRIDE) * ACTIVITY_STRIDE
        span = STATE_FROM * chunk
    rows = max(1, min(batch, BLOCK_TOKENS.get(device.type, BLOCK_TOKENS["cpu"]) // span))
    block = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"]) // (rows * span) // 2 * 2
    return Plan(rows, span, chunk, max(2, min(block, neurons)))


class Arranged(NamedTuple):
    """Projections as the blocks read them.

    encoder, encoder_v: (H, D, N).   decoder: (H, N, D).   All with even neurons first in each block, in the parameters' dtype and with
    their gradients.   compute: the same three in the dtype of the matmuls, detached.   cut: the blocks.
    """

    encoder: Tensor
    encoder_v: Tensor
    decoder: Tensor
    compute: tuple[Tensor, Tensor, Tensor]
    cut: Plan


def arrange(weights: LayerWeights, dtype: torch.dtype, cut: Plan) -> Arranged:
    """Once per forward pass: neurons in the order of the blocks, and a copy in the dtype of the matmuls."""
    encoder, encoder_v = (_halved(w, -1, cut.neurons) for w in weights[:2])
    decoder = _halved(weights.decoder.view(encoder.mT.shape), -2, cut.neurons)
    return Arranged(
        encoder, encoder_v, decoder, (encoder.detach().to(dtype), encoder_v.detach().to(dtype), decoder.detach().to(dtype)), cut
    )


def blocked_layer(
    x: Tensor, weights: Arranged, table: RopeTable | None, dropout: float, activity: Activity | None = None, compiled: bool = False
) -> Tensor:
    """One layer; values and gradients of `layer.reference_layer`.

    x: (B, 1, T, D), normed.   weights: arranged by a plan for B and T.   table: T positions; None to make it span by span.   dropout:
    probability, 0 outside training; its seed is drawn from torch's global CPU generator.   activity: added to, if given.   compiled: fuse
    elementwise work by torch.compile.   Returns (B, 1, T, D), normed; differentiable once.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout else 0
    task = _Task(x.squeeze(1), weights.compute, table, weights.cut, _kernels(compiled), dropout, seed)
    out: Tensor = _Blocked.apply(task.x, *weights[:3], task, activity)  # type: ignore[no-untyped-call]
    return out.unsqueeze(1)


@torch.no_grad()
def prefill(x: Tensor, weights: Arranged, table: RopeTable | None) -> tuple[Tensor, Tensor]:
    """One layer over a prompt, and the state from which generation goes on.

    x: (B, 1, T, D), normed.   Returns the layer's output, the same shape, and `layer.recurrent_layer`'s state (B, H, N, D) after T tokens.
    """
    task = _Task(x.squeeze(1), weights.compute, table, weights.cut, _kernels(False))
    done = _forward(task, None, keep_scores=False, hand_on=True)
    assert done.states is not None
    return _residual(task.x, done.read).unsqueeze(1), _paired(done.states, -2, weights.cut.neurons)


def keep_mask(shape: tuple[int, ...], dropout: float, seed: int, like: Tensor) -> Tensor:
    """What dropout multiplies neurons by: 0 or 1 / (1 - dropout), the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed % 2**63)
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class _Task(NamedTuple):
    """What a layer is to do.   x: (B, T, D)."""

    x: Tensor
    compute: tuple[Tensor, Tensor, Tensor]
    table: RopeTable | None
    cut: Plan
    kernels: "_Kernels"
    dropout: float = 0.0
    seed: int = 0

    @property
    def last_chunk(self) -> int:
        """Where the last chunk begins."""
        return (self.x.shape[1] - 1) // self.cut.chunk * self.cut.chunk

    def turns(self, start: int, stop: int) -> RopeTable:
        """Of a span."""
        if self.table is None:
            return rope_table(start, stop, self.compute[0].shape[2], self.x.device)
        return RopeTable(self.table.cos[start:stop], self.table.sin[start:stop])

    def mask(self, block: int, start: int, first: int, like: Tensor) -> Tensor:
        """Of the neurons from `first` on, for the tokens from `start` on."""
        place = (block * self.x.shape[1] + start) * self.compute[0].shape[2] + first
        return keep_mask(tuple(like.shape), self.dropout, self.seed + place, like)


class _Pass(NamedTuple):
    """What a forward pass leaves.

    read: (B, T, D), sum over heads.   attended: (B, H, T, D).   scores: (B, H, T, C) if kept.   states: (B, H, N, D), what the last chunk
    was handed, or what it hands on; None where there is none.
    """

    read: Tensor
    attended: Tensor
    scores: Tensor | None
    states: Tensor | None


def _forward(task: _Task, activity: Activity | None, keep_scores: bool, hand_on: bool) -> _Pass:
    """hand_on: make the state after the last token too."""
    x, (to_x, to_y, to_out), _, cut, kernels = task[:5]
    batch, tokens, width = x.shape
    heads, _, neurons = to_x.shape
    dtype = to_x.dtype
    values = x.to(dtype)
    attended = values.new_empty(batch, heads, tokens, width)
    scores = values.new_empty(batch, heads, tokens, cut.chunk) if keep_scores else None
    last = tokens if hand_on else task.last_chunk
    states = x.new_empty(batch, heads, neurons, width) if last else None
    read = torch.zeros_like(x)
    work = _Buffers(task, 2)
    for block, head, rows in cut.blocks(batch, heads):
        state = states[rows, head].zero_() if states is not None else None
        for start, stop in _ranges(0, tokens, cut.span):
            v, table = values[rows, start:stop].contiguous(), task.turns(start, stop)
            chunks = [(slice(begin - start, end - start), begin) for begin, end in _ranges(start, stop, cut.chunk)]
            pairs = [x.new_zeros(v.shape[0], inside.stop - inside.start, inside.stop - inside.start) for inside, _ in chunks]
            found = torch.zeros_like(v, dtype=x.dtype)
            for first, end in _ranges(0, neurons, cut.neurons):
                xs, q = work.lit(v, first, end), work.of(0, v, end - first)
                torch.matmul(v, to_x[head, :, first:end], out=xs)
                kernels.light(xs, q, *_turns(table, first, end))
                for (inside, begin), sums in zip(chunks, pairs, strict=True):
                    queries = q[:, inside]
                    _add_causal(sums, queries)
                    if state is not None and begin:
                        _add_product(found[:, inside], queries, state[:, first:end].to(dtype))
                    if state is not None and begin < last:
                        _add_product(state[:, first:end], queries.mT, v[:, inside])
            for (inside, begin), sums in zip(chunks, pairs, strict=True):
                causal = sums.tril_(-1).to(dtype)
                _add_product(found[:, inside], causal, v[:, inside])
                if scores is not None:
                    scores[rows, head, begin : begin + causal.shape[1], : causal.shape[1]] = causal
            attended[rows, head, start:stop] = found
            asked = norm(attended[rows, head, start:stop]).to(dtype)
            said = torch.zeros_like(found)
            for first, end in _ranges(0, neurons, cut.neurons):
                xs, ys = work.lit(v, first, end), work.of(1, v, end - first)
                torch.matmul(asked, to_y[head, :, first:end], out=ys)
                if activity is not None:
                    lit = xs[:, ::ACTIVITY_STRIDE] > 0
                    both = lit & (ys[:, ::ACTIVITY_STRIDE] > 0)
                    for total, seen in zip(activity, (lit, both), strict=True):
                        total[head, first:end] += _paired(seen.sum(dim=(0, 1)), -1, end - first)
                kernels.gate(ys, xs)
                if task.dropout:
                    ys *= task.mask(block, start, first, ys)
                _add_product(_flat(said), _flat(ys), to_out[head, first:end])
            read[rows, start:stop] += said
    return _Pass(read, attended, scores, states)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, encoder_v: Tensor, decoder: Tensor, task: _Task, activity: Activity | None) -> Tensor:
        done = _forward(task, activity, keep_scores=any(ctx.needs_input_grad), hand_on=False)
        ctx.save_for_backward(*done, task.x, *task.compute)
        ctx.rest = task[2:]  # no weights and activations: those are freed by the backward pass, this is not
        return _residual(x, done.read)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, attended, scores, states, x, to_x, to_y, to_out = ctx.saved_tensors
        task = _Task(x, (to_x, to_y, to_out), *ctx.rest)
        cut, kernels = task.cut, task.kernels
        batch, tokens, _ = x.shape
        heads, _, neurons = to_x.shape
        dtype, last = to_x.dtype, task.last_chunk
        values = x.to(dtype)
        d_x, d_read = _pull_back(_residual, grad, x, read)
        d_out = d_read.to(dtype)
        d_to_x, d_to_y, d_to_out = (torch.zeros_like(w, dtype=x.dtype) for w in (to_x, to_y, to_out))
        work = _Buffers(task, 2)
        shares = _Buffers(task, 0)  # of the gradients of neurons: what comes by the gate
        for block, head, rows in cut.blocks(batch, heads):
            state = states[rows, head].clone() if states is not None else None
            d_state = torch.zeros_like(state) if state is not None else None
            for start, stop in reversed(list(_ranges(0, tokens, cut.span))):
                v, d = (t[rows, start:stop].contiguous() for t in (values, d_out))
                table = task.turns(start, stop)
                found = attended[rows, head, start:stop]
                asked = norm(found).to(dtype)
                d_asked = torch.zeros_like(v, dtype=x.dtype)
                for first, end in _ranges(0, neurons, cut.neurons):
                    xs, d_xs = work.lit(v, first, end), shares.lit(v, first, end)
                    ys, d_xy = (work.of(i, v, end - first) for i in (0, 1))
                    torch.matmul(v, to_x[head, :, first:end], out=xs)
                    torch.matmul(asked, to_y[head, :, first:end], out=ys)
                    torch.matmul(d, to_out[head, first:end].mT, out=d_xy)
                    mask = task.mask(block, start, first, ys) if task.dropout else None
                    if mask is not None:
                        d_xy *= mask
                    kernels.gate_backward(xs, ys, d_xy, d_xs)  # ys becomes xy, d_xy becomes d_ys
                    if mask is not None:
                        ys *= mask
                    _add_product(d_to_out[head, first:end], _flat(ys).mT, _flat(d))
                    _add_product(d_to_y[head, :, first:end], _flat(asked).mT, _flat(d_xy))
                    _add_product(_flat(d_asked), _flat(d_xy), to_y[head, :, first:end].mT)
                (d_found,) = _pull_back(norm, d_asked, found)
                d_found = d_found.to(dtype)
                d_v = torch.zeros_like(v, dtype=x.dtype)
                chunks = []
                for begin, end in reversed(list(_ranges(start, stop, cut.chunk))):
                    inside = slice(begin - start, end - start)
                    d_here = d_found[:, inside]
                    d_pairs = (d_here @ v[:, inside].mT).tril_(-1)
                    chunks.append((inside, begin, d_pairs + d_pairs.mT))
                    _add_product(d_v[:, inside], scores[rows, head, begin:end, : end - begin].mT, d_here)
                for first, end in _ranges(0, neurons, cut.neurons):
                    xs, d_xs = work.lit(v, first, end), shares.lit(v, first, end)
                    q, d_q = (work.of(i, v, end - first) for i in (0, 1))
                    turns = _turns(table, first, end)
                    kernels.light(xs, q, *turns)
                    for inside, begin, d_both in chunks:
                        queries = q[:, inside]
                        torch.matmul(d_both, queries, out=d_q[:, inside])
                        if state is None or d_state is None:
                            continue
                        part, d_part = state[:, first:end], d_state[:, first:end]
                        if begin < last:
                            d_into = d_part.to(dtype)
                            _add_product(d_q[:, inside], v[:, inside], d_into.mT)
                            _add_product(d_v[:, inside], queries, d_into)
                            _add_product(part, queries.mT, v[:, inside], -1)
                        if begin:
                            _add_product(d_q[:, inside], d_found[:, inside], part.to(dtype).mT)
                            _add_product(d_part, queries.mT, d_found[:, inside])
                    kernels.light_backward(d_q, d_xs, xs, *turns)
                    _add_product(d_to_x[head, :, first:end], _flat(v).mT, _flat(d_xs))
                    _add_product(_flat(d_v), _flat(d_xs), to_x[head, :, first:end].mT)
                d_x[rows, start:stop] += d_v
        return d_x, d_to_x, d_to_y, d_to_out, None, None


class _Buffers:
    """Room for neurons, used again and again: all neurons of a head for the tokens of a block, and `count` blocks."""

    def __init__(self, task: _Task, count: int) -> None:
        neurons = task.compute[0].shape[2]
        tokens = task.cut.rows * min(task.cut.span, task.x.shape[1])
        self._lit = task.compute[0].new_empty(tokens * neurons)
        self._blocks = [self._lit.new_empty(tokens * task.cut.neurons) for _ in range(count)]

    def lit(self, like: Tensor, first: int, end: int) -> Tensor:
        """(R, S, M): neurons first <= n < end of a head, for the tokens of `like` (R, S, D)."""
        tokens = like.shape[0] * like.shape[1]
        return self._lit[tokens * first : tokens * end].view(*like.shape[:2], end - first)

    def of(self, which: int, like: Tensor, neurons: int) -> Tensor:
        """(R, S, M), for the tokens of `like`."""
        return self._blocks[which][: like.shape[0] * like.shape[1] * neurons].view(*like.shape[:2], neurons)


class _Kernels(NamedTuple):
    """The elementwise passes over neurons; each works in place on (R, S, M) buffers."""

    light: Callable[..., None]
    gate: Callable[..., None]
    gate_backward: Callable[..., None]
    light_backward: Callable[..., None]


def _light(xs: Tensor, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """xs: pre-activations, becomes neurons.   q: becomes neurons turned by their position."""
    xs.relu_()
    (even, odd), (q_even, q_odd) = xs.chunk(2, -1), q.chunk(2, -1)
    _into(q_even, even, cos, odd, sin, -1)
    _into(q_odd, odd, cos, even, sin, 1)


def _gate(ys: Tensor, xs: Tensor) -> None:
    """ys: pre-activations, becomes what both have lit."""
    ys.relu_().mul_(xs)


def _gate_backward(xs: Tensor, ys: Tensor, d_xy: Tensor, d_xs: Tensor) -> None:
    """xs: pre-activations, becomes neurons.   ys: pre-activations, becomes xy.   d_xy: becomes d_ys.   d_xs: becomes the gate's share."""
    xs.relu_()
    ys.relu_()
    torch.mul(d_xy, ys, out=d_xs)
    _where_lit_(d_xy.mul_(xs), ys)
    ys.mul_(xs)


def _light_backward(d_q: Tensor, d_xs: Tensor, xs: Tensor, cos: Tensor, sin: Tensor) -> None:
    """d_xs: the gate's share, becomes the gradient of the pre-activations."""
    (even, odd), (d_even, d_odd) = d_q.chunk(2, -1), d_xs.chunk(2, -1)
    _add_into(d_even, even, cos, odd, sin, 1)
    _add_into(d_odd, odd, cos, even, sin, -1)
    _where_lit_(d_xs, xs)


def _into(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out = a * b + sign * c * d, rounded once."""
    if out.dtype == b.dtype and not torch.compiler.is_compiling():  # it would not trace an `out` with gaps
        torch.mul(a, b, out=out).addcmul_(c, d, value=sign)
    else:
        out.copy_((a * b).addcmul_(c, d, value=sign))


def _add_into(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out += a * b + sign * c * d, rounded once."""
    if out.dtype == b.dtype:
        out.addcmul_(a, b).addcmul_(c, d, value=sign)
    else:
        out.copy_((a * b).addcmul_(c, d, value=sign).add_(out))


def _where_lit_(grad: Tensor, neurons: Tensor) -> None:
    """Gradients of a ReLU, in place."""
    torch.ops.aten.threshold_backward.grad_input(grad, neurons, 0, grad_input=grad)


@functools.cache
def _kernels(compiled: bool) -> _Kernels:
    wrap = functools.partial(torch.compile, dynamic=True) if compiled else lambda kernel: kernel
    return _Kernels(*(wrap(kernel) for kernel in (_light, _gate, _gate_backward, _light_backward)))


def _turns(table: RopeTable, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Of the neurons first <= n < end."""
    return table.cos[:, first // 2 : end // 2], table.sin[:, first // 2 : end // 2]


def _add_causal(sums: Tensor, queries: Tensor) -> None:
    """Add the products of each token with those before it, and some others.   sums: (R, C, C).   queries: (R, C, M)."""
    for start, stop in _ranges(0, queries.shape[1], DIAGONAL):
        _add_product(sums[:, start:stop, :stop], queries[:, start:stop], queries[:, :stop].mT)


def _residual(x: Tensor, read: Tensor) -> Tensor:
    return norm(x + norm(read))


def _pull_back(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs of a small function."""
    with torch.enable_grad():
        leaves = [t.detach().to(grad.dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: int = 1) -> None:
    """total += factor * left @ right; where total is wider than the factors, the sum is made in its dtype."""
    if total.dtype == left.dtype:
        (total.addmm_ if total.dim() == 2 else total.baddbmm_)(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)


def _flat(t: Tensor) -> Tensor:
    """(R, S, ...) -> (R * S, ...), the same memory."""
    return t.view(-1, t.shape[-1])


def _halved(t: Tensor, dim: int, block: int) -> Tensor:
    """Even neurons before odd ones in each block.   dim: that of the neurons, counted from the end."""
    return _swapped(t, dim, block, lambda size: (size // 2, 2))


def _paired(t: Tensor, dim: int, block: int) -> Tensor:
    """The order of the parameters again."""
    return _swapped(t, dim, block, lambda size: (2, size // 2))


def _swapped(t: Tensor, dim: int, block: int, sides: Callable[[int], tuple[int, int]]) -> Tensor:
    """Each block of a dimension read as a matrix with these sides, and transposed; the last block may be shorter."""
    size = t.shape[dim]
    whole = size // block * block
    parts = []
    for part, one in ((t.narrow(dim, 0, whole), block), (t.narrow(dim, whole, size - whole), size - whole)):
        if one:
            shape = (*part.shape[:dim], part.shape[dim] // one, *sides(one), *part.shape[dim:][1:])
            parts.append(part.reshape(shape).transpose(dim - 1, dim).flatten(dim - 2, dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
