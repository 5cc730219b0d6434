"""Text to token ids and back: every id stands for certain bytes of text, or for none.

`pieces` lists these bytes by id, and everything else follows from it: decoding is joining, a text can be written as it is generated, the
bytes that a loss was measured on can be counted, and whether a tokenizer gives a text back is a comparison. Tokenizers for which that does
not hold, because decoding depends on the neighbours of a token, are refused (`libraries`). Documents are separated by one token that stands
for no text. Knows nothing of tensors or of where files lie.
"""

import codecs
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bdh_mlflow.errors import ConfigError
from bdh_mlflow.text import BYTE_VALUES
from bdh_mlflow.vocabulary.libraries import LIBRARIES, Library

Ids = npt.NDArray[np.unsignedinteger[Any]]
NO_TEXT = "\u2400"
"""What is shown for a token that stands for no text: a visible NUL."""
CUT_CHARACTERS = 2**18  # longer texts are encoded in parts: libraries keep some hundred bytes for each token until a text is done
BATCH_CHARACTERS = 2**20  # encoded at once, by all cores
SHOWN = 40  # characters of a text in a message


class Encoded(NamedTuple):
    """Texts as ids.   ids: of all, one after the other.   lengths: how many each text has."""

    ids: Ids
    lengths: npt.NDArray[np.int64]


class Tokenizer:
    """The interface, and the tokenizer of bytes, whose ids are the bytes themselves and whose separator is byte 0 (NUL, in no text).

    kind: as in `tokenizer.type`.   file_name, content, digest: of the file that holds it, beside a run's checkpoints; None for bytes.
    size: ids, from 0 on.   separator: the id between two documents.   separator_text: its name.   pieces: bytes of text by id.
    """

    kind = "byte"
    file_name: str | None = None
    content: bytes | None = None
    digest: str | None = None
    size = BYTE_VALUES
    separator = 0
    separator_text: str | None = None
    pieces: Sequence[bytes] = (b"", *(bytes([byte]) for byte in range(1, BYTE_VALUES)))
    _lead = b""  # what encoding puts before a text

    def __reduce__(self) -> Any:
        return "BYTES"

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that holds every id: uint8 for bytes, uint16 or uint32."""
        return np.dtype(np.uint8 if self.content is None else np.uint16 if self.size <= 2**16 else np.uint32)

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of text by id, (size,). The separator counts as one, in every vocabulary, so that bits per byte compare."""
        lengths = np.array([len(piece) for piece in self.pieces], np.int64)
        lengths[self.separator] = 1
        return lengths

    def encode(self, text: str) -> list[int]:
        """Ids of a text; bytes of a command line that are not UTF-8 are kept (surrogateescape).   Raises UnicodeEncodeError."""
        return list(text.encode("utf-8", "surrogateescape"))

    def encode_all(self, texts: Sequence[str]) -> Encoded:
        """Ids of several texts."""
        raws = [text.encode() for text in texts]
        return Encoded(np.frombuffer(b"".join(raws), np.uint8), np.array(list(map(len, raws)), np.int64))

    def losses(self, texts: Sequence[str], encoded: Encoded) -> Iterator[str]:
        """Of each text that its ids do not give back, where the two differ.   encoded: of these texts."""
        yield from ()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, ids that stand for no text NO_TEXT."""
        return b"".join(map(self._visible, ids)).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The same as ids come; a character of several tokens is yielded when it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self._visible(token))
        yield decoder.decode(b"", final=True)

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        """How many bytes of text ids stand for, separators included."""
        return int(np.bincount(ids.reshape(-1), minlength=self.size)[: self.size] @ self.lengths)

    def bytes_of_targets(self, windows: npt.NDArray[Any]) -> int:
        """How many bytes of text the predicted tokens of windows (B, T + 1) stand for; what encoding puts before a document is none."""
        begins = (windows[:, :-1] == self.separator) & (windows[:, 1:] != self.separator)
        return self.bytes_of(windows[:, 1:]) - len(self._lead) * int(begins.sum())

    def _visible(self, token: int) -> bytes:
        piece = self.pieces[token] if 0 <= token < self.size else b""
        return piece or NO_TEXT.encode()


BYTES = Tokenizer()
"""Bytes are tokens."""


class _OfLibrary(Tokenizer):
    """The tokenizer in a library's own file.   separator: name of the token between documents, None for the library's own."""

    def __init__(self, kind: str, content: bytes, separator: str | None, where: str) -> None:
        library: Library = LIBRARIES[kind](content, where)
        self.kind, self.content, self.file_name = kind, content, FILE_NAMES[kind]
        self.digest = hashlib.sha256(content).hexdigest()[:32]
        self.pieces, self.size = library.pieces, len(library.pieces)
        if not any(self.pieces):
            raise ConfigError(f"{where}: no token stands for any text: an empty vocabulary")
        self.separator_text, self.separator = _separator(library, separator, where)
        self._encode, self._joins = library.encode, library.joins
        self._where = where
        self._lead = self._before_text()

    def __reduce__(self) -> Any:
        return _OfLibrary, (self.kind, self.content, self.separator_text, self._where)

    def encode(self, text: str) -> list[int]:
        text.encode()  # a half of a surrogate pair is refused by all libraries, each in its own way
        return list(itertools.chain.from_iterable(self._encode(self._parts(text)))) if text else []

    def encode_all(self, texts: Sequence[str]) -> Encoded:
        parts = [self._parts(text) for text in texts]
        encoded = list(self._in_batches([part for each in parts for part in each]))
        sizes = iter(map(len, encoded))
        lengths = np.array([sum(itertools.islice(sizes, len(each))) for each in parts], np.int64)
        return Encoded(np.concatenate(encoded) if encoded else np.empty(0, self.dtype), lengths)

    def losses(self, texts: Sequence[str], encoded: Encoded) -> Iterator[str]:
        end = 0
        for text, length in zip(texts, encoded.lengths.tolist(), strict=True):
            start, end = end, end + length
            given, raw = b"".join(map(self.pieces.__getitem__, encoded.ids[start:end].tolist())), text.encode()
            if given != self._lead * bool(raw) + raw:
                yield _difference(text, given.decode(errors="replace"))

    def _in_batches(self, parts: Sequence[str]) -> Iterator[Ids]:
        """Ids of each part; what a library keeps of a text besides is gone before the next batch is begun."""
        start = 0
        while start < len(parts):
            end, characters = start, 0
            while end < len(parts) and (end == start or characters + len(parts[end]) <= BATCH_CHARACTERS):
                characters += len(parts[end])
                end += 1
            yield from [np.array(ids, self.dtype) for ids in self._encode(parts[start:end])]
            start = end

    def _parts(self, text: str) -> list[str]:
        """A text, or where that gives the same back, a long one cut behind line ends."""
        parts, start = [], 0
        while self._joins and len(text) - start > CUT_CHARACTERS:
            end = 1 + text.rfind("\n", start, start + CUT_CHARACTERS)
            end = end if end > start else start + CUT_CHARACTERS
            parts.append(text[start:end])
            start = end
        return [*parts, text[start:]]

    def _before_text(self) -> bytes:
        """What encoding puts before a text: a space, or nothing."""
        given = b"".join(self.pieces[token] for token in next(iter(self._encode(["a"]))))
        return b" " if given.startswith(b" ") else b""


FILE_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken.json"}
"""What a tokenizer's file is called beside the checkpoints of a run."""


def of_content(kind: str, content: bytes, separator: str | None, where: str) -> Tokenizer:
    """The tokenizer that a file's bytes hold.   kind: as in `tokenizer.type`.   where: names the file in messages.

    Raises ConfigError for a file of another kind or a damaged one, and for one whose tokens do not stand for bytes of text.
    """
    return _OfLibrary(kind, content, separator, where)


def _separator(library: Library, wanted: str | None, where: str) -> tuple[str, int]:
    for name in (wanted,) if wanted is not None else library.separators:
        if (token := library.find(name)) is not None:
            return name, token
    if wanted is not None:
        raise ConfigError(f"{where}: no token `{wanted}` (tokenizer.separator); name one of its tokens, or null for its own end of a text")
    known = ", ".join(library.separators)
    raise ConfigError(f"{where}: none of its tokens is known to end a text ({known}); name one: tokenizer.separator")


def _difference(text: str, given: str) -> str:
    """Where a text and what a tokenizer gives back for it part."""
    place = next((i for i, (a, b) in enumerate(zip(text, given, strict=False)) if a != b), min(len(text), len(given)))
    start = max(0, place - SHOWN // 4)
    return f"for {text[start : start + SHOWN]!r} it gives {given[start : start + SHOWN]!r} back"
