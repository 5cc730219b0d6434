"""What is reported of text: an evaluation, samples; and text as every store and terminal takes it. Knows nothing of tensors or files."""

import math
from dataclasses import dataclass
from typing import NamedTuple

BYTE_VALUES = 256
"""Smallest vocabulary that holds every byte."""


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


def shortened(text: str, longest: int) -> str:
    """A text of at most so many characters; the end of a shortened one says how many it had."""
    end = f"... ({len(text):,} characters)"
    return text if len(text) <= longest else text[: longest - len(end)] + end


def verbatim(label: str) -> str:
    """A label that matplotlib shows as it is: a dollar sign would start a formula, a leading underscore would hide it."""
    return label.replace("$", r"\$").lstrip("_")


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per byte of text for a loss in nats per token.   bytes_per_token: of the text that it was measured on."""
    return loss / math.log(2) / bytes_per_token


class Sample(NamedTuple):
    """A prompt and its continuation by the model; printed with the continuation in brackets."""

    prompt: str
    written: str

    def __str__(self) -> str:
        return f"{self.prompt}\u27e6{self.written}\u27e7\n"


class LoggedPoint(NamedTuple):
    """A point among the metrics of a run.   at_ms: its time stamp, Unix time in ms."""

    key: str
    value: float
    step: int
    at_ms: int


@dataclass(frozen=True)
class Evaluation:
    """Loss on the validation text after a step.

    loss: nats per token.   logged_at_ms: time stamp of its points among the run's metrics, Unix time in ms.   bytes_per_token: of text.
    """

    step: int
    loss: float
    logged_at_ms: int
    bytes_per_token: float = 1.0

    @property
    def bits_per_byte(self) -> float:
        """The same loss in bits per byte of text."""
        return bits_per_byte(self.loss, self.bytes_per_token)

    @property
    def points(self) -> tuple[LoggedPoint, ...]:
        """Its points among the run's metrics."""
        values = {"val/loss": self.loss, "val/bpb": self.bits_per_byte}
        return tuple(LoggedPoint(key, value, self.step, self.logged_at_ms) for key, value in values.items())
