"""Windows of validation text, the same for every run on the same data: for evaluations of single windows, and of rows that read on."""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bdh_mlflow.data.ahead import Ahead
from bdh_mlflow.data.parquet import ParquetText, shuffled
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
from bdh_mlflow.vocabulary import Ids

ROW_GROUPS = 16  # read for validation text, at least
ORDER = 0x76616C  # "val"; a constant seed, as validation text must not depend on the run


def drawn(text: ParquetText, batches: int, batch_size: int, block_size: int) -> list[Tensor]:
    """`batches` batches of validation windows, each (B, block_size + 1) ids; fewer, the last smaller, if there is less text.

    Windows are drawn from at least ROW_GROUPS row groups (all, if there are fewer), so that they represent more than one file. None where
    dataset.val_fraction is 0. Raises DataError for text that is shorter than a window.
    """
    if text.val_fraction == 0:
        return []
    wanted = batches * batch_size
    windows = _windows(text, wanted, block_size)
    chosen = windows[shuffled(len(windows), ORDER, 1)[:wanted]]
    return list(torch.split(torch.from_numpy(chosen), batch_size))


def stream(text: ParquetText, batches: int, batch_size: int, block_size: int) -> list[Tensor]:
    """Windows of rows that read on: row b of a batch begins where row b of the one before ended. Else as `drawn`.

    Where there is less text than asked for there are fewer rows, and at last fewer batches of one row.
    """
    if text.val_fraction == 0:
        return []
    windows = _windows(text, batches * batch_size, block_size)
    rows = max(1, min(batch_size, len(windows) // batches))
    each = len(windows) // rows
    return [torch.from_numpy(windows[number : number + each * rows : each].copy()) for number in range(min(batches, each))]


def _windows(text: ParquetText, wanted: int, block_size: int) -> npt.NDArray[np.generic]:
    """Of text that is enough for so many of them, if there is as much, in its order: (windows, block_size + 1)."""
    parts: list[Ids] = [text.separator]
    length, groups, ahead = 1, shuffled(len(text.row_groups), ORDER, 0), Ahead[Ids]()
    for read, group in enumerate(groups):
        if read >= ROW_GROUPS and length > wanted * block_size:
            break
        if text.is_remote and not read % ROW_GROUPS:
            for later in groups[read : read + ROW_GROUPS]:
                ahead.begin(later, functools.partial(text.validation_tokens, text.row_groups[later]))
        parts.append(ahead.take(group, functools.partial(text.validation_tokens, text.row_groups[group])))
        length += len(parts[-1])
    if length <= block_size:
        raise DataError(
            f"{shown(text.root)}: validation text has {length - 1} tokens, block_size {block_size} needs more; "
            f"raise dataset.val_fraction (now {text.val_fraction}), lower training.block_size or add text"
        )
    return np.lib.stride_tricks.sliding_window_view(np.concatenate(parts), block_size + 1)[::block_size]
