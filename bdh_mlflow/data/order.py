"""Parquet rows to packed batches, in an order that is a pure function of the seed and can be entered anywhere.

1. A folder of parquet files is indexed by its footers: row groups, rows, and a digest of names, sizes and footers (`ParquetText`).
2. Each document (a row of the text column) belongs to training or to validation by a hash of its place: file and row.
3. A row group becomes one run of bytes: its training documents, each followed by a separator. Row groups are visited in an order drawn
   per epoch; `max_cached_files` of them are open at once, one per lane, and lanes deal windows in turn.
4. A lane cuts its bytes into windows of block_size + 1 that overlap by one token, so every token is predicted exactly once. The rest of a
   row group leads into the next one of its lane: nothing is padded, nothing dropped, in no epoch.
5. `TrainingBatches` yields `Batch(tokens, position, epoch)`; starting again from that position gives the batch that would have followed.

The only home of pyarrow. Shuffles are sorts by a hash written out here, because the streams of library generators may change.
"""

import itertools
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bdh_mlflow.config import DataLoaderConfig
from bdh_mlflow.data.parquet import Bytes, ParquetText, shuffled
from bdh_mlflow.errors import DataError
from bdh_mlflow.text import SEPARATOR

Position = dict[str, Any]


class Batch(NamedTuple):
    """tokens: (B, block_size + 1) uint8.   position: where the next batch starts.   epoch: passes over the data so far, as a fraction."""

    tokens: Tensor
    position: Position
    epoch: float


class TrainingBatches(IterableDataset[Batch]):
    """Endless batches of training windows from a position on; the same whatever the number of loader workers.

    Each worker walks the whole order and builds every n-th batch, so the order needs no agreement between them.
    """

    def __init__(self, text: ParquetText, *, lanes: int, batch_size: int, block_size: int, seed: int, position: Position | None) -> None:
        self._text = text
        self._lanes = min(lanes, len(text.row_groups))
        self._batch_size = batch_size
        self._block_size = block_size
        self._seed = seed
        self._position = position

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        share, number = (worker.num_workers, worker.id) if worker else (1, 0)
        walk = _Walk(self._text, self._lanes, self._block_size, self._seed)
        if self._position is not None:
            walk.enter(self._position)
        for turn in itertools.count():
            windows = walk.next_windows(self._batch_size)
            if turn % share == number:
                yield Batch(torch.from_numpy(windows), walk.position(), walk.epoch())


def training_loader(batches: TrainingBatches, loader: DataLoaderConfig, cuda: bool) -> Iterator[Batch]:
    """Batches through torch's DataLoader, with workers if asked for, pinned where there is CUDA."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": "spawn",
            "worker_init_fn": _leave_signals_to_the_trainer,
        }
    pin = loader.pin_memory and cuda
    return iter(DataLoader(batches, batch_size=None, num_workers=loader.num_workers, pin_memory=pin, **workers))


class _Lane:
    """One row group at a time as windows.

    State, all integers: `unit` (how many row groups the run had opened before this one; -1 = none yet), `emitted` windows, and what the
    row groups before left over: `carry_length` tokens, found again as the ends of earlier units `carry_pieces` [(unit, tokens), ...].
    The first window holds the whole carry and is always dealt first, so once it is out the pieces are not needed any more.
    """

    def __init__(self, walk: "_Walk") -> None:
        self._walk = walk
        self.unit = -1
        self.emitted = 0
        self.carry_length = 1
        self.carry_pieces: list[tuple[int, int]] = [(-1, 1)]
        self._rest: Bytes = np.array([SEPARATOR], np.uint8)  # what leads into the next row group
        self._own = 1  # tokens of this unit
        self._dealt: Bytes = np.empty((0, walk.block_size + 1), np.uint8)  # its windows in the order they are dealt

    @property
    def windows(self) -> int:
        return len(self._dealt)

    @property
    def left(self) -> int:
        """Windows of this row group still to be dealt."""
        return self.windows - self.emitted

    def take(self, count: int) -> Bytes:
        """The next windows, at most as many as are left.   Returns (count, block_size + 1)."""
        self.emitted += count
        return self._dealt[self.emitted - count : self.emitted]

    def open(self, unit: int) -> None:
        """Go on with another row group, carrying over what did not fill a window."""
        if self.windows:
            self.carry_pieces = [(self.unit, len(self._rest))]
        elif self.unit >= 0 and self._own:
            self.carry_pieces = [*self.carry_pieces, (self.unit, self._own)]
        self.carry_length = len(self._rest)
        self._dealt = self._dealt[:0].copy()  # let go of the old row group before the new one is read
        self._fill(unit, self._rest)
        self.emitted = 0

    def state(self) -> list[int]:
        if self.emitted:
            return [self.unit, self.emitted, self.carry_length]
        return [self.unit, self.emitted, self.carry_length, *itertools.chain.from_iterable(self.carry_pieces)]

    def enter(self, state: list[int]) -> None:
        self.unit, self.emitted, self.carry_length, *pieces = state
        self.carry_pieces = list(zip(pieces[::2], pieces[1::2], strict=True))
        if self.unit < 0:
            return
        if self.emitted:
            carry = np.zeros(self.carry_length, np.uint8)  # inside the first window, which is out already
        else:
            carry = np.concatenate([self._walk.unit_bytes(unit)[-tokens:] for unit, tokens in self.carry_pieces])
        self._fill(self.unit, carry)

    def _fill(self, unit: int, carry: Bytes) -> None:
        tokens = self._walk.unit_bytes(unit)
        self.unit, self._own = unit, len(tokens)
        stream = np.concatenate((carry, tokens))
        size = self._walk.block_size
        windows = (len(stream) - 1) // size
        if windows:
            later = 1 + shuffled(windows - 1, self._walk.seed, unit + 1)
            overlapping = np.lib.stride_tricks.sliding_window_view(stream, size + 1)[::size]
            self._dealt = overlapping[np.concatenate(([0], later))]
        self._rest = stream[windows * size :].copy()


class _Walk:
    """The lanes, the order in which they open row groups, and whose turn it is."""

    def __init__(self, text: ParquetText, lanes: int, block_size: int, seed: int) -> None:
        self._text = text
        self.block_size = block_size
        self.seed = seed
        self._next_unit = 0
        self._turn = 0
        self._surely_left = 0  # windows that every lane has, at the least
        self._lanes = [_Lane(self) for _ in range(lanes)]
        self._epoch_order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def next_windows(self, count: int) -> Bytes:
        """The next windows of the run, lane after lane.   Returns (count, block_size + 1).

        While every lane has enough left its share is taken at once; the result is that of asking lane by lane.
        """
        lanes = len(self._lanes)
        windows = np.empty((count, self.block_size + 1), np.uint8)
        most = -(-count // lanes)
        if self._surely_left < most:
            self._surely_left = min(lane.left for lane in self._lanes)
        if self._surely_left >= most:
            self._surely_left -= most
            for row in range(min(lanes, count)):
                windows[row::lanes] = self._lanes[(self._turn + row) % lanes].take((count - row + lanes - 1) // lanes)
            self._turn = (self._turn + count) % lanes
            return windows
        self._surely_left = 0
        for row in range(count):
            lane = self._lanes[self._turn]
            self._refill(lane)
            windows[row] = lane.take(1)
            self._turn = (self._turn + 1) % lanes
        return windows

    def _refill(self, lane: _Lane) -> None:
        """Open row groups until the lane has a window to deal."""
        fruitless = 0
        while not lane.left:
            if fruitless == len(self._text.row_groups):
                raise DataError(
                    f"{self._text.root}: an epoch of training text does not fill one window of block_size {self.block_size}; "
                    f"lower training.block_size or add text"
                )
            lane.open(self._next_unit)
            self._next_unit += 1
            fruitless += 1

    def unit_bytes(self, unit: int) -> Bytes:
        """Bytes of the `unit`-th row group opened in the run; unit -1 is the separator before all text."""
        if unit < 0:
            return np.array([SEPARATOR], np.uint8)
        groups = self._text.row_groups
        epoch, place = divmod(unit, len(groups))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, shuffled(len(groups), self.seed, -1 - epoch))
        return self._text.training_bytes(groups[self._epoch_order[1][place]])

    def position(self) -> Position:
        return {"next_unit": self._next_unit, "turn": self._turn, "lanes": [lane.state() for lane in self._lanes]}

    def epoch(self) -> float:
        dealt = float(self._next_unit - len(self._lanes))
        for lane in self._lanes:
            dealt += lane.emitted / lane.windows if lane.windows else 1 if lane.unit < 0 else 0
        return dealt / len(self._text.row_groups)

    def enter(self, position: Position) -> None:
        if len(position["lanes"]) != len(self._lanes):
            raise DataError(f"{self._text.root}: the checkpoint read {len(position['lanes'])} row groups at once, not {len(self._lanes)}")
        self._next_unit, self._turn = position["next_unit"], position["turn"]
        for lane, state in zip(self._lanes, position["lanes"], strict=True):
            lane.enter(state)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group; the trainer decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
