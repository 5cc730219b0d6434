"""Building blocks of `blocked`: in-place elementwise passes over activations, products that add into a sum, and reused buffers.

Everything here works on one block: R rows, S tokens, M neurons of one head. Activations stand neuron by neuron, (M, R S): every product
then reads its operands as they lie, at 95 to 100 % of the speed of a square product where the other order reaches 70 to 80 % (float32,
AVX-512), and the two neurons of a rotation are two contiguous rows. On a CPU with a C++ compiler the passes are those of `native`, each one
reading and writing its activations once; the eager ones here define their values. Knows nothing of layers or gradients of weights.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bdh_mlflow.model import native
from bdh_mlflow.model.dropout import Dropout, keep_mask
from bdh_mlflow.model.rope import RopeTable

CAUSAL_STEP = 128  # tokens; skips 3/8 of the square of scores at T = 512 and leaves matrix products of a useful size


class Kernels(NamedTuple):
    """The elementwise passes over neurons. Each works in place on (M, R S) buffers."""

    activate: Callable[[Tensor, Tensor, RopeTable], None]
    """(xs, q, table): see `_activate`."""
    gate: Callable[[Tensor, Tensor, Dropout | None], None]
    """(ys, xs, dropout): see `_gate`."""
    gate_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Dropout | None], None]
    """(xs, ys, d_xy, d_xs, dropout): see `_gate_backward`."""
    activate_backward: Callable[[Tensor, Tensor, Tensor, RopeTable], None]
    """(d_q, d_xs, xs, table): see `_activate_backward`."""


@functools.cache
def kernels(dtype: torch.dtype, device: torch.device, compiled: bool) -> Kernels:
    """The passes for activations of a dtype: on a CPU those of `native` where it has them, else eager.

    compiled: off the CPU, fuse the eager ones by torch.compile. One set for the process, so that each is traced once.
    """
    library, _ = native.serving(dtype, device)
    if library is not None:
        return Kernels(*(functools.partial(getattr(native, name), library) for name in Kernels._fields))
    return eager(fused=compiled and device.type != "cpu")


def eager(fused: bool = False) -> Kernels:
    """The passes operation by operation.   fused: by torch.compile; the masks stay outside, whose keys would be traced as constants."""
    wrap = functools.partial(torch.compile, dynamic=True) if fused else lambda kernel: kernel
    gate, gate_backward = wrap(_gate), wrap(_gate_backward)
    return Kernels(
        activate=wrap(_activate),
        gate=lambda ys, xs, dropout: gate(ys, xs, _mask(ys, dropout)),
        gate_backward=lambda xs, ys, d_xy, d_xs, dropout: gate_backward(xs, ys, d_xy, d_xs, _mask(ys, dropout)),
        activate_backward=wrap(_activate_backward),
    )


def _mask(like: Tensor, dropout: Dropout | None) -> Tensor | None:
    return keep_mask(like, *dropout) if dropout else None


def _activate(xs: Tensor, q: Tensor, table: RopeTable) -> None:
    """xs: pre-activations, becomes relu(xs).   q: becomes relu(xs) rotated by position.   table: (M / 2, S)."""
    xs.relu_()
    (even, odd), (q_even, q_odd), (cos, sin) = _pairs(xs, table), _pairs(q, table), _by_row(table)
    _multiply_add(q_even, even, cos, odd, sin, -1)
    _multiply_add(q_odd, odd, cos, even, sin, 1)


def _gate(ys: Tensor, xs: Tensor, mask: Tensor | None) -> None:
    """ys: pre-activations, becomes mask * relu(ys) * xs.   xs: activations."""
    ys.relu_().mul_(xs)
    if mask is not None:
        ys *= mask


def _gate_backward(xs: Tensor, ys: Tensor, d_xy: Tensor, d_xs: Tensor, mask: Tensor | None) -> None:
    """Of xy = mask * relu(xs) * relu(ys).

    xs: pre-activations, becomes relu(xs).   ys: pre-activations, becomes xy.   d_xy: becomes the gradient of the pre-activations ys.
    d_xs: becomes the gradient of relu(xs) that comes through the gate.
    """
    if mask is not None:
        d_xy *= mask
    xs.relu_()
    ys.relu_()
    torch.mul(d_xy, ys, out=d_xs)
    relu_backward_(d_xy.mul_(xs), ys)
    ys.mul_(xs)
    if mask is not None:
        ys *= mask


def _activate_backward(d_q: Tensor, d_xs: Tensor, xs: Tensor, table: RopeTable) -> None:
    """Of `_activate`.   d_xs: the gradient through the gate, becomes that of the pre-activations.   xs: activations."""
    (even, odd), (d_even, d_odd), (cos, sin) = _pairs(d_q, table), _pairs(d_xs, table), _by_row(table)
    _multiply_add_to(d_even, even, cos, odd, sin, 1)
    _multiply_add_to(d_odd, odd, cos, even, sin, -1)
    relu_backward_(d_xs, xs)


def _pairs(t: Tensor, table: RopeTable) -> tuple[Tensor, ...]:
    """Even and odd neurons of an (M, R S) buffer, (M / 2, R, S) each, the same memory."""
    pairs, tokens = table.cos.shape
    return t.view(pairs, 2, t.shape[1] // tokens, tokens).unbind(1)


def _by_row(table: RopeTable) -> tuple[Tensor, Tensor]:
    return table.cos.unsqueeze(1), table.sin.unsqueeze(1)


def relu_backward_(grad: Tensor, activations: Tensor) -> None:
    """Set `grad` to zero where the ReLU's output is."""
    torch.ops.aten.threshold_backward.grad_input(grad, activations, 0, grad_input=grad)


def _multiply_add(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out = a * b + sign * c * d, computed in the wider dtype of a and b and rounded to that of `out` once."""
    if out.dtype == b.dtype and not torch.compiler.is_compiling():  # torch.compile does not trace an `out` that is not contiguous
        torch.mul(a, b, out=out).addcmul_(c, d, value=sign)
    else:
        out.copy_((a * b).addcmul_(c, d, value=sign))


def _multiply_add_to(out: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, sign: int) -> None:
    """out += a * b + sign * c * d, computed in the wider dtype of out and b and rounded to that of `out` once."""
    wide = out.to(torch.promote_types(out.dtype, b.dtype))  # itself, where it is wide already
    wide.addcmul_(a, b).addcmul_(c, d, value=sign)
    if wide is not out:
        out.copy_(wide)


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: int = 1) -> None:
    """total += factor * left @ right; where total has a wider dtype than the factors, the sum is computed in it."""
    if total.dim() == 3 and (len(total) == 1 or (total.device.type == "cpu" and total.dtype != left.dtype)):
        for parts in zip(total, left, right, strict=True):  # oneDNN copies an operand of a batched product that is not contiguous
            add_product(*parts, factor)
    elif total.dtype == left.dtype:
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
        self._per_head = [like.new_empty(neurons[0] * tokens) for _ in range(per_head)]
        self._per_block = [like.new_empty(neurons[1] * tokens) for _ in range(per_block)]

    def of_head(self, which: int, like: Tensor, first: int, end: int) -> Tensor:
        """(M, R S): neurons first <= n < end of a head, for the tokens of `like` (R, S, D)."""
        tokens = like.shape[0] * like.shape[1]
        return self._per_head[which][first * tokens : end * tokens].view(end - first, tokens)

    def of_block(self, which: int, like: Tensor, neurons: int) -> Tensor:
        """(neurons, R S), for the tokens of `like` (R, S, D)."""
        tokens = like.shape[0] * like.shape[1]
        return self._per_block[which][: neurons * tokens].view(neurons, tokens)


def flat(t: Tensor) -> Tensor:
    """(R, S, ...) -> (R * S, ...), the same memory."""
    return t.view(-1, t.shape[-1])


def by_row(t: Tensor, rows: int) -> Tensor:
    """(M, R S) activations as (R, M, S), the same memory."""
    return t.view(t.shape[0], rows, -1).transpose(0, 1)


def by_neuron(table: RopeTable) -> RopeTable:
    """A table as the blocks read it: (T, N / 2) -> (N / 2, T), contiguous."""
    return RopeTable(table.cos.mT.contiguous(), table.sin.mT.contiguous())


def ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive pieces of `step`; the last may be shorter."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
