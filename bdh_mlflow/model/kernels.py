"""Building blocks of `blocked`: in-place elementwise passes over activations, products that add into a sum, and reused buffers.

Everything here works on one block: R rows, S tokens, M neurons of one head. Within a block the even neurons stand before the odd ones
(`halves_first`), so that a rotation of neuron pairs works on two contiguous halves; a sum over neurons does not depend on their order.
Knows nothing of layers, gradients of weights or the order in which blocks are visited.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bdh_mlflow.model.layer import RopeTable

CAUSAL_STEP = 128  # tokens; skips 3/8 of the square of scores at T = 512 and leaves matrix products of a useful size


class Kernels(NamedTuple):
    """The elementwise passes over neurons. Each works in place on (R, S, M) buffers; eager, or fused by torch.compile."""

    activate: Callable[..., None]
    gate: Callable[..., None]
    gate_backward: Callable[..., None]
    activate_backward: Callable[..., None]


@functools.cache
def kernels(compiled: bool) -> Kernels:
    """One set for the process, so that torch.compile traces each pass once."""
    wrap = functools.partial(torch.compile, dynamic=True) if compiled else lambda kernel: kernel
    return Kernels(*(wrap(kernel) for kernel in (_activate, _gate, _gate_backward, _activate_backward)))


def _activate(xs: Tensor, q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """xs: pre-activations, becomes relu(xs).   q: becomes relu(xs) rotated by position."""
    xs.relu_()
    (even, odd), (q_even, q_odd) = xs.chunk(2, -1), q.chunk(2, -1)
    _multiply_add(q_even, even, cos, odd, sin, -1)
    _multiply_add(q_odd, odd, cos, even, sin, 1)


def _gate(ys: Tensor, xs: Tensor) -> None:
    """ys: pre-activations, becomes relu(ys) * xs.   xs: activations."""
    ys.relu_().mul_(xs)


def _gate_backward(xs: Tensor, ys: Tensor, d_xy: Tensor, d_xs: Tensor) -> None:
    """Of xy = relu(xs) * relu(ys).

    xs: pre-activations, becomes relu(xs).   ys: pre-activations, becomes xy.   d_xy: becomes the gradient of the pre-activations ys.
    d_xs: becomes the gradient of relu(xs) that comes through the gate.
    """
    xs.relu_()
    ys.relu_()
    torch.mul(d_xy, ys, out=d_xs)
    relu_backward_(d_xy.mul_(xs), ys)
    ys.mul_(xs)


def _activate_backward(d_q: Tensor, d_xs: Tensor, xs: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Of `_activate`.   d_xs: the gradient through the gate, becomes that of the pre-activations.   xs: activations."""
    (even, odd), (d_even, d_odd) = d_q.chunk(2, -1), d_xs.chunk(2, -1)
    _multiply_add_to(d_even, even, cos, odd, sin, 1)
    _multiply_add_to(d_odd, odd, cos, even, sin, -1)
    relu_backward_(d_xs, xs)


def relu_backward_(grad: Tensor, activations: Tensor) -> None:
    """Set `grad` to zero where the ReLU's output is."""
    torch.ops.aten.threshold_backward.grad_input(grad, activations, 0, grad_input=grad)


def _multiply_add(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out = a * b + sign * c * d, computed in the dtype of b and rounded to that of `out` once."""
    if out.dtype == b.dtype and not torch.compiler.is_compiling():  # torch.compile does not trace an `out` that is not contiguous
        torch.mul(a, b, out=out).addcmul_(c, d, value=sign)
    else:
        out.copy_((a * b).addcmul_(c, d, value=sign))


def _multiply_add_to(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out += a * b + sign * c * d, computed in the dtype of b and rounded to that of `out` once."""
    if out.dtype == b.dtype:
        out.addcmul_(a, b).addcmul_(c, d, value=sign)
    else:
        out.copy_((a * b).addcmul_(c, d, value=sign).add_(out))


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: int = 1) -> None:
    """total += factor * left @ right; where total has a wider dtype than the factors, the sum is computed in it."""
    if total.dtype == left.dtype:
        (total.addmm_ if total.dim() == 2 else total.baddbmm_)(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)


def add_causal_scores(scores: Tensor, q: Tensor) -> None:
    """scores += q q^T at and below the diagonal, in steps; what a step computes above the diagonal is for the caller to drop.

    scores: (R, C, C).   q: (R, C, M).   Cost: R C (C + CAUSAL_STEP) M FLOPs instead of 2 R C^2 M.
    """
    for start, stop in ranges(0, q.shape[1], CAUSAL_STEP):
        add_product(scores[:, start:stop, :stop], q[:, start:stop], q[:, :stop].mT)


class Buffers:
    """Memory for activations, allocated once and reused by every block.

    per_head: how many buffers hold all N neurons of a head for the tokens of a block.   per_block: how many hold a block's M neurons.
    """

    def __init__(self, like: Tensor, tokens: int, neurons: tuple[int, int], per_head: int, per_block: int) -> None:
        """like: of the dtype and device wanted.   tokens: R * S.   neurons: of a head and of a block."""
        self._per_head = [like.new_empty(tokens * neurons[0]) for _ in range(per_head)]
        self._per_block = [like.new_empty(tokens * neurons[1]) for _ in range(per_block)]

    def of_head(self, which: int, like: Tensor, first: int, end: int) -> Tensor:
        """(R, S, M): neurons first <= n < end of a head, for the tokens of `like` (R, S, D)."""
        tokens = like.shape[0] * like.shape[1]
        return self._per_head[which][tokens * first : tokens * end].view(*like.shape[:2], end - first)

    def of_block(self, which: int, like: Tensor, neurons: int) -> Tensor:
        """(R, S, neurons), for the tokens of `like` (R, S, D)."""
        return self._per_block[which][: like.shape[0] * like.shape[1] * neurons].view(*like.shape[:2], neurons)


def flat(t: Tensor) -> Tensor:
    """(R, S, ...) -> (R * S, ...), the same memory."""
    return t.view(-1, t.shape[-1])


def rope_of_neurons(table: RopeTable, first: int, end: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the neurons first <= n < end, both even.   Each (S, (end - first) / 2)."""
    return table.cos[:, first // 2 : end // 2], table.sin[:, first // 2 : end // 2]


def halves_first(t: Tensor, dim: int, block: int) -> Tensor:
    """Reorder neurons: in each block the even ones before the odd ones.   dim: that of the neurons, counted from the end."""
    return _blocks_transposed(t, dim, block, lambda size: (size // 2, 2))


def pairs_first(t: Tensor, dim: int, block: int) -> Tensor:
    """The inverse of `halves_first`: the order of the parameters again."""
    return _blocks_transposed(t, dim, block, lambda size: (2, size // 2))


def _blocks_transposed(t: Tensor, dim: int, block: int, sides: Callable[[int], tuple[int, int]]) -> Tensor:
    """Each block of a dimension read as a matrix with these sides, and transposed; the last block may be shorter."""
    size = t.shape[dim]
    full = size // block * block
    parts = []
    for part, one in ((t.narrow(dim, 0, full), block), (t.narrow(dim, full, size - full), size - full)):
        if one:
            shape = (*part.shape[:dim], part.shape[dim] // one, *sides(one), *part.shape[dim:][1:])
            parts.append(part.reshape(shape).transpose(dim - 1, dim).flatten(dim - 2, dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive pieces of `step`; the last may be shorter."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
