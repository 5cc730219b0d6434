"""Documents to parquet files: row groups of 4 MiB of text, with their tokens beside it where there is a vocabulary.

The files are a function of documents and tokenizer alone: processes that make tokens get row groups and give them back in order. What was
finished when a process was killed is known by `progress.json` in the folder, and is not made again if the documents are still the same.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bdh_mlflow.data.columns import LOSSY_KEY, TOKENIZER_KEY, TOKENS
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import atomic_write
from bdh_mlflow.host import ENDING_SIGNALS
from bdh_mlflow.vocabulary import Encoded, Tokenizer

ROW_GROUP_BYTES = 4 * 2**20  # of text: small enough to keep several in memory, large enough to shuffle within
SHARD_BYTES = 256 * 2**20  # of text in a prepared file
SHARD_BYTES_WITH_TOKENS = 64 * 2**20  # a kill costs at most as much, half a minute of a core
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Tokenizing:
    """How tokens are made.   processes: that make them.   lossy: keep documents that are not given back."""

    tokenizer: Tokenizer
    processes: int = 1
    lossy: bool = False


@dataclass(frozen=True)
class Layout:
    """What a prepared file holds.   column: of the text.   tokenizing: None leaves it text alone.   source: what it is prepared from."""

    column: str
    tokenizing: Tokenizing | None
    source: str

    def __post_init__(self) -> None:
        """Raises DataError for a column that the tokens would need."""
        if self.tokenizing is not None and self.column == TOKENS:
            raise DataError(f"column {TOKENS}: the tokens go into a column of that name; give the text another one, as in --column text")

    @property
    def schema(self) -> pa.Schema:
        """Of the files."""
        text = pa.field(self.column, pa.string())
        if self.tokenizing is None:
            return pa.schema([text])
        tokenizer = self.tokenizing.tokenizer
        tokens = pa.field(TOKENS, pa.list_(pa.from_numpy_dtype(tokenizer.dtype)))
        lossy = {LOSSY_KEY: "true"} if self.tokenizing.lossy else {}
        return pa.schema([text, tokens], {TOKENIZER_KEY: str(tokenizer.digest), **lossy})

    def key(self) -> dict[str, str | bool | None]:
        """What must be the same for a preparation that goes on."""
        digest, lossy = (self.tokenizing.tokenizer.digest, self.tokenizing.lossy) if self.tokenizing is not None else (None, False)
        return {"source": self.source, "column": self.column, "tokenizer": digest, "lossy": lossy}


@dataclass(frozen=True)
class Written:
    """What is in the files by now.   bytes: of text.   lossy: documents that the tokenizer does not give back.   sha256: of all text."""

    documents: int = 0
    bytes: int = 0
    files: int = 0
    tokens: int = 0
    lossy: int = 0
    sha256: str = ""


class CutShortError(DataError):
    """Ended by something outside of the text, so that what is finished is as good as before."""


OnProgress = Callable[[Written], None]


class _Group(NamedTuple):
    """A row group.   lost: of each document that is not given back, where it differs."""

    texts: list[str]
    encoded: Encoded | None
    lost: list[str]


def write(documents: Iterable[str], folder: Path, layout: Layout, on_progress: OnProgress) -> Written:
    """Write documents to parquet files in a folder, going on behind those that an earlier process has finished there.

    Raises DataError for a document that the tokenizer does not give back, unless that is accepted, and for other documents than before.
    """
    tokenizing, schema = layout.tokenizing, layout.schema
    shard_bytes = SHARD_BYTES if tokenizing is None else SHARD_BYTES_WITH_TOKENS
    done, digest, texts = Written(), hashlib.sha256(), row_groups(documents)
    before = _finished(folder, layout)
    if before is not None:
        _skip(texts, digest, before, layout.source, folder)
        done = before
    with contextlib.closing(_encoded(texts, tokenizing)) as groups:
        while (first := next(groups, None)) is not None:
            shard_end = done.bytes + shard_bytes
            file, partial = folder / f"part-{done.files:05d}.parquet", folder / f"part-{done.files:05d}.partial"
            with partial.open("wb") as opened, pq.ParquetWriter(opened, schema, compression="zstd") as shard:
                group: _Group | None = first  # opened by Python, as pyarrow takes no file name that is not UTF-8
                while group is not None:
                    _refuse_lost(group, done, tokenizing)
                    shard.write_table(_table(group, schema), row_group_size=len(group.texts))
                    done = _counted(done, group, digest)
                    on_progress(done)
                    group = next(groups, None) if done.bytes < shard_end else None
            done = Written(**{**asdict(done), "files": done.files + 1, "sha256": digest.hexdigest()})
            partial.replace(file)
            if tokenizing is not None:
                _note_progress(folder, layout, done)
    (folder / PROGRESS).unlink(missing_ok=True)
    return done


def row_groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in row groups of ROW_GROUP_BYTES or little more."""
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.encode())
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _counted(done: Written, group: _Group, digest: Any) -> Written:
    size = 0
    for text in group.texts:
        raw = text.encode()
        size += len(raw)
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    tokens = len(group.encoded.ids) if group.encoded is not None else 0
    return Written(done.documents + len(group.texts), done.bytes + size, done.files, done.tokens + tokens, done.lossy + len(group.lost))


def _table(group: _Group, schema: pa.Schema) -> pa.Table:
    columns = [pa.array(group.texts, schema.field(0).type)]
    if group.encoded is not None:
        ids, lengths = group.encoded
        offsets = pa.array([0, *lengths.cumsum().tolist()], pa.int32())
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(ids)))
    return pa.table(columns, schema=schema)


def _refuse_lost(group: _Group, done: Written, tokenizing: Tokenizing | None) -> None:
    if group.lost and tokenizing is not None and not tokenizing.lossy:
        raise DataError(
            f"among documents {done.documents + 1:,} to {done.documents + len(group.texts):,}: {len(group.lost):,} that the tokenizer does "
            f"not give back, the first: {group.lost[0]}. Use a tokenizer that keeps text as it is, or accept what is lost with --lossy"
        )


def _encoded(groups: Iterator[list[str]], tokenizing: Tokenizing | None) -> Generator[_Group, None, None]:
    """Row groups with their tokens, in order."""
    if tokenizing is None:
        for texts in groups:
            yield _Group(texts, None, [])
    elif tokenizing.processes == 1:
        for texts in groups:
            yield _encode(tokenizing.tokenizer, texts)
    else:
        yield from _encoded_by_others(groups, tokenizing)


def _encoded_by_others(groups: Iterator[list[str]], tokenizing: Tokenizing) -> Iterator[_Group]:
    ahead = 2 * tokenizing.processes
    waiting: collections.deque[tuple[list[str], Future[tuple[Encoded, list[str]]]]] = collections.deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(tokenizing.processes, context, _begin, (tokenizing.tokenizer,))
    try:
        for texts in groups:
            waiting.append((texts, pool.submit(_encode_there, texts)))
            if len(waiting) >= ahead:
                first, result = waiting.popleft()
                yield _Group(first, *result.result())
        while waiting:
            first, result = waiting.popleft()
            yield _Group(first, *result.result())
    except BrokenProcessPool:
        raise CutShortError(
            "a process that makes tokens was killed (by lack of memory?); what is finished stays: give fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> _Group:
    encoded = tokenizer.encode_all(texts)
    return _Group(texts, encoded, list(tokenizer.losses(texts, encoded)))


_of_this_process: list[Tokenizer] = []


def _begin(tokenizer: Tokenizer) -> None:
    """In a process that makes tokens: it ends with the one that started it, which alone minds Ctrl-C and the like, and uses one core.

    SIGTERM ends it: that is how a pool ends those that are left when one has died.
    """
    for number in ENDING_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "of a pool"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _of_this_process.append(tokenizer)


def _encode_there(texts: list[str]) -> tuple[Encoded, list[str]]:
    _, encoded, lost = _encode(_of_this_process[0], texts)
    assert encoded is not None
    return encoded, lost


def _note_progress(folder: Path, layout: Layout, done: Written) -> None:
    atomic_write(folder / PROGRESS, json.dumps({"key": layout.key(), "done": asdict(done)}).encode())


def _finished(folder: Path, layout: Layout) -> Written | None:
    """What an earlier process of the same preparation has finished; None if there is nothing, and then the folder is empty."""
    try:
        tree = json.loads((folder / PROGRESS).read_bytes())
        done = Written(**tree["done"])
        same = tree["key"] == layout.key() and all((folder / f"part-{n:05d}.parquet").is_file() for n in range(done.files))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    for file in folder.iterdir():
        if not same or file.suffix == ".partial":
            file.unlink()
    return done if same else None


def _skip(groups: Iterator[list[str]], digest: Any, before: Written, source: str, folder: Path) -> None:
    """Read past the documents that are finished.   Raises DataError where they are not the same any more."""
    count = 0
    while count < before.documents and (texts := next(groups, None)) is not None:
        count += len(texts)
        for text in texts:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    if (count, digest.hexdigest()) != (before.documents, before.sha256):
        raise DataError(f"{source}: no longer the text of which {folder} holds the beginning; remove that folder to begin again")
