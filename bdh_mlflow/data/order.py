"""Parquet rows to packed batches, in an order that is a pure function of the seed and can be resumed at any position.

1. `parquet.ParquetText` indexes the files: row groups, rows, and which documents are training text.
2. A row group becomes one run of tokens: its training documents, each followed by a separator. Row groups are visited in an order drawn
   per epoch; `max_cached_files` of them are open at once, one per lane, and windows are taken from the lanes in turn.
3. A lane cuts its tokens into windows of block_size + 1 that overlap by one token, so every token is predicted exactly once. The rest of a
   row group leads into the next one of its lane: nothing is padded, nothing dropped, in no epoch. Its windows are shuffled, or stay in the
   order of the text where rows read on (`Order.consecutive`): then each row of an update is a lane, and row groups are cut into as many
   parts as give each lane one.
4. `TrainingBatches` yields `Batch(tokens, position, epoch)`, of an update only those that this process computes; starting again from that
   position gives the update that would have followed.

Knows text only through `ParquetText`, and the model only as a block size.
"""

import atexit
import functools
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bdh_mlflow.config import DataLoaderConfig
from bdh_mlflow.data.ahead import Ahead
from bdh_mlflow.data.parquet import ParquetText, shuffled
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
from bdh_mlflow.host import ENDING_SIGNALS, leave
from bdh_mlflow.vocabulary import Ids

Position = dict[str, Any]
"""Where the next update starts. Opaque to everyone else and saved in checkpoints (`data_position`), so keys and lists must not change.

next_unit: row groups, or parts of them, opened so far in the run, over all epochs.   turn: the lane whose turn it is.   lanes: a list of
integers for each, see `_Lane.state`.
"""


class Batch(NamedTuple):
    """tokens: (B, block_size + 1) ids.   position: where the next update starts.   epoch: passes over the data by then."""

    tokens: Tensor
    position: Position
    epoch: float


class Order(NamedTuple):
    """What decides which window comes when.

    lanes: row groups that are read in turn.   passes: batches of an update.   own: which of those this process takes, by their numbers.
    consecutive: each row of each batch reads on where it ended in the update before; there are as many lanes as rows then.
    """

    lanes: int
    batch_size: int
    block_size: int
    seed: int
    passes: int = 1
    own: range = range(1)
    consecutive: bool = False


class TrainingBatches(IterableDataset[Batch]):
    """Endless batches of training windows from a position on; the same for any number of loader workers and of processes.

    Each worker of each process walks the whole order and yields its share, so that none need agree on anything.
    """

    def __init__(self, text: ParquetText, order: Order, position: Position | None) -> None:
        self._text = text
        lanes = order.passes * order.batch_size if order.consecutive else min(order.lanes, len(text.row_groups))
        self._order = order._replace(lanes=lanes)
        self._position = position

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, worker_number = (worker.num_workers, worker.id) if worker else (1, 0)
        order = self._order
        walk = _Walk(self._text, order)
        if self._position is not None:
            walk.seek(self._position)
        indices = itertools.count()
        while True:
            own = []
            for number in range(order.passes):
                windows = walk.next_windows(order.batch_size)
                if number in order.own and next(indices) % workers == worker_number:
                    own.append(windows)
            if own:
                position, epoch = walk.position(), walk.epoch()
                for windows in own:
                    yield Batch(torch.from_numpy(windows), position, epoch)


def training_loader(batches: TrainingBatches, loader: DataLoaderConfig, cuda: bool) -> Iterator[Batch]:
    """Batches through torch's DataLoader, with the configured workers; in pinned memory if there is CUDA."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": "spawn",
            "worker_init_fn": _begin_worker,
        }
    pin, before = loader.pin_memory and cuda, set(multiprocessing.active_children())
    loaded = iter(DataLoader(batches, batch_size=None, num_workers=loader.num_workers, pin_memory=pin, **workers))
    for worker in set(multiprocessing.active_children()) - before:
        atexit.register(worker.kill)  # before multiprocessing asks them to end, by a signal that they do not mind, and waits for that
    return loaded


class _Lane:
    """One row group at a time, cut into windows.

    State, all integers: `group_index` (how many row groups the run had opened before this one; -1 = none yet), `consumed` windows, and
    what the row groups before left over: `leftover_length` tokens, found again as the ends of earlier groups `leftover_from`
    [(group_index, tokens), ...]. The first window contains the whole leftover and always comes first, so once it is consumed
    `leftover_from` is not needed any more.
    """

    def __init__(self, walk: "_Walk") -> None:
        self._walk = walk
        self.group_index = -1
        self.consumed = 0
        self.windows: Ids = np.empty(
            (0, walk.block_size + 1), walk.separator.dtype
        )  # of this row group, in the order in which they are consumed
        self._leftover_length = 1
        self._leftover_from: list[tuple[int, int]] = [(-1, 1)]
        self._rest: Ids = walk.separator  # what leads into the next row group
        self._own = 1  # tokens of this row group

    @property
    def left(self) -> int:
        """Windows of this row group that are not consumed yet."""
        return len(self.windows) - self.consumed

    def take(self, count: int) -> Ids:
        """The next windows, at most as many as are left.   Returns (count, block_size + 1)."""
        self.consumed += count
        return self.windows[self.consumed - count : self.consumed]

    def open(self, group_index: int) -> None:
        """Continue with another row group, whose stream begins with the leftover of this one."""
        if len(self.windows):
            self._leftover_from = [(self.group_index, len(self._rest))]
        elif self.group_index >= 0 and self._own:
            self._leftover_from = [*self._leftover_from, (self.group_index, self._own)]
        self._leftover_length = len(self._rest)
        self.windows = self.windows[:0].copy()  # release the old row group before the new one is read
        self._fill(group_index, self._rest)
        self.consumed = 0

    def state(self) -> list[int]:
        """[group_index, consumed, leftover_length], followed by the pairs of `leftover_from` while they are needed."""
        if self.consumed:
            return [self.group_index, self.consumed, self._leftover_length]
        return [self.group_index, self.consumed, self._leftover_length, *itertools.chain.from_iterable(self._leftover_from)]

    def seek(self, state: list[int]) -> None:
        """Continue from `state`."""
        self.group_index, self.consumed, self._leftover_length, *pairs = state
        self._leftover_from = list(zip(pairs[::2], pairs[1::2], strict=True))
        if self.group_index < 0:
            return
        if self.consumed:
            leftover: Ids = np.zeros(
                self._leftover_length, self._walk.separator.dtype
            )  # its values are in the first window only, which is consumed
        else:
            leftover = np.concatenate([self._walk.group_tokens(index)[-tokens:] for index, tokens in self._leftover_from])
        self._fill(self.group_index, leftover)

    def _fill(self, group_index: int, leftover: Ids) -> None:
        tokens = self._walk.group_tokens(group_index)
        self.group_index, self._own = group_index, len(tokens)
        stream = np.concatenate((leftover, tokens))
        size = self._walk.block_size
        count = (len(stream) - 1) // size
        if count:
            overlapping = np.lib.stride_tricks.sliding_window_view(stream, size + 1)[::size]
            if not self._walk.consecutive:
                later = 1 + shuffled(count - 1, self._walk.seed, group_index + 1)
                overlapping = overlapping[np.concatenate(([0], later))]
            self.windows = overlapping
        self._rest = stream[count * size :].copy()


class _Walk:
    """The lanes, the order in which they open row groups, and whose turn it is."""

    def __init__(self, text: ParquetText, order: Order) -> None:
        self._text = text
        self.separator = text.separator
        self.block_size, self.seed, self.consecutive = order.block_size, order.seed, order.consecutive
        self._parts = -(-order.lanes // len(text.row_groups))  # of a row group, each of which is opened as one is
        self._units = self._parts * len(text.row_groups)
        self._next_group = 0
        self._turn = 0
        self._guaranteed = 0  # windows that every lane has left, at least
        self._lanes = [_Lane(self) for _ in range(order.lanes)]
        self._epoch_order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._ahead = Ahead[Ids]()
        self._recent: dict[int, Ids] = {}  # row groups whose parts are being opened: all lanes come to the next one at about the same time

    def next_windows(self, count: int) -> Ids:
        """The next windows of the run, lane after lane.   Returns (count, block_size + 1).

        While every lane has enough left, each lane's windows are taken at once; the result is the same as taking them one by one.
        """
        lanes = len(self._lanes)
        windows = np.empty((count, self.block_size + 1), self.separator.dtype)
        most = -(-count // lanes)
        if self._guaranteed < most:
            self._guaranteed = min(lane.left for lane in self._lanes)
        if self._guaranteed >= most:
            self._guaranteed -= most
            for row in range(min(lanes, count)):
                windows[row::lanes] = self._lanes[(self._turn + row) % lanes].take((count - row + lanes - 1) // lanes)
            self._turn = (self._turn + count) % lanes
            return windows
        self._guaranteed = 0
        for row in range(count):
            lane = self._lanes[self._turn]
            self._refill(lane)
            windows[row] = lane.take(1)
            self._turn = (self._turn + 1) % lanes
        return windows

    def _refill(self, lane: _Lane) -> None:
        """Open row groups until the lane has a window left."""
        without_window = 0
        while not lane.left:
            if without_window == self._units:
                raise DataError(
                    f"{shown(self._text.root)}: an epoch of training text does not fill one window of block_size {self.block_size}; "
                    f"lower training.block_size or add text"
                )
            lane.open(self._next_group)
            self._next_group += 1
            without_window += 1

    def group_tokens(self, group_index: int) -> Ids:
        """Training text of the row group opened as number `group_index` in the run; -1 is the separator before all text."""
        if group_index < 0:
            return self.separator
        whole, part = divmod(group_index, self._parts)
        if self._text.is_remote:  # also what the lanes will open next
            self._begin([group_index, *range(self._next_group, self._next_group + 1 + len(self._lanes))])
        if self._parts == 1:
            return self._ahead.take(whole, self._reader(whole))
        if whole not in self._recent:
            self._recent = dict([*self._recent.items()][-1:])
            self._recent[whole] = self._ahead.take(whole, self._reader(whole))
        tokens = self._recent[whole]
        return tokens[part * len(tokens) // self._parts : (part + 1) * len(tokens) // self._parts]

    def _begin(self, indices: Iterable[int]) -> None:
        for whole in dict.fromkeys(index // self._parts for index in indices):
            if whole not in self._recent:
                self._ahead.begin(whole, self._reader(whole))

    def _reader(self, whole: int) -> Callable[[], Ids]:
        """whole: number of a row group in the run, counted as if none were cut into parts."""
        groups = self._text.row_groups
        epoch, place = divmod(whole, len(groups))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, shuffled(len(groups), self.seed, -1 - epoch))
        return functools.partial(self._text.training_tokens, groups[self._epoch_order[1][place]])

    def position(self) -> Position:
        return {"next_unit": self._next_group, "turn": self._turn, "lanes": [lane.state() for lane in self._lanes]}

    def epoch(self) -> float:
        """Passes over all row groups so far; an open row group counts by the share of its windows that is consumed."""
        consumed = float(self._next_group - len(self._lanes))
        for lane in self._lanes:
            consumed += lane.consumed / len(lane.windows) if len(lane.windows) else 1 if lane.group_index < 0 else 0
        return consumed / self._units

    def seek(self, position: Position) -> None:
        """Continue from `position`.   Raises DataError for one of another number of lanes."""
        if len(position["lanes"]) != len(self._lanes):
            raise DataError(
                f"{shown(self._text.root)}: the checkpoint read {len(position['lanes'])} places of it at once, not {len(self._lanes)}"
            )
        self._next_group, self._turn = position["next_unit"], position["turn"]
        if self._text.is_remote:
            self._begin(index for state in position["lanes"] for index in (state[0], *state[3::2]) if index >= 0)
        for lane, state in zip(self._lanes, position["lanes"], strict=True):
            lane.seek(state)


def _begin_worker(worker: int) -> None:
    """Ctrl-C and schedulers signal every process, but the trainer decides when its workers end.

    They end at once: an interpreter that takes itself apart aborts where a thread is handing over a batch (torch 2.13.0).
    """
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit.register(leave, 0)
