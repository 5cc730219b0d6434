"""Text to token ids and back: a token is a byte. What is reported of text: an evaluation, samples.

BDH is trained on bytes, so there is no vocabulary to build and no token outside it. Documents are separated by one byte that text does not
contain. Knows nothing of tensors or files.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

VOCAB_SIZE = 256
"""Smallest vocabulary that holds every byte."""

SEPARATOR = 0
"""Token between two documents: NUL, which does not occur in text."""

BYTES_PER_TOKEN = 1.0
"""Bytes of text that one token stands for."""


def encode(text: str) -> list[int]:
    """Token ids of `text`: its UTF-8 bytes; bytes of a command line that are not UTF-8 are kept (surrogateescape)."""
    return list(text.encode("utf-8", "surrogateescape"))


def decode(tokens: list[int]) -> str:
    """Text of `tokens`; bytes that are not UTF-8 become U+FFFD, separators and ids above 255 U+2400 (a visible NUL)."""
    visible = (bytes([t]) if 0 < t < VOCAB_SIZE else "\u2400".encode() for t in tokens)
    return b"".join(visible).decode("utf-8", errors="replace")


def printable(value: object) -> str:
    """Text that any terminal or log takes: bytes of a file name that are not UTF-8, and halves of surrogate pairs, are spelled out."""
    text = str(value)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def storable(text: str) -> str:
    """The same text as any store takes it: printable, and NUL, which PostgreSQL refuses, as U+2400."""
    return printable(text.replace("\0", "\u2400"))


def is_storable(text: str) -> bool:
    """Whether any store takes it as it is."""
    return storable(text) == text


def bits_per_byte(loss: float) -> float:
    """Bits per byte of text for a loss in nats per token."""
    return loss / math.log(2) / BYTES_PER_TOKEN


class Sample(NamedTuple):
    """A prompt and its continuation by the model; printed with the continuation in brackets."""

    prompt: str
    written: str

    def __str__(self) -> str:
        return f"{self.prompt}\u27e6{self.written}\u27e7\n"


@dataclass(frozen=True)
class Evaluation:
    """Loss on the validation text after a step.

    loss: nats per token.   logged_at_ms: time stamp of its points among the run's metrics, Unix time in ms.
    """

    step: int
    loss: float
    logged_at_ms: int

    @property
    def bits_per_byte(self) -> float:
        """The same loss in bits per byte of text."""
        return bits_per_byte(self.loss)
