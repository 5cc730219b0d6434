"""Sources of text to documents: plain text, source code, jsonl and JSON, parquet, each also compressed, alone or in folders.

How a file is packed and encoded is told by its first bytes, what it holds by its name. A document is text: what would be the bytes or the
markup of a format instead (tables, web pages, images, archives) is refused where the file was named by the user, and skipped with a
reason where it lies in a folder. Damaged data is an error in both.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from bdh_mlflow.data import columns
from bdh_mlflow.data.folder import is_parquet, kind_of, list_files
from bdh_mlflow.data.remote import AnyPath, place_of
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.text import printable

TEXT_DOCUMENT_BYTES = 16 * 2**10  # plain text is cut into documents of about this size, at line ends;
TEXT_DOCUMENTS, TEXT_DOCUMENT_LEAST_BYTES = 64, 512  # a short text into about 64, so that some can be held out for validation
PYTHON_STDLIB = "python-stdlib"
"""Source that stands for the Python sources of the running interpreter's standard library: real text without a network."""
ACCEPTED = f"{PYTHON_STDLIB}, a txt, jsonl, json or parquet file, or a folder, here or in a bucket"
NAMED_SKIPPED = 3  # files, in a message

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_COMPRESSED = {  # first bytes, and the endings of names that promise them
    rb"\x1f\x8b": (".gz", ".gzip"),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": (".bz2",),
    rb"\xfd7zXZ\0": (".xz",),
    rb"\x28\xb5\x2f\xfd": (".zst", ".zstd"),
    rb"\x04\x22\x4d\x18": (".lz4",),
}
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw), "zstd"),
    ".lz4": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw), "lz4"),
}
_ENDINGS = tuple(ending for endings in _COMPRESSED.values() for ending in endings)
_FORMATS = {  # whose bytes are not text although some have no NUL byte: first bytes, and what to do
    rb"PK\x03\x04|7z\xbc\xaf|Rar!|.{257}ustar": "an archive or office document; unpack it and name the folder, or save its text as .txt",
    rb"%PDF-|%!PS|\{\\rtf": "a document with layout; save its text as .txt",
    rb"version https://git-lfs\.github\.com/spec/": "a pointer of git LFS, not the file itself; run: git lfs pull",
    rb"PAR1": "compressed parquet; decompress it first",
}
_MARKUP = {
    **dict.fromkeys((".csv", ".tsv", ".psv"), "a table; save its text column as jsonl or parquet"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml", ".xml", ".rss", ".svg"), "markup; save its text as .txt"),
    **dict.fromkeys((".ipynb", ".geojson"), "JSON without documents; save its text as .txt"),
}
_ENCODINGS = {  # by byte-order mark; UTF-32 first, as its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x19\x1c-\x1f]")  # in no text: a file with one of them that is not UTF-8 is no old text either
_DAMAGED = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowException)


class _NotText(Exception):
    """A file that holds no documents; says why and what to do."""


class _NotJson(Exception):
    """Why a text is not JSON that can be read."""


class Meter:
    """How much of a source is read, by the bytes of its files: for progress, which needs no more than that."""

    def __init__(self) -> None:
        self._total = self._done = self._size = 0
        self._place: Callable[[], float] = lambda: 0.0  # in the file at hand

    @property
    def share(self) -> float:
        """Between 0 and 1; 0 as long as nothing is known."""
        try:
            place = self._place()
        except (OSError, ValueError):  # the file at hand is closed: all of it was read
            place = self._size
        return min(1.0, (self._done + place) / self._total) if self._total else 0.0

    def expect(self, files: Sequence[AnyPath]) -> None:
        """These files will be read."""
        self._total = sum(map(_size, files))

    def begin(self, file: AnyPath, place: Callable[[], float]) -> None:
        """A file is read now; `place` tells how many of its bytes are behind."""
        self._done, self._size, self._place = self._done + self._size, _size(file), place

    def move(self, place: float) -> None:
        """As many bytes of the file at hand are behind."""
        self._place = lambda: place


def _size(file: AnyPath) -> int:
    if not isinstance(file, Path):
        return file.bytes or 0
    try:
        return file.stat().st_size
    except OSError:  # named when it is opened
        return 0


def documents(source: str, column: str, skipped: list[tuple[str, str]], meter: Meter | None = None) -> Iterator[str]:
    """The documents of a source, none of them empty.   skipped: gets the name and reason of each file that is left out.

    A folder's text files are a document each; a single text file is cut at line ends into documents of 16 KiB or little more.
    Raises DataError: at once if there is no such source, later for what cannot be read.
    """
    meter = meter or Meter()
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = list_files(root, lambda name: _passed_over(name) or name in _TEST_FOLDERS).files
        return _from_files([p for p in found if p.suffix == ".py"], column, skipped, meter)
    if not source.strip():
        raise DataError(f"{source!r}: a source without a name; accepted: {ACCEPTED}")
    path = place_of(source)
    found_there = kind_of(path)
    if found_there == "file":
        return _from_file(path, column, meter)
    if found_there == "folder":
        listing = list_files(path, _passed_over)
        skipped += [(printable(p), reason) for p, reason in listing.unreadable]
        return _from_files(listing.files, column, skipped, meter)
    what = "no such file or folder" if found_there == "nothing" else found_there
    raise DataError(f"{printable(source)}: {what}; accepted: {ACCEPTED}")


def listed(skipped: Sequence[tuple[str, str]]) -> str:
    """The first skipped files with their reasons, for the end of a message."""
    shown = [f"skipped {name}: {reason}" for name, reason in skipped[:NAMED_SKIPPED]]
    more = [f"and {len(skipped) - NAMED_SKIPPED:,} more"] if len(skipped) > NAMED_SKIPPED else []
    return "".join(f"; {line}" for line in shown + more)


def _passed_over(name: str) -> bool:
    """Hidden, installed rather than written, or of an unfinished preparation."""
    return name.startswith(".") or name in _SKIPPED_FOLDERS or (is_parquet(name) and name.startswith("_"))


def _from_files(files: Sequence[AnyPath], column: str, skipped: list[tuple[str, str]], meter: Meter) -> Iterator[str]:
    meter.expect(files)
    for file in files:
        try:
            yield from _read(file, column, meter, cut=False)
        except _NotText as reason:
            skipped.append((shown(file), str(reason)))


def _from_file(file: AnyPath, column: str, meter: Meter) -> Iterator[str]:
    meter.expect([file])
    try:
        yield from _read(file, column, meter, cut=True)
    except _NotText as reason:
        raise DataError(f"{shown(file)}: no text found: {reason}; accepted: {ACCEPTED}") from None


def _read(file: AnyPath, column: str, meter: Meter, *, cut: bool) -> Iterator[str]:
    """Documents of a file.   cut: plain text into several. Raises _NotText before the first document, or DataError."""
    name = file.name.lower()
    inner = name.removesuffix(next((e for e in _ENDINGS if name.endswith(e)), ""))
    with _reported(file), file.open("rb") as raw:
        meter.begin(file, raw.tell)
        head = raw.read(512)
        if is_parquet(name) or (head.startswith(b"PAR1") and _ends_in(raw, b"PAR1")):
            yield from _from_parquet(file, column, meter)
            return
        with _decompressed(raw, head, inner != name) as content:
            head = content.peek(512)
            for pattern, reason in _FORMATS.items():
                if re.match(pattern, head, re.DOTALL):
                    raise _NotText(reason)
            suffix = Path(inner).suffix
            if suffix in _MARKUP:
                raise _NotText(_MARKUP[suffix])
            if suffix in (".jsonl", ".ndjson"):
                with io.TextIOWrapper(content, _encoding(head) or "utf-8") as lines:
                    yield from _from_lines(file, lines, column)
            elif suffix == ".json":
                yield from _from_json(file, _text(content.read()), column)
            else:
                text = _text(content.read())
                yield from _cut(text) if cut else [text] * bool(text)


@contextlib.contextmanager
def _reported(file: AnyPath) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{shown(file)}: cannot be read: {reason_of(error)}") from None


def _ends_in(raw: BinaryIO, ending: bytes) -> bool:
    raw.seek(-len(ending), io.SEEK_END)
    return raw.read() == ending


def _decompressed(raw: io.BufferedReader, head: bytes, promised: bool) -> io.BufferedReader:
    """What a file holds, read from its beginning.   promised: whether its name says that it is compressed."""
    raw.seek(0)
    ending = next((endings[0] for pattern, endings in _COMPRESSED.items() if re.match(pattern, head, re.DOTALL)), None)
    if ending is None:
        if promised and not any(re.match(pattern, head, re.DOTALL) for pattern in _FORMATS):
            raise OSError("not compressed, although its name says so; rename it if it is plain text, or restore it")
        return raw
    return io.BufferedReader(_OPENERS[ending](raw))


def _encoding(head: bytes) -> str | None:
    return next((encoding for mark, encoding in _ENCODINGS.items() if head.startswith(mark)), None)


def _text(raw: bytes) -> str:
    """By the byte-order mark, or UTF-8, or Latin-1 where that can be text.   Raises _NotText for other bytes."""
    if encoding := _encoding(raw[:4]):
        return raw.decode(encoding)
    if b"\0" in raw:
        raise _NotText("binary")
    text = _old_text(raw)
    if _CONTROL.search(raw) and len(text) == len(raw) and not raw.isascii():
        raise _NotText("binary")
    return text


def _old_text(raw: bytes) -> str:
    """UTF-8, or Latin-1, which reads every byte, for the old texts that are not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _cut(text: str) -> Iterator[str]:
    enough = min(TEXT_DOCUMENT_BYTES, max(TEXT_DOCUMENT_LEAST_BYTES, len(text) // TEXT_DOCUMENTS))
    piece: list[str] = []
    size = 0
    for line in io.StringIO(text, newline=""):  # ends at \n, \r or both, which stay; str.splitlines would also cut within lines
        piece.append(line)
        size += len(line)
        if size >= enough:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _from_lines(file: AnyPath, lines: Iterable[str], column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{shown(file)}, line {number}"
            try:
                record = _parsed(line, column)
            except _NotJson as reason:
                raise DataError(f"{place}: {reason}") from None
            yield from _document(record, column, place)


def _from_json(file: AnyPath, text: str, column: str) -> Iterator[str]:
    """An array of records, one record, or a record a line.   Raises _NotText for JSON that holds anything else."""
    if not text.strip():
        return
    lines: list[str] = []
    try:
        whole = _parsed(text, column)
        records = whole if isinstance(whole, list) else [whole]
    except _NotJson as reason:
        lines = text.split("\n")
        try:
            records = [_parsed(next(line for line in lines if line.strip()), column)]
        except _NotJson:
            raise _NotText(str(reason)) from None
    if not (records and isinstance(records[0], Mapping) and isinstance(records[0].get(column), str)):
        raise _NotText(f"JSON that does not hold records with text under `{column}`; set dataset.text_column, or --column")
    if lines:
        yield from _from_lines(file, lines, column)
        return
    for number, record in enumerate(records, start=1):
        yield from _document(record, column, f"{shown(file)}, record {number}")


def _parsed(text: str, column: str) -> Any:
    """A value of JSON.   Raises _NotJson."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == column for name, _ in pairs) > 1:
            raise _NotJson(f"an object with several fields `{column}`; keep one of them")
        return dict(pairs)

    twice = text.count(f'"{column}"') > 1  # seldom in a line; to look at every object takes longer than to parse it
    try:
        return json.loads(text, parse_int=float, object_pairs_hook=unique if twice else None)  # int refuses 5,000 digits
    except json.JSONDecodeError as error:
        raise _NotJson(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise _NotJson("not JSON that can be read: nested too deeply") from None


def _document(record: Any, column: str, place: str) -> Iterator[str]:
    """The text of a record, unless it is empty or null."""
    if not isinstance(record, Mapping) or not isinstance(record.get(column), str | None):
        raise DataError(f"{place}: expected an object with text under `{column}`; set dataset.text_column")
    if column not in record:
        fields = ", ".join(printable(name) for name in record)
        raise DataError(f"{place}: no field `{column}`; it has {fields or 'none'}. Set dataset.text_column")
    if record[column]:
        yield record[column].encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, UTF-8 cannot


def _from_parquet(file: AnyPath, column: str, meter: Meter) -> Iterator[str]:
    size, groups, *_ = columns.footer(file, column)
    for number, (rows, _) in enumerate(groups):
        meter.move(size * number / len(groups))
        for document in columns.read_row_group(file, number, column, rows):
            if raw := document.as_py():
                yield _old_text(raw)
