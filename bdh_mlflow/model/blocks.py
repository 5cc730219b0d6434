"""How a layer is cut into blocks: their sizes, the weights as they read them, and what one block works on.

A block must be small enough for a CPU's caches and large enough to fill a GPU. Sizes depend on shapes and device only, so the same training
is cut the same way on every machine of a kind. `blocked` visits the blocks and does the arithmetic.

B rows, T tokens, D n_embd, H n_head, N neurons per head; R rows, S tokens and M neurons of a block, C tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bdh_mlflow.model.dropout import Dropout, keep_probability
from bdh_mlflow.model.fade import Fade
from bdh_mlflow.model.kernels import Buffers, Kernels, by_neuron, ranges
from bdh_mlflow.model.layer import ACTIVITY_STRIDE, LayerWeights
from bdh_mlflow.model.rope import RopeTable, rope_table

STATE_FROM = 4
"""Texts of more than this many times D tokens are cut into chunks with a state. By FLOPs the two ways meet between 5 D and 6 D (see
`blocked`); the state form needs less memory for scores from the first chunk on."""
BLOCK_TOKENS = {"cpu": 2**9, "cuda": 2**15}
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**30}
"""Tokens of a block, and bytes of its activations. CPU: what the cores' caches hold. CUDA: enough to fill the GPU, an estimate that was not
measured."""


class Block(NamedTuple):
    """One head of some rows.   number: of the block, from 0; the dropout masks of a block are derived from it."""

    number: int
    head: int
    rows: slice


class Plan(NamedTuple):
    """rows, span, neurons: sizes of a block (R, S, M).   chunk: tokens that attend to each other directly (C); S is a multiple of C."""

    rows: int
    span: int
    chunk: int
    neurons: int

    def blocks(self, batch: int, heads: int) -> Iterator[Block]:
        """Heads and rows in the order in which they are computed."""
        groups = range(0, batch, self.rows)
        for head in range(heads):
            for group, first in enumerate(groups):
                yield Block(head * len(groups) + group, head, slice(first, min(first + self.rows, batch)))


def plan_blocks(batch: int, tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Block sizes for T tokens in B rows of width D and N neurons a head, in the dtype of the matmuls."""
    chunk = span = max(1, tokens)
    if tokens > STATE_FROM * width:
        chunk = -(-width // ACTIVITY_STRIDE) * ACTIVITY_STRIDE
        span = STATE_FROM * chunk
    rows = max(1, min(batch, BLOCK_TOKENS.get(device.type, BLOCK_TOKENS["cpu"]) // span))
    block = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"]) // (rows * span * dtype.itemsize) // 2 * 2
    return Plan(rows, span, chunk, max(2, min(block, neurons)))


class Projections(NamedTuple):
    """encoder, encoder_v, decoder: a row for each neuron, (H, N, D) each."""

    encoder: Tensor
    encoder_v: Tensor
    decoder: Tensor


class Sums:
    """Gradients of the projections, added up over the layers that share them, where autograd would keep one set a layer and add later."""

    def __init__(self) -> None:
        self._begun: Projections | None = None

    def begun(self, like: Projections, dtype: torch.dtype) -> Projections:
        """What to add to, in this dtype; zero for the first layer that asks."""
        if self._begun is None:
            self._begun = Projections(*(torch.zeros_like(w, dtype=dtype) for w in like))
        return self._begun

    def taken(self) -> Projections:
        """The sums, which begin anew."""
        found, self._begun = self._begun, None
        assert found is not None, "something was added before"
        return found


class Arranged(NamedTuple):
    """Projections as the blocks read them.

    weights: in the parameters' dtype and with their gradients.   compute: in the dtype of the matmuls, detached and contiguous.   cut: the
    block sizes.   sums: of the gradients, over the layers of one forward pass.
    """

    weights: Projections
    compute: Projections
    cut: Plan
    sums: Sums


def arrange(weights: LayerWeights, dtype: torch.dtype, cut: Plan) -> Arranged:
    """Once per forward pass: a row for each neuron, and a copy in the dtype of the matmuls."""
    encoder, encoder_v, decoder = weights
    by_rows = Projections(encoder.mT, encoder_v.mT, decoder.view(encoder.mT.shape))
    return Arranged(by_rows, Projections(*(w.detach().to(dtype).contiguous() for w in by_rows)), cut, Sums())


class Task(NamedTuple):
    """The inputs of one layer.

    x: (B, T, D).   compute: E^T, F^T and G, as `Arranged` holds them.   rope: (N / 2, T), or the frequencies (N,) to make it span by span.
    detach, fade: see `layer.attend`; fade is for a chunk.   initial_state: (B, H, N, D), of the text before, a constant; None: the text
    begins and ends here.
    """

    x: Tensor
    compute: Projections
    rope: RopeTable | Tensor
    cut: Plan
    kernels: Kernels
    dropout: float = 0.0
    seed: int = 0
    detach: bool = False
    fade: Fade | None = None
    initial_state: Tensor | None = None

    @property
    def neurons(self) -> int:
        """Of a head (N)."""
        return self.compute.encoder.shape[1]

    @property
    def last_chunk(self) -> int:
        """Where the last chunk begins."""
        return (self.x.shape[1] - 1) // self.cut.chunk * self.cut.chunk

    def buffers(self, per_head: int) -> Buffers:
        """Two buffers for the neurons of a block, and `per_head` for all neurons of a head."""
        tokens = self.cut.rows * min(self.cut.span, self.x.shape[1])
        return Buffers(self.compute[0], tokens, (self.neurons, self.cut.neurons), per_head, 2)

    def span(self, block: Block, start: int, stop: int, values: Tensor, buffers: Buffers) -> "Span":
        """values: x in the dtype of the matmuls."""
        v = values[block.rows, start:stop].contiguous()
        if isinstance(self.rope, RopeTable):
            rope = RopeTable(self.rope.cos[:, start:stop], self.rope.sin[:, start:stop])
        else:
            rope = by_neuron(rope_table(start, stop, self.rope))
        return Span(block, start, stop, v, rope, buffers)

    def dropped(self, span: "Span", first: int) -> Dropout | None:
        """Dropout of a span's neurons from `first` on; None without."""
        place = (span.block.number * self.x.shape[1] + span.start) * self.neurons + first
        return Dropout(self.dropout, self.seed + place) if self.dropout else None

    @property
    def scale(self) -> float:
        """What dropout multiplies the kept activations by: of their sum in the forward pass, of its gradient in the backward pass."""
        return 1 / keep_probability(self.dropout)

    def neuron_blocks(self) -> list[tuple[int, int]]:
        """(first, end) of each block of neurons."""
        return list(ranges(0, self.neurons, self.cut.neurons))


class Span(NamedTuple):
    """Consecutive tokens of one block: the unit of work.   v: (R, S, D), x in the dtype of the matmuls.   rope: (N / 2, S)."""

    block: Block
    start: int
    stop: int
    v: Tensor
    rope: RopeTable
    buffers: Buffers

    def rope_of(self, first: int, end: int) -> RopeTable:
        """Rotations of the neurons first <= n < end, both even.   ((end - first) / 2, S)."""
        return RopeTable(self.rope.cos[first // 2 : end // 2], self.rope.sin[first // 2 : end // 2])

    def of(self, t: Tensor) -> Tensor:
        """This span's part of a (B, H, T, ...) tensor, (R, S, ...), the same memory."""
        return t[self.block.rows, self.block.head, self.start : self.stop]

    def chunks(self, size: int) -> list[tuple[slice, int]]:
        """Each chunk's tokens, counted from the span's start, and where it begins in the text."""
        return [(slice(begin - self.start, end - self.start), begin) for begin, end in ranges(self.start, self.stop, size)]
