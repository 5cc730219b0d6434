"""One parquet file: what its footer says, and a column of a row group as documents or as lists of tokens, checked.

Damaged files make pyarrow raise almost anything; here it becomes a DataError that names file and row group.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bdh_mlflow.data import remote
from bdh_mlflow.data.remote import AnyPath, RemotePath
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import first_line, shown
from bdh_mlflow.text import printable
from bdh_mlflow.vocabulary import Ids

FOOTERS_AT_ONCE = 16  # asked of a bucket
TOKENS = "tokens"
"""Column of the lists of tokens that a preparation puts beside the text."""
TOKENIZER_KEY = b"bdh.tokenizer"
"""Under which a parquet file says whose tokens it holds: the digest of the tokenizer."""


LOSSY_KEY = b"bdh.lossy"
"""Says that documents were prepared although the tokenizer does not give them back."""


class RowGroup(NamedTuple):
    """Place of a row group.   file: index among the sorted files.   number: in the file.   first_row: number in the file.   rows: count."""

    file: int
    number: int
    first_row: int
    rows: int


def separated(ids: Ids, lengths: npt.NDArray[np.int64], separator: Ids) -> Ids:
    """Documents, one after the other, with a separator behind each.   lengths: ids of each, (documents,).   separator: (1,)."""
    ends = np.cumsum(lengths + 1) - 1
    stream = np.empty(len(ids) + len(lengths), separator.dtype)
    of_text = np.ones(len(stream), np.bool_)
    of_text[ends] = False
    stream[of_text] = ids
    stream[ends] = separator
    return stream


class Footer(NamedTuple):
    """What the end of a parquet file says.   bytes: of the file.   groups: rows and uncompressed bytes of each row group.   tokens_of:
    digest of the tokenizer whose tokens are in it.   lossy: some may not give their text back.
    """

    bytes: int
    groups: list[tuple[int, int]]
    tokens_of: str | None
    lossy: bool


def footer(file: AnyPath, column: str) -> Footer:
    """What the end of a parquet file says.

    Raises DataError for a file that is damaged or has no such column of text.
    """
    try:
        with _opened(file) as (opened, size):
            schema, metadata = opened.schema_arrow, opened.metadata
    except Exception as error:  # damaged bytes make pyarrow raise almost anything
        raise DataError(f"{shown(file)}: not a readable parquet file: {first_line(error)}") from None
    return Footer(size, described(file, schema, metadata, column), *tokens_in(schema))


def tokens_in(schema: pa.Schema) -> tuple[str | None, bool]:
    """Digest of the tokenizer whose tokens a file holds, None if it holds none; and whether some may not give their text back."""
    metadata = schema.metadata or {}
    digest = metadata.get(TOKENIZER_KEY) if TOKENS in schema.names else None
    return (digest.decode(errors="replace"), LOSSY_KEY in metadata) if digest is not None else (None, False)


def described(file: AnyPath, schema: pa.Schema, metadata: pq.FileMetaData, column: str) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group.   Raises DataError for a file without such a column of text."""
    try:
        each = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        groups = [(group.num_rows, group.total_byte_size) for group in each]
    except Exception as error:  # damaged bytes make pyarrow raise almost anything
        raise DataError(f"{shown(file)}: not a readable parquet file: {first_line(error)}") from None
    names = [printable(name) for name in schema.names]
    if column not in schema.names:
        raise DataError(f"{shown(file)}: no column `{printable(column)}`; it has {', '.join(names) or 'none'}. Set dataset.text_column")
    if (count := schema.names.count(column)) > 1:
        raise DataError(f"{shown(file)}: {count} columns are named `{column}`; rename all but the one with the text")
    kind = schema.field(column).type
    if not _is_text(kind):
        raise DataError(f"{shown(file)}: column `{column}` holds {kind}; accepted: string, binary or a dictionary of them")
    if any(rows < 0 for rows, _ in groups):
        raise DataError(f"{shown(file)}: not a readable parquet file: a row group with a negative number of rows")
    return groups


class Reader:
    """Footers, and columns of row groups, of files here or in a bucket.

    The footers of a bucket's files are kept, as each would be asked for again with each row group.

    column: of the text.   say: called with a line for the user while a bucket does not answer.
    """

    def __init__(self, column: str, say: remote.Say) -> None:
        self._column, self._say = column, say
        self._footers: dict[RemotePath, pq.FileMetaData] = {}
        self._open: dict[RemotePath, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker, which opens files and tells of outages itself."""
        return {**vars(self), "_open": {}, "_say": remote.to_stderr}

    def footers(self, files: Sequence[AnyPath]) -> Iterator[Footer]:
        """Of all files, in their order; those of a bucket side by side.   Raises DataError."""
        if not any(isinstance(file, RemotePath) for file in files):
            yield from (footer(file, self._column) for file in files)
            return
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            yield from pool.map(self._remote_footer, [file for file in files if isinstance(file, RemotePath)])

    def documents(self, file: AnyPath, group: RowGroup) -> pa.LargeBinaryArray:
        """The text of a row group as bytes, some null or empty.   Raises DataError."""
        return documents(file, group.number, self._read(file, group.number, self._column), group.rows)

    def token_lists(self, file: AnyPath, group: RowGroup, size: int) -> pa.LargeListArray:
        """The tokens of a row group, as a preparation has made them.   size: ids of the tokenizer.   Raises DataError."""
        return token_lists(file, group, self._read(file, group.number, TOKENS), size)

    def _read(self, file: AnyPath, number: int, column: str) -> pa.ChunkedArray:
        if not isinstance(file, RemotePath):
            return read_column(file, number, column)

        def read() -> pa.ChunkedArray:
            with pq.ParquetFile(self._opened(file), metadata=self._footers[file], pre_buffer=True) as parquet:
                return parquet.read_row_group(number, columns=[column]).column(column)

        return remote.patiently(read, file, self._say, remote.READ_S)

    def _remote_footer(self, file: RemotePath) -> Footer:
        metadata = self._footers[file] = remote.patiently(lambda: pq.read_metadata(self._opened(file)), file, self._say, remote.START_S)
        assert file.bytes is not None, "it was listed"
        schema = metadata.schema.to_arrow_schema()
        return Footer(file.bytes, described(file, schema, metadata, self._column), *tokens_in(schema))

    def _opened(self, file: RemotePath) -> Any:
        if file not in self._open:
            self._open[file] = remote.opened(file)
        return self._open[file]


def read_row_group(file: AnyPath, number: int, column: str, rows: int) -> pa.LargeBinaryArray:
    """Documents of a row group as bytes, some null or empty.   rows: as the footer says. Raises DataError for damaged pages."""
    return documents(file, number, read_column(file, number, column), rows)


def read_column(file: AnyPath, number: int, column: str) -> pa.ChunkedArray:
    """A column of a row group.   Raises DataError for damaged pages."""
    try:
        with _opened(file) as (opened, _):
            return opened.read_row_group(number, columns=[column]).column(column)
    except Exception as error:  # damaged bytes make pyarrow raise almost anything
        raise DataError(f"{shown(file)}: row group {number} cannot be read: {first_line(error)}") from None


def token_lists(file: AnyPath, group: RowGroup, lists: pa.ChunkedArray, size: int) -> pa.LargeListArray:
    """A column of token lists, checked.   size: ids of the tokenizer. Raises DataError for damaged pages and ids that there are not."""
    where = f"{shown(file)}: row group {group.number}"
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise DataError(f"{where}: column `{TOKENS}` holds {lists.type}, no lists; prepare the folder again")
    try:
        found = lists.cast(pa.large_list(lists.type.value_type)).combine_chunks()
        found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
        found.validate()
        ids = found.flatten()
        highest = pc.max(ids).as_py() or 0 if pa.types.is_unsigned_integer(ids.type) else None
    except Exception as error:  # damaged bytes make pyarrow raise almost anything
        raise DataError(f"{where} cannot be read: {first_line(error)}") from None
    if len(found) != group.rows:
        raise DataError(f"{where} cannot be read: it holds {len(found)} rows, its footer says {group.rows}")
    if highest is None or ids.null_count:
        raise DataError(f"{where}: column `{TOKENS}` holds {lists.type}{', some null' if ids.null_count else ''}; prepare the folder again")
    if highest >= size:
        raise DataError(f"{where}: token {highest} in column `{TOKENS}`, the tokenizer has {size:,}; prepare the folder again")
    return found


def documents(file: AnyPath, number: int, texts: pa.ChunkedArray, rows: int) -> pa.LargeBinaryArray:
    """A column of text as bytes.   Raises DataError for damaged pages."""
    try:
        if pa.types.is_dictionary(texts.type):
            texts = texts.cast(texts.type.value_type)
        texts = texts.cast(pa.large_binary())
        documents = texts.chunk(0) if texts.num_chunks == 1 else texts.combine_chunks()
        documents.validate()
    except Exception as error:  # damaged bytes make pyarrow raise almost anything
        raise DataError(f"{shown(file)}: row group {number} cannot be read: {first_line(error)}") from None
    if len(documents) != rows:
        raise DataError(f"{shown(file)}: row group {number} cannot be read: it holds {len(documents)} rows, its footer says {rows}")
    return documents


def _is_text(kind: pa.DataType) -> bool:
    t = pa.types
    if t.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (t.is_string, t.is_large_string, t.is_binary, t.is_large_binary, t.is_string_view, t.is_binary_view)
    return any(test(kind) for test in tests)


@contextlib.contextmanager
def _opened(file: AnyPath) -> Iterator[tuple[pq.ParquetFile, int]]:
    """A parquet file and its size; opened by Python, as pyarrow takes no file name that is not UTF-8."""
    if isinstance(file, RemotePath):
        with remote.opened(file) as raw, pq.ParquetFile(raw, pre_buffer=True) as opened:
            yield opened, raw.size()
        return
    with file.open("rb") as raw, pq.ParquetFile(raw) as opened:
        yield opened, file.stat().st_size
