"""A folder of parquet files as documents: indexed by the files' footers, and split into training and validation text.

1. The index holds row groups and rows, and a digest of names, sizes and footers; no row is read for it.
2. A document is a row of the text column. Whether it is training or validation text is decided by a hash of its place, file and row.
3. Text is read a row group at a time, as tokens with a separator after each document: its bytes, the lists of tokens that a preparation
   has put beside it, or what the tokenizer makes of it now. Where tokens come from changes none.

Shuffles are sorts by a hash that is written out here, because the random streams of libraries may change between versions. Together with
`prepare` the only user of pyarrow.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data import remote
from bdh_mlflow.data.columns import Reader, RowGroup, separated
from bdh_mlflow.data.folder import is_parquet, kind_of, list_files, nearest_folder
from bdh_mlflow.data.remote import AnyPath, RemotePath
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
from bdh_mlflow.text import printable
from bdh_mlflow.vocabulary import BYTES, Ids, Tokenizer

NAMED_FILES = 3  # of those that are not read, in a message
UNFINISHED = ".unfinished"
"""Folder that holds shards until they are complete, inside a target that was there before; whoever finds one must not train."""


class ParquetText:
    """The documents of a folder of parquet files.   Reading the footers raises DataError for a folder or file that cannot be used.

    skipped: files beside them that are not named as parquet, whose text is not read.   say: called with a line for the user while a bucket
    does not answer.   tokenizer: what tokens are.   lossy: take text that it does not give back.
    """

    def __init__(
        self, dataset: DatasetConfig, say: remote.Say = remote.to_stderr, *, tokenizer: Tokenizer = BYTES, lossy: bool = False
    ) -> None:
        self.root = remote.place_of(dataset.parquet_dir)
        self.tokenizer, self._lossy = tokenizer, lossy
        self.column = dataset.text_column
        self._reader = Reader(self.column, say)
        self.val_fraction = dataset.val_fraction
        self.files, self.skipped = _look_through(self.root, say)
        if not self.files:
            raise DataError(_nothing_to_read(self.root, self.skipped))
        self.row_groups: list[RowGroup] = []
        self.manifest: list[dict[str, Any]] = []
        self._tokens_of: list[str | None] = []  # whose tokens a file holds
        self._index()
        if not self.row_groups:
            raise DataError(f"{shown(self.root)}: {len(self.files)} parquet files without a single row")
        self.rows = sum(group.rows for group in self.row_groups)
        self.bytes = sum(entry["bytes"] for entry in self.manifest)
        self._file_hashes = [text_hash(self._name(f)) for f in self.files]
        self._forced_validation = self._validation_document_by_rank()

    @property
    def is_remote(self) -> bool:
        """Whether the files are in a bucket, so that it pays to read ahead."""
        return isinstance(self.root, RemotePath)

    @property
    def digest(self) -> str:
        """32 hex digits over names, sizes and footers; no row is read."""
        return hashlib.sha256(json.dumps([self.column, self.manifest], sort_keys=True).encode()).hexdigest()[:32]

    def describe(self) -> str:
        """Files, sizes and row groups as JSON: what the digest is computed from."""
        return json.dumps({"digest": self.digest, "column": self.column, "files": self.manifest}, indent=1)

    def training_tokens(self, group: RowGroup) -> Ids:
        """Training documents of a row group in file order, each followed by a separator."""
        return self._tokens(group, validation=False)

    def validation_tokens(self, group: RowGroup) -> Ids:
        """Validation documents of a row group in file order, each followed by a separator."""
        return self._tokens(group, validation=True)

    def training_texts(self, group: RowGroup) -> list[str]:
        """Training documents of a row group that are not empty, as text.   Raises DataError for bytes that are not UTF-8."""
        return self._decoded(group, self._chosen(group, self.read_documents(group), validation=False))

    @property
    def prepared_for(self) -> set[str]:
        """Digests of the tokenizers whose tokens the files hold."""
        return {digest for digest in self._tokens_of if digest is not None}

    @property
    def separator(self) -> Ids:
        """The token between documents, alone."""
        return np.array([self.tokenizer.separator], self.tokenizer.dtype)

    def bytes_per_token(self, batches: list[Tensor]) -> float:
        """Bytes of text that a predicted token of windows (B, T + 1) stands for, on average; bits per byte are counted by them."""
        windows = [batch.numpy() for batch in batches]
        tokens = sum(each[:, 1:].size for each in windows)
        return sum(map(self.tokenizer.bytes_of_targets, windows)) / tokens if tokens else 1.0

    def read_documents(self, group: RowGroup) -> pa.LargeBinaryArray:
        """All documents of a row group, training and validation, as bytes; some may be null or empty.   Raises DataError."""
        return self._reader.documents(self.files[group.file], group)

    def notes(self) -> Iterator[str]:
        """Which files of the folder are not read, and whether tokens are made while training, a line each."""
        if self.skipped:
            yield f"{shown(self.root)}: not read, as only .parquet files are: {_named(self.root, self.skipped)}"
        if self.tokenizer.digest is None or not (without := [f for f, digest in enumerate(self._tokens_of) if not self._is_ours(digest)]):
            return
        other = "hold tokens of another tokenizer" if any(self._tokens_of[f] for f in without) else "hold no tokens"
        yield (
            f"{shown(self.root)}: {len(without):,} of {len(self.files):,} files {other}, so tokens are made of their text each time it is "
            f"read; to make them once: bdh-mlflow data prepare {shown(self.root)} FOLDER --tokenizer FILE"
        )

    def _index(self) -> None:
        for number, (file, (size, groups, tokens_of, lossy)) in enumerate(zip(self.files, self._reader.footers(self.files), strict=True)):
            self._tokens_of.append(tokens_of)
            if lossy and self._is_ours(tokens_of) and not self._lossy:
                raise DataError(f"{shown(file)}: prepared with --lossy, and this does not accept it; set tokenizer.lossy: true")
            first = 0
            for i, (rows, _) in enumerate(groups):
                if rows:
                    self.row_groups.append(RowGroup(number, i, first, rows))
                first += rows
            self.manifest.append({"file": self._name(file), "bytes": size, "row_groups": [[rows, held] for rows, held in groups]})

    def _name(self, file: AnyPath) -> str:
        return remote.below(self.root, file).as_posix()

    def _is_ours(self, digest: str | None) -> bool:
        return digest is not None and digest == self.tokenizer.digest

    def _tokens(self, group: RowGroup, *, validation: bool) -> Ids:
        if self.tokenizer is BYTES:
            return self._bytes(group, validation=validation)
        if self._is_ours(self._tokens_of[group.file]):
            lists = self._reader.token_lists(self.files[group.file], group, self.tokenizer.size)
            lists = lists.filter(pa.array(self._in_validation(group) == validation))
            lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
            return separated(lists.flatten().to_numpy(), lengths[lengths > 0], self.separator)
        chosen = self._chosen(group, self.read_documents(group), validation=validation)
        texts = self._decoded(group, chosen)
        encoded = self.tokenizer.encode_all(texts)
        if not self._lossy and (lost := next(self.tokenizer.losses(texts, encoded), None)) is not None:
            raise DataError(
                f"{shown(self.files[group.file])}: row group {group.number}: a document that the tokenizer does not give back: {lost}. "
                f"Use a tokenizer that keeps text as it is, or accept what is lost with tokenizer.lossy: true"
            )
        return separated(encoded.ids, encoded.lengths[encoded.lengths > 0], self.separator)

    def _chosen(self, group: RowGroup, documents: pa.LargeBinaryArray, *, validation: bool) -> pa.LargeBinaryArray:
        """The training or the validation documents of a row group that are not empty."""
        length = pc.fill_null(pc.binary_length(documents), 0).to_numpy(zero_copy_only=False)
        return documents.filter(pa.array((self._in_validation(group) == validation) & (length > 0)))

    def _decoded(self, group: RowGroup, documents: pa.LargeBinaryArray) -> list[str]:
        try:
            texts: list[str] = documents.cast(pa.large_string()).to_pylist()
        except (pa.ArrowInvalid, UnicodeDecodeError):
            raise DataError(
                f"{shown(self.files[group.file])}: row group {group.number}: a document that is not UTF-8; a vocabulary is one of text. "
                f"Prepare it again (bdh-mlflow data prepare), or set tokenizer.type: byte"
            ) from None
        return texts

    def _bytes(self, group: RowGroup, *, validation: bool) -> Ids:
        chosen = self._chosen(group, self.read_documents(group), validation=validation)
        separator = pa.scalar(bytes([BYTES.separator]), pa.large_binary())
        joined = pc.binary_join_element_wise(chosen, separator, pa.scalar(b"", pa.large_binary()))
        if len(joined) == 0:
            return np.empty(0, np.uint8)
        _, offsets, data = joined.buffers()
        ends = np.frombuffer(offsets, np.int64)[joined.offset : joined.offset + len(joined) + 1]
        return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]

    def _in_validation(self, group: RowGroup) -> npt.NDArray[np.bool_]:
        """Which rows of a row group are validation text."""
        if self._forced_validation is not None:
            file, row = self._forced_validation
            place = np.arange(group.first_row, group.first_row + group.rows)
            held_out: npt.NDArray[np.bool_] = (place == row) & (group.file == file)
            return held_out
        return self._draws(group) < self.val_fraction

    def _draws(self, group: RowGroup) -> npt.NDArray[np.float64]:
        """A pseudorandom number in [0, 1) for each row, from a hash of its place."""
        place = np.arange(group.first_row, group.first_row + group.rows, dtype=np.uint64)
        bits = mix(place + np.uint64(self._file_hashes[group.file])) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def _validation_document_by_rank(self) -> tuple[int, int] | None:
        """(file, row) of the only validation document, for data so small that the hash selects none: the one with the lowest number."""
        if self.val_fraction == 0 or self.rows * self.val_fraction > 50:
            return None
        if self.rows == 1:
            raise DataError(
                f"{shown(self.root)}: one document cannot be split for validation; set dataset.val_fraction: 0 or add documents"
            )
        draws = [self._draws(group) for group in self.row_groups]
        if min(float(d.min()) for d in draws) < self.val_fraction:
            return None
        group, draw = min(zip(self.row_groups, draws, strict=True), key=lambda pair: float(pair[1].min()))
        return group.file, group.first_row + int(draw.argmin())


def parquet_files(root: AnyPath) -> Sequence[AnyPath]:
    """Parquet files below a folder, sorted by path, without hidden ones and those of unfinished preparations.

    Raises DataError for a link to nothing and for a folder that cannot be listed: what they lead to may be text that is missed.
    """
    return list(_look_through(root)[0])


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits for each number: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(count: int, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """A permutation of 0 .. count - 1, a pure function of seed and stream."""
    base = text_hash(f"{seed}/{stream}")
    return np.argsort(mix(np.arange(count, dtype=np.uint64) ^ np.uint64(base)), kind="stable")


def text_hash(text: str) -> int:
    """64 bits of the sha256 of a text, or of the bytes of a file name that are not UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _hidden(name: str) -> bool:
    """Whether files, or all files of a folder, of this name are left out: hidden, or of a preparation or query engine."""
    return name.startswith((".", "_"))


def _look_through(root: AnyPath, say: remote.Say = remote.to_stderr) -> tuple[Sequence[AnyPath], Sequence[AnyPath]]:
    """Parquet files and other files below a folder, see `parquet_files`."""
    if isinstance(root, RemotePath):
        listed = list_files(root, lambda name: _hidden(name) and name != UNFINISHED, say).files
        if any(UNFINISHED in remote.below(root, file).parts for file in listed):
            raise DataError(_being_written(root))
        return [p for p in listed if is_parquet(p.name)], [p for p in listed if not is_parquet(p.name)]
    if kind_of(root) != "folder":
        return [], []
    if kind_of(root / UNFINISHED) == "folder":
        raise DataError(_being_written(root))
    found = list_files(root, _hidden)
    for path, reason in found.unreadable:
        if path.suffix and not is_parquet(path.name):
            continue  # neither text nor a folder of it
        raise DataError(f"{shown(path)}: {reason}; restore or remove it, as it may stand for text")
    return [p for p in found.files if is_parquet(p.name)], [p for p in found.files if not is_parquet(p.name)]


def _being_written(root: AnyPath) -> str:
    return (
        f"{shown(root)}: holds {UNFINISHED}: a preparation is writing here, or one was killed; "
        f"wait for it, or empty the folder and prepare it again"
    )


def _nothing_to_read(root: AnyPath, others: Sequence[AnyPath]) -> str:
    where, found = shown(root), kind_of(root)
    if found == "folder":
        if others:
            names = _named(root, others)
            return (
                f"{where}: no parquet files in it (dataset.parquet_dir), but {names}. "
                f"To train on their text, run: bdh-mlflow data prepare {where} FOLDER, and set dataset.parquet_dir to that FOLDER"
            )
        hidden = [p for p in list_files(root, lambda name: False).files if is_parquet(p.name)]
        what = "no parquet files in it"
        what += f" but some in hidden files or folders, which are not read: {_named(root, hidden)}" if hidden else ""
    else:
        near = nearest_folder(root) if found == "nothing" and isinstance(root, Path) else None
        what = "no such folder" if found == "nothing" else "not a folder" if found == "file" else f"not a folder but {found}"
        what += f"; did you mean {shown(near)}?" if near else ""
    return f"{where}: {what} (dataset.parquet_dir). Set dataset.source to have it built, or run: bdh-mlflow data prepare SOURCE {where}"


def _named(root: AnyPath, files: Sequence[AnyPath]) -> str:
    """The first few files, and how many more there are."""
    more = f" and {len(files) - NAMED_FILES:,} more" if len(files) > NAMED_FILES else ""
    return ", ".join(printable(remote.below(root, file)) for file in files[:NAMED_FILES]) + more
