"""A folder of parquet files as documents: what is read, what is validation text, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data import parquet
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import DataError
from tests.conftest import documents, write_shards


def opened(folder: Path, val_fraction: float = 0.0, column: str = "text") -> ParquetText:
    return ParquetText(DatasetConfig(parquet_dir=str(folder), val_fraction=val_fraction, text_column=column))


def all_bytes(text: ParquetText) -> bytes:
    return b"".join(text.training_bytes(g).tobytes() for g in text.row_groups)


def test_documents_are_followed_by_a_separator_and_empty_ones_leave_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["ab", None, "", "c"]}), tmp_path / "a.parquet")
    assert all_bytes(opened(tmp_path)) == b"ab\0c\0"


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
    ids=str,
)
def test_any_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["ünï", None, "b", "ünï"])
    pq.write_table(pa.table({"other": [1, 2, 3, 4], "text": values.cast(kind)}), tmp_path / "a.parquet", compression="gzip")
    assert all_bytes(opened(tmp_path)).decode() == "ünï\0b\0ünï\0"


def by_pyarrow(texts: list[str | None], path: Path, codec: str) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, compression=codec)


def by_pandas(texts: list[str | None], path: Path, codec: str) -> None:
    import pandas as pd

    pd.DataFrame({"id": range(len(texts)), "text": texts}).to_parquet(path, compression=codec)


def by_polars(texts: list[str | None], path: Path, codec: Any) -> None:
    import polars as pl

    pl.DataFrame({"id": range(len(texts)), "text": texts}).write_parquet(path, compression=codec)


def by_duckdb(texts: list[str | None], path: Path, codec: str) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("create table t (id integer, text varchar)")
        connection.executemany("insert into t values (?, ?)", list(enumerate(texts)))
        connection.execute(f"copy t to '{path}' (format parquet, codec '{codec}')")


@pytest.mark.parametrize("write", [by_pyarrow, by_pandas, by_polars, by_duckdb])
@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
def test_files_of_any_writer_and_codec_are_read(tmp_path: Path, write: Any, codec: str) -> None:
    write(["ünï", None, "", "b" * 5000, "ünï"], tmp_path / "a.parquet", codec)
    assert all_bytes(opened(tmp_path)).decode() == "ünï\0" + "b" * 5000 + "\0ünï\0"


@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_row_groups_of_any_size_in_nested_folders_are_read_completely(tmp_path: Path, row_group_size: int) -> None:
    texts = documents(50)
    write_shards(tmp_path / "deep" / "er", texts, shards=3, row_group_size=row_group_size)
    read = all_bytes(opened(tmp_path)).decode().split("\0")[:-1]
    assert Counter(read) == Counter(texts)


def test_hundreds_of_files_and_a_row_group_of_100_000_rows_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "many", [f"<{i}>" for i in range(600)], shards=300)
    write_shards(tmp_path / "one", [f"<{i}>" for i in range(100_000)], shards=1, row_group_size=100_000)
    for folder, files, rows in (("many", 300, 600), ("one", 1, 100_000)):
        text = opened(tmp_path / folder)
        assert (len(text.files), all_bytes(text).count(b"\0")) == (files, rows)


def test_shuffle_never_changes() -> None:
    """Checkpoints hold positions in this order; a change of it would break every resume."""
    assert parquet.shuffled(8, 1337, -1).tolist() == [7, 0, 3, 5, 2, 1, 4, 6]


def test_validation_and_training_text_are_disjoint_and_together_everything(tmp_path: Path) -> None:
    texts = [f"<{i}>" for i in range(500)]
    write_shards(tmp_path, texts, shards=1, row_group_size=100)
    text = opened(tmp_path, val_fraction=0.1)
    training = set(all_bytes(text).decode().split("\0")[:-1])
    validation = {d for g in text.row_groups for d in text.validation_bytes(g).tobytes().decode().split("\0")[:-1]}
    assert training | validation == set(texts)
    assert training & validation == set()
    assert 25 < len(validation) < 80


def test_validation_split_stays_when_files_are_added(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(50), shards=1)
    before = opened(tmp_path, val_fraction=0.2)
    kept = [before.validation_bytes(g).tobytes() for g in before.row_groups]
    pq.write_table(pa.table({"text": documents(50, seed=1)}), tmp_path / "aa.parquet")
    after = opened(tmp_path, val_fraction=0.2)
    old = [after.validation_bytes(g).tobytes() for g in after.row_groups if after.files[g.file].name == "part-0.parquet"]
    assert old == kept


def test_two_documents_are_enough_for_a_validation_split(tmp_path: Path) -> None:
    write_shards(tmp_path, ["a" * 50, "b" * 50], shards=1)
    text = opened(tmp_path, val_fraction=0.001)
    (group,) = text.row_groups
    letters = {bytes(set(part.tolist()) - {0}) for part in (text.training_bytes(group), text.validation_bytes(group))}
    assert letters == {b"a", b"b"}


def test_validation_batches_are_windows_of_validation_text(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(80))
    text = opened(tmp_path, val_fraction=0.3)
    found = text.validation_batches(batches=3, batch_size=4, block_size=8)
    assert [tuple(b.shape) for b in found] == [(4, 9)] * 3
    held_out = b"".join(text.validation_bytes(g).tobytes() for g in text.row_groups)
    assert bytes(found[0][1].tolist()) in held_out
    assert opened(tmp_path, val_fraction=0.0).validation_batches(1, 1, 8) == []


def test_digest_tells_changed_data_from_the_same_data_elsewhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, documents(20))
    assert opened(tmp_path / "a").digest == opened(tmp_path / "b").digest
    assert len(opened(tmp_path / "a").digest) <= 36  # MLflow's limit
    write_shards(tmp_path / "b", documents(21))
    assert opened(tmp_path / "a").digest != opened(tmp_path / "b").digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "no such folder"),
        (lambda f: f.touch(), "not a folder"),
        (lambda f: f.mkdir(), "no parquet files in it"),
        (lambda f: write_shards(f, ["a"], column="content"), r"part-0.parquet: no column `text`; it has content. Set dataset.text_column"),
        (lambda f: write_shards(f, []), "without a single row"),
    ],
    ids=["missing", "file", "empty", "column", "rows"],
)
def test_folder_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "text")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "text")


def test_number_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column `text` holds int64; accepted: string"):
        opened(tmp_path)


def test_corrupt_file_is_named_at_start(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(20))
    intact = (tmp_path / "part-1.parquet").read_bytes()
    (tmp_path / "part-1.parquet").write_bytes(intact[: len(intact) // 2])
    with pytest.raises(DataError, match=r"part-1\.parquet: not a readable parquet file"):
        opened(tmp_path)


def test_corrupt_page_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(200), shards=1, row_group_size=200)
    file = tmp_path / "part-0.parquet"
    raw = bytearray(file.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"part-0\.parquet: row group 0 cannot be read"):
        all_bytes(opened(tmp_path))


def test_single_document_cannot_be_split(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc"], shards=1)
    with pytest.raises(DataError, match="one document cannot be split"):
        opened(tmp_path, val_fraction=0.1)


def test_bytes_are_not_copied_into_python_objects(tmp_path: Path) -> None:
    """A row group's bytes come straight from the joined column buffer."""
    write_shards(tmp_path, documents(10), shards=1)
    text = opened(tmp_path)
    tokens = text.training_bytes(text.row_groups[0])
    assert tokens.dtype == np.uint8
    assert not tokens.flags.owndata
