"""What a vocabulary makes of a folder's text: how much of it there is, and how often each token occurs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bdh_mlflow.data.parquet import ParquetText, shuffled

LEARN_BYTES = 200 * 2**20  # of text that a vocabulary is learned from; more changes it hardly, and a pair count of each word is in memory
DRAWN = 0x766F63  # "voc"; a constant seed, as a vocabulary must not depend on the run


@dataclass(frozen=True)
class Usage:
    """counts: by id, (size,), over `tokens` tokens that stand for `bytes` bytes of text, separators included."""

    counts: npt.NDArray[np.int64]
    bytes: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.counts.sum())

    @property
    def bytes_per_token(self) -> float:
        """Of text, on average; NaN for no text."""
        return self.bytes / self.tokens if self.tokens else math.nan

    @property
    def coverage(self) -> float:
        """Share of the ids that occur."""
        return float(np.count_nonzero(self.counts)) / len(self.counts)


def training_texts(text: ParquetText, most_bytes: int = LEARN_BYTES) -> Iterator[str]:
    """Training documents of row groups in a drawn order, always the same, until they are `most_bytes` or all."""
    size = 0
    for number in shuffled(len(text.row_groups), DRAWN, 0):
        for document in text.training_texts(text.row_groups[number]):
            yield document
            size += len(document.encode())
        if size >= most_bytes:
            return


def usage(text: ParquetText, *, validation: bool, most_bytes: int = LEARN_BYTES) -> Usage:
    """Tokens of the training or the validation documents, of as many row groups as hold `most_bytes`, in the same order."""
    tokenizer = text.tokenizer
    counts, size = np.zeros(tokenizer.size, np.int64), 0
    for number in shuffled(len(text.row_groups), DRAWN, 0):
        group = text.row_groups[number]
        ids = text.validation_tokens(group) if validation else text.training_tokens(group)
        counts += np.bincount(ids, minlength=tokenizer.size)
        size += tokenizer.bytes_of(ids)
        if size >= most_bytes:
            break
    return Usage(counts, size)
