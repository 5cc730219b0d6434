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

import gzip
import hashlib
import itertools
import json
import shutil
import signal
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bdh_mlflow import tokenizer
from bdh_mlflow.config import DataLoaderConfig, DatasetConfig
from bdh_mlflow.errors import DataError

Bytes = npt.NDArray[np.uint8]
Position = dict[str, Any]

ROW_GROUP_BYTES = 4 * 2**20  # text in a prepared row group: small enough to hold several, large enough to shuffle within
SHARD_BYTES = 256 * 2**20  # text in a prepared file
TEXT_DOCUMENT_BYTES = 16 * 2**10  # plain text is cut into documents of about this size, at line ends;
TEXT_DOCUMENTS, TEXT_DOCUMENT_LEAST_BYTES = 64, 512  # a short one into about so many, so that some can be kept for validation
PYTHON_STDLIB = "python-stdlib"
VALIDATION_ROW_GROUPS = 16  # read for validation text, at the least
_VALIDATION_ORDER = 0x76616C  # constant seed: validation text does not depend on the run
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


class RowGroup(NamedTuple):
    """Where a row group lies: file in the sorted listing, number in the file, its first row's number in the file, rows."""

    file: int
    number: int
    first_row: int
    rows: int


class Batch(NamedTuple):
    """tokens: (B, block_size + 1) uint8.   position: where the next batch starts.   epoch: passes over the data so far, as a fraction."""

    tokens: Tensor
    position: Position
    epoch: float


class ParquetText:
    """The documents of a folder of parquet files.   Reading the footers raises DataError for a folder or file that will not do."""

    def __init__(self, dataset: DatasetConfig) -> None:
        self.root = Path(dataset.parquet_dir)
        self.column = dataset.text_column
        self.val_fraction = dataset.val_fraction
        self.files = parquet_files(self.root)
        if not self.files:
            raise DataError(_nothing_to_read(self.root))
        self.row_groups: list[RowGroup] = []
        self.manifest: list[dict[str, Any]] = []
        for number, file in enumerate(self.files):
            self._index(number, file)
        if not self.row_groups:
            raise DataError(f"{self.root}: {len(self.files)} parquet files without a single row")
        self.rows = sum(group.rows for group in self.row_groups)
        self.bytes = sum(entry["bytes"] for entry in self.manifest)
        self._file_hashes = [_text_hash(self._name(f)) for f in self.files]
        self._forced_validation = self._validation_document_by_rank()

    @property
    def digest(self) -> str:
        """32 hex digits over names, sizes and footers; no row is read."""
        return hashlib.sha256(json.dumps([self.column, self.manifest], sort_keys=True).encode()).hexdigest()[:32]

    def describe(self) -> str:
        """Files, sizes and row groups as JSON: what the digest is taken of."""
        return json.dumps({"digest": self.digest, "column": self.column, "files": self.manifest}, indent=1)

    def training_bytes(self, group: RowGroup) -> Bytes:
        """Training documents of a row group in file order, each followed by a separator."""
        return self._tokens(group, validation=False)

    def validation_bytes(self, group: RowGroup) -> Bytes:
        """Validation documents of a row group in file order, each followed by a separator."""
        return self._tokens(group, validation=True)

    def validation_batches(self, batches: int, batch_size: int, block_size: int) -> list[Tensor]:
        """`batches` batches of validation windows, each (B, block_size + 1) uint8; fewer, the last smaller, if there is less text.

        The same for every run on the same data: windows drawn from at least VALIDATION_ROW_GROUPS row groups (all, if there are fewer), so
        that one file does not stand for everything.
        """
        if self.val_fraction == 0:
            return []
        wanted = batches * batch_size
        text, length = [np.array([tokenizer.SEPARATOR], np.uint8)], 1
        for read, unit in enumerate(_shuffled(len(self.row_groups), _VALIDATION_ORDER, 0)):
            if read >= VALIDATION_ROW_GROUPS and length > wanted * block_size:
                break
            text.append(self.validation_bytes(self.row_groups[unit]))
            length += len(text[-1])
        if length <= block_size:
            raise DataError(
                f"{self.root}: validation text has {length - 1} bytes, block_size {block_size} needs more; "
                f"raise dataset.val_fraction (now {self.val_fraction}), lower training.block_size or add text"
            )
        windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(text), block_size + 1)[::block_size]
        drawn = windows[_shuffled(len(windows), _VALIDATION_ORDER, 1)[:wanted]]
        return list(torch.split(torch.from_numpy(drawn), batch_size))

    def _index(self, number: int, file: Path) -> None:
        try:
            with pq.ParquetFile(file) as opened:
                metadata, schema = opened.metadata, opened.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file: {_first_line(error)}") from None
        if self.column not in schema.names:
            raise DataError(f"{file}: no column `{self.column}`; it has {', '.join(schema.names) or 'none'}. Set dataset.text_column")
        kind = schema.field(self.column).type
        if not _is_text(kind):
            raise DataError(f"{file}: column `{self.column}` holds {kind}; accepted: string, binary or a dictionary of them")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        first = 0
        for i, group in enumerate(groups):
            if group.num_rows:
                self.row_groups.append(RowGroup(number, i, first, group.num_rows))
            first += group.num_rows
        self.manifest.append(
            {
                "file": self._name(file),
                "bytes": file.stat().st_size,
                "row_groups": [[g.num_rows, g.total_byte_size] for g in groups],
            }
        )

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _tokens(self, group: RowGroup, *, validation: bool) -> Bytes:
        documents = self._read(group)
        held_out = self._in_validation(group)
        length = pc.fill_null(pc.binary_length(documents), 0).to_numpy(zero_copy_only=False)
        chosen = documents.filter(pa.array((held_out == validation) & (length > 0)))
        separator = pa.scalar(bytes([tokenizer.SEPARATOR]), pa.large_binary())
        joined = pc.binary_join_element_wise(chosen, separator, pa.scalar(b"", pa.large_binary()))
        if len(joined) == 0:
            return np.empty(0, np.uint8)
        _, offsets, data = joined.buffers()
        ends = np.frombuffer(offsets, np.int64)[joined.offset : joined.offset + len(joined) + 1]
        return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]

    def _read(self, group: RowGroup) -> pa.LargeBinaryArray:
        file = self.files[group.file]
        try:
            with pq.ParquetFile(file) as opened:
                column = opened.read_row_group(group.number, columns=[self.column]).column(self.column)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: row group {group.number} cannot be read: {_first_line(error)}") from None
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column.cast(pa.large_binary()).combine_chunks() if column.num_chunks != 1 else column.chunk(0).cast(pa.large_binary())

    def _in_validation(self, group: RowGroup) -> npt.NDArray[np.bool_]:
        """Which rows of a row group are validation text."""
        if self._forced_validation is not None:
            file, row = self._forced_validation
            place = np.arange(group.first_row, group.first_row + group.rows)
            held_out: npt.NDArray[np.bool_] = (place == row) & (group.file == file)
            return held_out
        return self._draws(group) < self.val_fraction

    def _draws(self, group: RowGroup) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each row's place."""
        place = np.arange(group.first_row, group.first_row + group.rows, dtype=np.uint64)
        bits = _mix(place + np.uint64(self._file_hashes[group.file])) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def _validation_document_by_rank(self) -> tuple[int, int] | None:
        """For data so small that the draw may leave no validation document at all: the one document that is it."""
        if self.val_fraction == 0 or self.rows * self.val_fraction > 50:
            return None
        if self.rows == 1:
            raise DataError(f"{self.root}: one document cannot be split for validation; set dataset.val_fraction: 0 or add documents")
        draws = [self._draws(group) for group in self.row_groups]
        if min(float(d.min()) for d in draws) < self.val_fraction:
            return None
        group, draw = min(zip(self.row_groups, draws, strict=True), key=lambda pair: float(pair[1].min()))
        return group.file, group.first_row + int(draw.argmin())


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
        self._rest: Bytes = np.array([tokenizer.SEPARATOR], np.uint8)  # what leads into the next row group
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
            later = 1 + _shuffled(windows - 1, self._walk.seed, unit + 1)
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
            return np.array([tokenizer.SEPARATOR], np.uint8)
        groups = self._text.row_groups
        epoch, place = divmod(unit, len(groups))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, _shuffled(len(groups), self.seed, -1 - epoch))
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


def parquet_files(root: Path) -> list[Path]:
    """Parquet files below a folder, sorted by path; hidden ones and those of unfinished preparations left out."""
    found = (p for p in root.rglob("*.parquet") if p.is_file())
    return sorted(p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts))


# ---- preparing -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a preparation wrote, and what it had to pass over (name, reason)."""

    folder: Path
    documents: int
    bytes: int
    files: int
    skipped: tuple[tuple[str, str], ...]


def prepare(source: str, folder: Path, column: str, on_progress: Callable[[int, int], None] = lambda documents, size: None) -> Prepared:
    """Turn text into parquet shards in `folder`, all or nothing.

    source: `python-stdlib`, or a txt, jsonl (also .gz) or parquet file, or a folder of them or of any text files (a source tree).
    A folder's text files are a document each; a single text file is cut at line ends into documents of 16 KiB at most.
    jsonl and parquet are read from their field or column `column`. Raises DataError; then nothing is written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; give another folder or remove it first")
    skipped: list[tuple[str, str]] = []
    documents = _documents(source, column, skipped)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        count, size, files = _write_shards(documents, partial, column, on_progress)
        if not count:
            raise DataError(f"{source}: no text found" + (f"; passed over {len(skipped)} files" if skipped else ""))
        partial.chmod(0o755)
        partial.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared(folder, count, size, files, tuple(skipped))


def _write_shards(documents: Iterable[str], folder: Path, column: str, on_progress: Callable[[int, int], None]) -> tuple[int, int, int]:
    schema = pa.schema([(column, pa.string())])
    count = size = files = 0
    shard: pq.ParquetWriter | None = None
    shard_size = 0
    for group in _row_groups(documents):
        if shard is None:
            shard, shard_size = pq.ParquetWriter(folder / f"part-{files:05d}.parquet", schema, compression="zstd"), 0
            files += 1
        shard.write_table(pa.table({column: group}, schema), row_group_size=len(group))
        group_size = sum(len(d.encode()) for d in group)
        count, size, shard_size = count + len(group), size + group_size, shard_size + group_size
        on_progress(count, size)
        if shard_size >= SHARD_BYTES:
            shard.close()
            shard = None
    if shard is not None:
        shard.close()
    return count, size, files


def _row_groups(documents: Iterable[str]) -> Iterator[list[str]]:
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


def _documents(source: str, column: str, skipped: list[tuple[str, str]]) -> Iterator[str]:
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in sorted(root.rglob("*.py")) if not _TEST_FOLDERS & set(p.relative_to(root).parts)]
        return _from_files(files, root, column, skipped)
    path = Path(source)
    if path.is_file():
        return _from_file(path, column, skipped, cut=True)
    if path.is_dir():
        return _from_files(sorted(p for p in path.rglob("*") if p.is_file()), path, column, skipped)
    raise DataError(f"{source}: no such file or folder; accepted: {PYTHON_STDLIB}, a txt, jsonl or parquet file, or a folder")


def _from_files(files: Iterable[Path], root: Path, column: str, skipped: list[tuple[str, str]]) -> Iterator[str]:
    for file in files:
        folders = file.relative_to(root).parts
        unfinished = file.suffix == ".parquet" and file.name.startswith("_")
        if not unfinished and not any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in folders):
            yield from _from_file(file, column, skipped, cut=False)


def _from_file(file: Path, column: str, skipped: list[tuple[str, str]], *, cut: bool) -> Iterator[str]:
    try:
        if file.name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
            yield from _from_jsonl(file, column)
        elif file.suffix == ".parquet":
            yield from _from_parquet(file, column)
        else:
            raw = file.read_bytes()
            if b"\0" in raw:
                skipped.append((str(file), "binary"))
                return
            text = _decoded(raw)
            yield from _cut(text) if cut else [text] * bool(text)
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decoded(raw: bytes) -> str:
    """UTF-8, or Latin-1, which reads every byte, for the old files that are not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _cut(text: str) -> Iterator[str]:
    enough = min(TEXT_DOCUMENT_BYTES, max(TEXT_DOCUMENT_LEAST_BYTES, len(text) // TEXT_DOCUMENTS))
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= enough:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _from_jsonl(file: Path, column: str) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON: {error.msg}") from None
            if not isinstance(record, Mapping) or not isinstance(record.get(column), str | None):
                raise DataError(f"{file}, line {number}: expected an object with text under `{column}`; set dataset.text_column")
            if column not in record:
                raise DataError(f"{file}, line {number}: no field `{column}`; it has {', '.join(record)}. Set dataset.text_column")
            if record[column]:
                yield record[column].encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, UTF-8 cannot


def _from_parquet(file: Path, column: str) -> Iterator[str]:
    text = ParquetText(DatasetConfig(parquet_dir=str(file.parent), text_column=column, val_fraction=0))
    number = text.files.index(file)
    for group in text.row_groups:
        if group.file == number:
            for document in text._read(group):
                if document.as_py():
                    yield _decoded(document.as_py())


# ---- small parts -----------------------------------------------------------------------------------------------------------------------


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: 64 well-mixed bits for each number (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _shuffled(count: int, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 .. count - 1, a pure function of seed and stream."""
    base = _text_hash(f"{seed}/{stream}")
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ np.uint64(base)), kind="stable")


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _is_text(kind: pa.DataType) -> bool:
    t = pa.types
    if t.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (t.is_string, t.is_large_string, t.is_binary, t.is_large_binary, t.is_string_view, t.is_binary_view)
    return any(test(kind) for test in tests)


def _nothing_to_read(root: Path) -> str:
    found = "no such folder" if not root.exists() else "not a folder" if not root.is_dir() else "no parquet files in it"
    return f"{root}: {found} (dataset.parquet_dir). Set dataset.source to have it built, or run: bdh-mlflow data prepare SOURCE {root}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group; the trainer decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
