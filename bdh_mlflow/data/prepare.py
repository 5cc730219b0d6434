"""Text of any source to parquet shards that training reads: plain text, jsonl, parquet, folders, or the interpreter's own sources.

All or nothing: shards are written to a hidden folder next to the target, which is renamed when it is complete. Knows nothing of training.
"""

import gzip
import json
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import DataError

ROW_GROUP_BYTES = 4 * 2**20  # of text: small enough to keep several in memory, large enough to shuffle within
SHARD_BYTES = 256 * 2**20  # of text in a prepared file
TEXT_DOCUMENT_BYTES = 16 * 2**10  # plain text is cut into documents of about this size, at line ends;
TEXT_DOCUMENTS, TEXT_DOCUMENT_LEAST_BYTES = 64, 512  # a short text into about 64, so that some can be held out for validation
PYTHON_STDLIB = "python-stdlib"
"""Source that stands for the Python sources of the running interpreter's standard library: real text without a network."""
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, and which files it skipped (name, reason).   bytes: of text."""

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
            raise DataError(f"{source}: no text found" + (f"; skipped {len(skipped)} files" if skipped else ""))
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
            for document in text.read_documents(group):
                if document.as_py():
                    yield _decoded(document.as_py())
