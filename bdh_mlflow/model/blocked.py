"""The BDH layer for training: values and gradients of `layer.reference_layer`, in blocks, without a (B, H, T, N) tensor.

One autograd operation a layer, with a backward pass derived by hand below. It visits blocks of some rows, one head and some neurons, sums
scores and outputs over the blocks, and keeps for the backward pass vectors (T * D) and scores; activations (T * N) are recomputed there.
Beyond T = 4 D attention runs by chunks with a state (N, D), and the cost of a token stops growing with T. Knows parameters only as tensors
it is given; `blocks` decides the sizes, `kernels` holds the elementwise passes. Source: arXiv:2509.26507; pathwaycom/bdh, bdh.py.


Notation
--------
B rows, T tokens, D n_embd, H n_head, N neurons per head. A block has R rows, S tokens (a span) and M neurons; a chunk has C tokens, S is a
multiple of C. The equations below are for one row and, up to P, for one head, whose weights are

    E = encoder[h] (D, N)      F = encoder_v[h] (D, N)      G = decoder[h] (N, D).

A prefix d is the gradient of the loss: dX has the shape of X. `o` is the elementwise product, [A > 0] is 1 where A is positive and else 0.
norm is LayerNorm over D without gain and bias; for y = norm(u), with r = 1 / sqrt(variance(u) + eps),

    norm'(u, g) = r (g - mean(g) - y o mean(g o y))                  the gradient of u, given g = dy; means over D.


Forward pass
------------
    1   A  = relu(X E)                   (T, N)   sparse activations; X (T, D) is the layer's input, normed
    2   Q  = rope(A)                     (T, N)   row t: neurons 2i and 2i + 1 rotated by the angle t theta^(-2i/N)
    3   S  = tril(Q Q^T, -1)             (T, T)   scores: keys are the queries; a token does not attend to itself
    4   Y  = S X                         (T, D)   values are X, the same for all heads
    5   Z  = norm(Y)                     (T, D)
    6   Bv = relu(Z F)                   (T, N)   the second activations
    7   P  = K o A o Bv                  (T, N)   the gate; K is the dropout mask, 0 or 1 / (1 - p); the factor is applied to O and dO
    8   O  = sum over heads of P G       (T, D)
    9   X' = norm(X + norm(O))           (T, D)   the layer's output


Backward pass, given dX'
------------------------
    9'  U = X + norm(O):  dU = norm'(U, dX'),  dX = dU,  dO = norm'(O, dU)           dO is the same for every head, as O sums over them
    8'  dG  = P^T dO                                                       (N, D)
        dP  = K o (dO G^T)                                                 (T, N)    already multiplied by the mask of 7
    7'  dA  = dP o Bv                                                      (T, N)    through the gate; 2' adds to it
        dBv = dP o A                                                       (T, N)
    6'  dW  = dBv o [Bv > 0],  dF = Z^T dW,  dZ = dW F^T                             W = Z F are the pre-activations
    5'  dY  = norm'(Y, dZ)                                                 (T, D)
    4'  dS  = tril(dY X^T, -1),  dX += S^T dY                              (T, T)    only s < t ever entered the loss
    3'  dQ  = (dS + dS^T) Q                                                (T, N)
    2'  dA += rope^T(dQ)                                                   (T, N)    rotated back: the same angles, sines negated
    1'  dL  = dA o [A > 0],  dE = X^T dL,  dX += dL E^T                              L = X E are the pre-activations

3' in words: S_ts = <q_t, q_s> for s < t, so q_t appears as a query in row t and as a key in column t of S. Its gradient is
sum_{s<t} dS_ts q_s + sum_{u>t} dS_ut q_u, which is row t of (dS + dS^T) Q. dS is strictly lower triangular, so the sum of the two is a
symmetric matrix with a zero diagonal, and queries and keys cost one product (T, T) x (T, N) together instead of one each.


Long texts: chunks and a state (T > 4 D)
----------------------------------------
Chunk k has rows X_k (C, D) and Q_k (C, N). All tokens before it are summed in a state H_k (N, D), with H_0 = 0:

    4c   Y_k = S_kk X_k + Q_k H_k,   S_kk = tril(Q_k Q_k^T, -1)
         H_{k+1} = H_k + Q_k^T X_k

Backwards, from the last chunk to the first. Nothing reads the state after the last chunk, so its gradient there is zero, and

    3''  dQ_k  = (dS_kk + dS_kk^T) Q_k + X_k dH_{k+1}^T + dY_k H_k^T          (C, N)
         dX_k += S_kk^T dY_k + Q_k dH_{k+1}                                  (C, D)
         dH_k  = dH_{k+1} + Q_k^T dY_k                                       (N, D)
         H_k   = H_{k+1} - Q_k^T X_k                                         (N, D)

Without backpropagation through time (`detach`) keys, values and states are constants: 3' is dQ = dS Q, 4' adds nothing to dX, and of 3''
dY_k H_k^T alone is left.

The last line of 3'' undoes the forward pass: each chunk's contribution is subtracted from the state again, so that one state is kept,
the one that the last chunk read, instead of T / C of them. States are summed in the dtype of x (float32 in training); subtracting
leaves rounding errors of its epsilon times the largest state.

Attention that fades (`fade`) multiplies S, and so dS, by p^(t - s), p = exp(-rate) of the head; it reads p^t Q_t H, and the state after C
tokens is p^C H + sum over t of p^(C - t) q_t x_t^T, t counted from the chunk's start. Undoing that would divide by p^C, so a text whose
gradients are wanted is one chunk.

A text that goes on where another ended has the state of that one for H_0, a constant: truncated backpropagation. It is read from the first
chunk on, the last chunk is added to it for the text that follows, and 3'' has dY_0 H_0^T in its first line. The loss does not depend on the
state after the last chunk, so its gradient stays zero.


What is kept, what is recomputed
--------------------------------
Kept a layer, in elements: X and O, 2 B T D; Y, B H T D; S, B H T C (C = T up to 4 D); for long texts one state, B H N D. Dropout keeps its
seed. X' of a layer is X of the next and counts once. Recomputed: A, Bv (two of the three projections), Q, Z, the mask and the gate.
Working memory, reused by all blocks: R S (N + 2 M) activations forward, R S (2 N + 2 M) backward, and R S C scores.

The default network (H 4, N 8192, D 256) at B 8, T 512 in float32 keeps 14.7 million elements a layer, 59 MB. The reference form keeps
about eight (B, H, T, N) tensors: 1.07 billion elements, 4.3 GB. Recomputing there (torch.utils.checkpoint) keeps X alone, but needs those
4.3 GB while the backward pass of the layer runs.


FLOPs
-----
A multiplication and an addition are two. For one layer, row and head; elementwise work is left out. c = 128 is `kernels.CAUSAL_STEP`:
scores are computed in steps of c tokens, each against the tokens up to its end, T (T + c) N FLOPs instead of the square's 2 T^2 N.

                                       forward                          backward
    reference                          6 T N D + 2 T^2 (N + D)          12 T N D + 4 T^2 (N + D)
    reference, recomputed              the same                         18 T N D + 6 T^2 (N + D)
    blocked, T <= 4 D                  6 T N D + T (T + c) N + 2 T^2 D  16 T N D + 2 T^2 N + 4 T^2 D
    blocked by chunks, about           10 T N D + T (C + c) N + 2 T C D 26 T N D + 2 T C N + 4 T C D

Backward, blocked: 4 T N D to recompute X E and Z F, 12 T N D for 8', 6' and 1' (two products each), 4 T^2 D for 4', 2 T^2 N for 3'. By
chunks the state adds 4 T N D forward (read, added to) and 10 T N D backward (five products in 3''). Both passes together, blocked needs
fewer FLOPs than the reference without recomputation from T = (4 D + c) / 3 on. Where N is much larger than D, chunks of C = D need fewer
than all pairs from T = 5.7 D on, and in the forward pass alone, as for a prompt, from T = 5 D on.

Activations stand neuron by neuron, so in memory A is A^T (N, R S) with the tokens of a block's rows side by side, E is E^T (N, D) and so
is its gradient: no product has to reorder an operand (`kernels`). tests/model/test_blocked.py checks values, gradients, masks, memory and
FLOPs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh_mlflow.model.blocks import Arranged, Projections, Span, Sums, Task
from bdh_mlflow.model.fade import Fade
from bdh_mlflow.model.kernels import add_causal_scores, add_product, by_row, flat, kernels, ranges
from bdh_mlflow.model.layer import ACTIVITY_STRIDE, Activity, norm
from bdh_mlflow.model.rope import RopeTable


class Options(NamedTuple):
    """Of one layer among several.

    activity: added to, if given.   first: whether this layer's backward pass is the last of those that share the weights: it returns the
    gradients of all of them.   compiled: fuse elementwise work by torch.compile, where `kernels` uses it.   detach: see `layer.attend`.
    """

    activity: Activity | None = None
    first: bool = True
    compiled: bool = False
    detach: bool = False
    fade: Fade | None = None


ALONE = Options()


def blocked_layer(x: Tensor, weights: Arranged, rope: RopeTable | Tensor, dropout: float, options: Options = ALONE) -> Tensor:
    """`carried_layer` for a text that begins and ends here."""
    return carried_layer(x, weights, rope, dropout, options)[0]


def carried_layer(
    x: Tensor,
    weights: Arranged,
    rope: RopeTable | Tensor,
    dropout: float,
    options: Options = ALONE,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One layer; values of `layer.carried_layer`, and its gradients where the initial state is a constant.

    x: (B, 1, T, D), normed.   weights: arranged by a plan for B and T.   rope: (N / 2, T), or the frequencies (N,) to make it span by span.
    dropout: probability, 0 outside training; its seed is drawn from torch's global CPU generator.   initial_state: (B, H, N, D), as seen
    from position 0.   Returns (B, 1, T, D), normed, differentiable once, and, given an initial state, the state after the last token,
    (B, H, N, D), still seen from position 0.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout else 0
    passes = kernels(weights.compute.encoder.dtype, x.device, options.compiled)
    task = Task(x.squeeze(1), weights.compute, rope, weights.cut, passes, dropout, seed, options.detach, options.fade, initial_state)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.weights))
    out, final_state = _Blocked.apply(task.x, *weights.weights, task, options, weights.sums, learns)  # type: ignore[no-untyped-call]
    return out.unsqueeze(1), final_state


@torch.no_grad()
def prefill(
    x: Tensor, weights: Arranged, rope: RopeTable | Tensor, initial_state: Tensor | None = None, fade: Fade | None = None
) -> tuple[Tensor, Tensor]:
    """One layer over a prompt, and the state from which generation continues.

    x: (B, 1, T, D), normed.   initial_state: (B, H, N, D), of the text before.   fade: for a chunk.   Returns the layer's output, the same
    shape, and `layer.recurrent_layer`'s state (B, H, N, D) after T tokens.
    """
    passes = kernels(weights.compute.encoder.dtype, x.device, False)
    task = Task(x.squeeze(1), weights.compute, rope, weights.cut, passes, fade=fade, initial_state=initial_state)
    done = _forward(task, None, keep_scores=False, full_state=True)
    assert done.states is not None
    return _residual(task.x, done.read).unsqueeze(1), done.states


class _Pass(NamedTuple):
    """What a forward pass leaves.

    read: (B, T, D), O.   attended: (B, H, T, D), Y.   scores: (B, H, T, C), S, if kept.   states: (B, H, N, D), the state before the last
    chunk, or after it for `prefill` and for texts with an initial state; None for a text of one chunk without.
    """

    read: Tensor
    attended: Tensor
    scores: Tensor | None
    states: Tensor | None


def _forward(task: Task, activity: Activity | None, keep_scores: bool, full_state: bool) -> _Pass:
    """full_state: add the last chunk to the state too."""
    x, (to_x, _, _), _, cut, _ = task[:5]
    batch, tokens, width = x.shape
    heads, neurons, _ = to_x.shape
    values = x.to(to_x.dtype)
    attended = values.new_empty(batch, heads, tokens, width)
    scores = values.new_empty(batch, heads, tokens, cut.chunk) if keep_scores else None
    in_state = tokens if full_state else task.last_chunk  # chunks that begin before this token are added to the state
    states = x.new_empty(batch, heads, neurons, width) if in_state else None
    read = torch.zeros_like(x)
    buffers = task.buffers(per_head=1)
    for block in cut.blocks(batch, heads):
        state = states[block.rows, block.head] if states is not None else None
        if state is not None:
            state.zero_() if task.initial_state is None else state.copy_(task.initial_state[block.rows, block.head])
        for start, stop in ranges(0, tokens, cut.span):
            span = task.span(block, start, stop, values, buffers)
            span.of(attended).copy_(_attend(task, span, state, in_state, None if scores is None else span.of(scores)))
            read[block.rows, start:stop] += _read_out(task, span, span.of(attended), activity)
    return _Pass(read.mul_(task.scale), attended, scores, states)


def _attend(task: Task, span: Span, state: Tensor | None, in_state: int, kept: Tensor | None) -> Tensor:
    """Equations 1 to 4 for a span: Y (R, S, D), in the dtype of x.

    state: (R, N, D), updated in place by the chunks that begin before `in_state`.   kept: (R, S, C), takes the scores.
    Leaves the activations A in the span's buffer 0 of the head.
    """
    head, v, buffers, fade = span.block.head, span.v, span.buffers, task.fade
    encoder, chunks = task.compute.encoder[head], span.chunks(task.cut.chunk)
    scores = [task.x.new_zeros(v.shape[0], inside.stop - inside.start, inside.stop - inside.start) for inside, _ in chunks]
    attended = torch.zeros_like(v, dtype=task.x.dtype)
    for first, end in task.neuron_blocks():
        xs, q = buffers.of_head(0, v, first, end), buffers.of_block(0, v, end - first)
        torch.mm(encoder[first:end], flat(v).mT, out=xs)
        task.kernels.activate(xs, q, span.rope_of(first, end))
        for (inside, begin), sums in zip(chunks, scores, strict=True):
            queries, size = by_row(q, len(v))[:, :, inside].mT, inside.stop - inside.start
            add_causal_scores(sums, queries)
            if state is not None and (begin or task.initial_state is not None):
                if fade is None:
                    add_product(attended[:, inside], queries, state[:, first:end].to(v.dtype))
                else:
                    attended[:, inside] += (queries @ state[:, first:end].to(v.dtype)) * fade.read(size)[head]
            if state is not None and begin < in_state:
                added = v[:, inside]
                if fade is not None:
                    state[:, first:end] *= fade.over(size)[head]
                    added = (added * fade.written(size)[head]).to(v.dtype)
                add_product(state[:, first:end], queries.mT, added)
    for (inside, _), sums in zip(chunks, scores, strict=True):
        causal = (sums.tril_(-1) if fade is None else fade.on_scores(sums, head)).to(v.dtype)
        add_product(attended[:, inside], causal, v[:, inside])
        if kept is not None:
            kept[:, inside, : causal.shape[1]] = causal
    return attended


def _read_out(task: Task, span: Span, attended: Tensor, activity: Activity | None) -> Tensor:
    """Equations 5 to 8 for a span: this head's part of O (R, S, D), in the dtype of x.   Reads the activations that `_attend` left."""
    head, v, buffers = span.block.head, span.v, span.buffers
    _, encoder_v, decoder = task.compute
    z = norm(attended).to(v.dtype)
    out = torch.zeros_like(v, dtype=task.x.dtype)
    for first, end in task.neuron_blocks():
        xs, ys = buffers.of_head(0, v, first, end), buffers.of_block(1, v, end - first)
        torch.mm(encoder_v[head, first:end], flat(z).mT, out=ys)
        if activity is not None:
            x_active, y_active = (by_row(t, len(v))[..., ::ACTIVITY_STRIDE] > 0 for t in (xs, ys))
            for total, active in zip(activity, (x_active, x_active & y_active), strict=True):
                total[head, first:end] += active.sum(dim=(0, 2))
        task.kernels.gate(ys, xs, task.dropped(span, first))
        add_product(flat(out), ys.mT, decoder[head, first:end])
    return out


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        *_, task, options, sums, learns = rest  # behind the three projections, whose gradients `backward` returns
        carries = task.initial_state is not None
        done = _forward(task, options.activity, keep_scores=learns, full_state=carries)
        kept = done._replace(states=None) if carries and not task.last_chunk else done
        assert task.fade is None or not task.last_chunk or not learns, "a text that fades is one chunk"
        ctx.save_for_backward(*kept, task.x, *task.compute, task.initial_state)
        ctx.rest = task[2:-1]  # without the tensors: autograd frees what it saved after the backward pass, but not what is set on ctx
        ctx.first, ctx.sums = options.first, sums
        final_state = done.states if carries else None
        if final_state is not None:
            ctx.mark_non_differentiable(final_state)
        return _residual(x, done.read), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *saved, x, to_x, to_y, to_out, initial_state = ctx.saved_tensors
        task = Task(x, Projections(to_x, to_y, to_out), *ctx.rest)._replace(initial_state=initial_state)
        sums: Sums = ctx.sums
        d_x = _backward(task, _Pass(*saved), grad, sums.begun(task.compute, x.dtype))
        d_weights = sums.taken() if ctx.first else (None, None, None)
        return d_x, *d_weights, None, None, None, None


class _Carried(NamedTuple):
    """What the walk back through the chunks carries from one to the one before, (R, N, D) each.

    state, d_state: H and dH, updated in place; None for a text of one chunk.   initial: H_0; None if it is zero.
    """

    state: Tensor | None
    d_state: Tensor | None
    initial: Tensor | None

    def of(self, first: int, end: int) -> "_Carried":
        """Of the neurons first <= n < end."""
        return _Carried(*(t if t is None else t[:, first:end] for t in self))


class _ChunkGradients(NamedTuple):
    """inside: the chunk's tokens in its span.   begin: its place in the text.   d_read: dY (R, C, D), as the state is read.

    d_symmetric: dS + dS^T (R, C, C); dS^T alone where keys are detached.
    """

    inside: slice
    begin: int
    d_read: Tensor
    d_symmetric: Tensor


def _backward(task: Task, saved: _Pass, grad: Tensor, grads: Projections) -> Tensor:
    """The gradient of x (B, T, D), given that of the layer's output.   grads: dE^T, dF^T and dG, added to block by block."""
    x, compute, _, cut, _ = task[:5]
    batch, tokens, _ = x.shape
    values = x.to(compute[0].dtype)
    d_x, d_read = _pull_back(_residual, grad, x, saved.read)
    d_out = d_read.mul_(task.scale).to(values.dtype)
    buffers = task.buffers(per_head=2)
    assert saved.scores is not None, "kept whenever a gradient is needed"
    for block in cut.blocks(batch, compute[0].shape[0]):
        state = None if saved.states is None else saved.states[block.rows, block.head].clone()
        initial = None if task.initial_state is None else task.initial_state[block.rows, block.head]
        carried = _Carried(state, None if state is None else torch.zeros_like(state), initial)
        for start, stop in reversed(list(ranges(0, tokens, cut.span))):
            span = task.span(block, start, stop, values, buffers)
            d_attended = _read_out_backward(task, span, span.of(saved.attended), d_out[block.rows, start:stop].contiguous(), grads)
            d_v, chunks = _scores_backward(task, span, span.of(saved.scores), d_attended)
            _activations_backward(task, span, chunks, carried, d_v, grads)
            d_x[block.rows, start:stop] += d_v
    return d_x


def _read_out_backward(task: Task, span: Span, attended: Tensor, d_out: Tensor, grads: Projections) -> Tensor:
    """Equations 8' to 5' for a span: adds dG and dF, returns dY (R, S, D) in the dtype of the matmuls.

    attended: Y.   d_out: dO; both (R, S, D). Leaves the activations A in buffer 0 of the head, and dA through the gate in buffer 1.
    """
    head, v, buffers = span.block.head, span.v, span.buffers
    encoder, encoder_v, decoder = task.compute
    z = norm(attended).to(v.dtype)
    d_z = torch.zeros_like(v, dtype=task.x.dtype)
    for first, end in task.neuron_blocks():
        xs, d_xs = (buffers.of_head(i, v, first, end) for i in (0, 1))
        ys, d_xy = (buffers.of_block(i, v, end - first) for i in (0, 1))
        torch.mm(encoder[head, first:end], flat(v).mT, out=xs)
        torch.mm(encoder_v[head, first:end], flat(z).mT, out=ys)
        torch.mm(decoder[head, first:end], flat(d_out).mT, out=d_xy)
        task.kernels.gate_backward(xs, ys, d_xy, d_xs, task.dropped(span, first))  # ys becomes P, d_xy the gradient of W
        add_product(grads.decoder[head, first:end], ys, flat(d_out))
        add_product(grads.encoder_v[head, first:end], d_xy, flat(z))
        add_product(flat(d_z), d_xy.mT, encoder_v[head, first:end])
    (d_attended,) = _pull_back(norm, d_z, attended)
    return d_attended.to(v.dtype)


def _scores_backward(task: Task, span: Span, scores: Tensor, d_attended: Tensor) -> tuple[Tensor, list[_ChunkGradients]]:
    """Equation 4' for a span, its chunks last to first: dX through S^T dY (R, S, D), and what equation 3' needs.   scores: (R, S, C)."""
    v = span.v
    d_v = torch.zeros_like(v, dtype=task.x.dtype)
    chunks = []
    for inside, begin in reversed(span.chunks(task.cut.chunk)):
        d_here = d_attended[:, inside]
        d_read, d_scores = d_here, (d_here @ v[:, inside].mT).tril_(-1)
        if task.fade is not None:
            task.fade.on_scores(d_scores, span.block.head)
            d_read = (d_here * task.fade.read(d_here.shape[1])[span.block.head]).to(v.dtype)
        d_symmetric = d_scores.mT if task.detach else d_scores + d_scores.mT  # no gradient through keys and values: dQ = dS Q
        chunks.append(_ChunkGradients(inside, begin, d_read, d_symmetric))
        if not task.detach:
            add_product(d_v[:, inside], scores[:, inside, : inside.stop - inside.start].mT, d_here)
    return d_v, chunks


def _activations_backward(
    task: Task, span: Span, chunks: list[_ChunkGradients], carried: _Carried, d_v: Tensor, grads: Projections
) -> None:
    """Equations 3' to 1' for a span, and 3'' for its chunks: adds to dE and to d_v (R, S, D), walks the state back."""
    head, v, buffers, encoder = span.block.head, span.v, span.buffers, task.compute.encoder
    for first, end in task.neuron_blocks():
        xs, d_xs = (buffers.of_head(i, v, first, end) for i in (0, 1))
        q, d_q = (buffers.of_block(i, v, end - first) for i in (0, 1))
        rope = span.rope_of(first, end)
        task.kernels.activate(xs, q, rope)
        for chunk in chunks:
            inside = chunk.inside
            queries, d_queries = (by_row(t, len(v))[:, :, inside] for t in (q, d_q))
            torch.bmm(queries, chunk.d_symmetric, out=d_queries)
            _state_backward(task, chunk, carried.of(first, end), (queries, v[:, inside]), (d_queries, d_v[:, inside]))
        task.kernels.activate_backward(d_q, d_xs, xs, rope)
        add_product(grads.encoder[head, first:end], d_xs, flat(v))
        add_product(flat(d_v), d_xs.mT, encoder[head, first:end])


def _state_backward(
    task: Task, chunk: _ChunkGradients, carried: _Carried, inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
) -> None:
    """Equations 3'' for one chunk and one block of neurons: from the state after the chunk to that before it, in place.

    carried: (R, M, D) each.   inputs: Q^T (R, M, C) and X (R, C, D).   gradients: of the two, added to.
    """
    (state, d_state, initial), (q, v), (d_q, d_v) = carried, inputs, gradients
    is_last = chunk.begin == task.last_chunk  # nothing reads the state after it, and it is in the state only if that is carried on
    if state is not None and d_state is not None:
        if not is_last and not task.detach:
            d_after = d_state.to(v.dtype)
            add_product(d_q, d_after, v.mT)
            add_product(d_v, q.mT, d_after)
        if not is_last or initial is not None:
            add_product(state, q, v, -1)
    before = state if chunk.begin else initial
    if before is not None:
        add_product(d_q, before.to(v.dtype), chunk.d_read.mT)
    if chunk.begin and d_state is not None and not task.detach:
        add_product(d_state, q, chunk.d_read)


def _residual(x: Tensor, read: Tensor) -> Tensor:
    return norm(x + norm(read))


def _pull_back(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs of a small function, by autograd."""
    with torch.enable_grad():
        leaves = [t.detach().to(grad.dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)
