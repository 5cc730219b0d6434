"""Parquet to batches: what is read, in which order, and what is refused."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bdh_mlflow.config import DataLoaderConfig, DatasetConfig
from bdh_mlflow.data import (
    order,
    parquet,
    prepare,
)
from bdh_mlflow.data.order import Batch, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import DataError
from tests.conftest import documents, write_shards


def opened(folder: Path, val_fraction: float = 0.0, column: str = "text") -> ParquetText:
    return ParquetText(DatasetConfig(parquet_dir=str(folder), val_fraction=val_fraction, text_column=column))


def batches(
    text: ParquetText, count: int, position: Any = None, *, lanes: int = 3, batch_size: int = 4, block_size: int = 8
) -> list[Batch]:
    order = TrainingBatches(text, lanes=lanes, batch_size=batch_size, block_size=block_size, seed=7, position=position)
    return [batch for batch, _ in zip(order, range(count), strict=False)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.tokens, y.tokens) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


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


def by_polars(texts: list[str | None], path: Path, codec: str) -> None:
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
def test_row_groups_of_any_size_in_nested_folders_are_read_whole(tmp_path: Path, row_group_size: int) -> None:
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


@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 8, 300])
def test_each_token_is_predicted_once_per_epoch(tmp_path: Path, lanes: int, block_size: int) -> None:
    """Over two epochs, up to what the lanes still hold: transitions (token -> next) are those of the text, none twice, none missing."""
    texts = [chr(0x100 + i) * 3 for i in range(120)]  # every document its own letter
    write_shards(tmp_path, texts, shards=2, row_group_size=16)
    text = opened(tmp_path)
    epoch_bytes = len(all_bytes(text))
    targets: Counter[int] = Counter()
    windows = 2 * epoch_bytes // block_size
    for batch in batches(text, windows, lanes=lanes, batch_size=1, block_size=block_size):
        targets.update(batch.tokens[0, 1:].tolist())
    expected = Counter(all_bytes(text))
    slack = lanes * (max(g.rows for g in text.row_groups) * 7 + block_size)  # bytes in row groups half dealt
    missing = sum(abs(targets[t] - 2 * expected[t]) for t in expected)
    assert missing <= slack
    assert set(targets) == set(expected)


def test_one_lane_gives_every_byte_of_an_epoch_exactly_once(tmp_path: Path) -> None:
    texts = documents(40)
    write_shards(tmp_path, texts, shards=1, row_group_size=10)
    text = opened(tmp_path)
    total = len(all_bytes(text))
    dealt = [b.tokens[0] for b in batches(text, 3 * total, lanes=1, batch_size=1, block_size=1)]
    targets = [int(window[1]) for window in dealt]
    for epoch in range(3):
        assert Counter(targets[epoch * total : (epoch + 1) * total]) == Counter(all_bytes(text)), epoch


def test_windows_hold_running_text_across_documents_and_row_groups(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc", "defg", "hi"], shards=1, row_group_size=1)
    dealt = batches(opened(tmp_path), 3, lanes=1, batch_size=1, block_size=4)
    stream = "".join(chr(t) for i, b in enumerate(dealt) for t in b.tokens[0].tolist()[(i > 0) :])
    assert sorted(stream[1:].split("\0")[:3]) == ["abc", "defg", "hi"]
    assert stream[0] == "\0"


@pytest.mark.parametrize("row_group_size", [1, 16])
@pytest.mark.parametrize("block_size", [8, 100])
def test_any_position_continues_with_the_batch_that_would_have_followed(tmp_path: Path, row_group_size: int, block_size: int) -> None:
    write_shards(tmp_path, documents(60), row_group_size=row_group_size)
    text = opened(tmp_path)
    whole = batches(text, 40, block_size=block_size)
    for k in range(39):
        resumed = batches(opened(tmp_path), 2, json.loads(json.dumps(whole[k].position)), block_size=block_size)
        assert same(resumed[:1], whole[k + 1 : k + 2]), k


def test_order_depends_on_the_seed_and_differs_between_epochs(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(60))
    text = opened(tmp_path)
    first, other = (
        next(iter(TrainingBatches(text, lanes=2, batch_size=4, block_size=8, seed=seed, position=None))).tokens for seed in (1, 2)
    )
    assert not torch.equal(first, other)
    orders = [parquet.shuffled(100, 7, -1 - epoch).tolist() for epoch in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))


def test_shuffle_is_written_in_stone() -> None:
    """Checkpoints hold positions in this order; a change of it would break every resume."""
    assert parquet.shuffled(8, 1337, -1).tolist() == [7, 0, 3, 5, 2, 1, 4, 6]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_windows_come_in_one_order_whatever_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    write_shards(tmp_path, documents(60), row_group_size=16)
    text = opened(tmp_path)
    one_by_one = torch.cat([b.tokens for b in batches(text, 400, batch_size=1)])
    at_once = torch.cat([b.tokens for b in batches(text, 400 // batch_size, batch_size=batch_size)])
    assert torch.equal(one_by_one[: len(at_once)], at_once)


def test_no_more_row_groups_are_open_than_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, documents(100), row_group_size=4)
    walk = order._Walk(opened(tmp_path), 3, 8, 7)
    for _ in range(500):
        walk.next_windows(1)
        assert sum(lane.unit >= 0 for lane in walk._lanes) <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_order_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(60))
    text = opened(tmp_path)
    expected = batches(text, 9)
    for workers in (1, 2):
        order = TrainingBatches(text, lanes=3, batch_size=4, block_size=8, seed=7, position=expected[1].position)
        loader = order.training_loader(order, DataLoaderConfig(num_workers=workers), cuda=False)
        assert same([next(loader) for _ in range(7)], expected[2:]), workers


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
def test_folder_that_will_not_do_is_refused_with_the_reason(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "text")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "text")


def test_number_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column `text` holds int64; accepted: string"):
        opened(tmp_path)


def test_corrupt_file_is_named_at_start(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(20))
    whole = (tmp_path / "part-1.parquet").read_bytes()
    (tmp_path / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1\.parquet: not a readable parquet file"):
        opened(tmp_path)


def test_corrupt_page_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(200), shards=1, row_group_size=200)
    file = tmp_path / "part-0.parquet"
    raw = bytearray(file.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"part-0\.parquet: row group 0 cannot be read"):
        batches(opened(tmp_path), 1)


def test_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc", "def", "ghi"], shards=1, row_group_size=1)
    with pytest.raises(DataError, match=r"does not fill one window of block_size 100; lower training.block_size or add text"):
        batches(opened(tmp_path), 1, block_size=100)
    with pytest.raises(DataError, match=r"validation text has 4 bytes, block_size 100 needs more; raise dataset.val_fraction"):
        opened(tmp_path, val_fraction=0.01).validation_batches(1, 1, 100)


def test_single_document_cannot_be_split(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc"], shards=1)
    with pytest.raises(DataError, match="one document cannot be split"):
        opened(tmp_path, val_fraction=0.1)


# ---- preparing


def prepared_texts(folder: Path) -> list[str]:
    return [d for f in parquet.parquet_files(folder) for d in pq.read_table(f)["text"].to_pylist()]


def test_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    content = "".join(f"line {i} é\n" for i in range(5000)) + "no end"
    (tmp_path / "book.txt").write_text(content, encoding="utf-8")
    done = prepare.prepare(str(tmp_path / "book.txt"), tmp_path / "out", "text")
    texts = prepared_texts(tmp_path / "out")
    assert "".join(texts) == content
    assert done.documents == len(texts) > 2
    assert all(t.endswith("\n") for t in texts[:-1])


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_gives_a_document_a_line(tmp_path: Path, packed: bool) -> None:
    lines = "\n".join(json.dumps({"text": t, "id": 1}) for t in ("one", "", "two\nlines")) + "\n\n"
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
    prepare.prepare(str(path), tmp_path / "out", "text")
    assert prepared_texts(tmp_path / "out") == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2: not JSON"),
        ('{"content": "x"}', "line 2: no field `text`; it has content"),
        ('{"text": 3}', "line 2: expected an object with text under `text`"),
        ("[]", "line 2: expected an object"),
    ],
)
def test_bad_jsonl_names_the_line_and_leaves_nothing(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_half_a_surrogate_pair_is_replaced_and_a_cut_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text")
    assert prepared_texts(tmp_path / "out") == ["a?b"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 99)[:-20])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read"):
        prepare.prepare(str(tmp_path / "b.jsonl.gz"), tmp_path / "cut", "text")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: cannot be read"):
        prepare.prepare(str(tmp_path / "c.jsonl"), tmp_path / "latin", "text")


def test_source_tree_gives_a_document_a_file_and_names_what_it_passes_over(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, content in {
        "a.py": b"x = 1\n",
        "sub/b.c": b"int x;\n",
        "latin.txt": b"caf\xe9\n",
        "pic.png": b"\x89\0\0",
        "empty": b"",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / ".git").mkdir()
    (tree / ".git" / "config").write_text("secret")
    done = prepare.prepare(str(tree), tmp_path / "out", "text")
    assert prepared_texts(tmp_path / "out") == ["x = 1\n", "café\n", "int x;\n"]
    assert done.skipped == ((str(tree / "pic.png"), "binary"),)


def test_parquet_source_keeps_its_text_column_only(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", documents(30), shards=2)
    prepare.prepare(str(tmp_path / "in"), tmp_path / "out", "text")
    assert Counter(prepared_texts(tmp_path / "out")) == Counter(documents(30))


def test_large_sources_become_several_row_groups_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 500)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(50)))
    done = prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text")
    assert done.files == len(parquet.parquet_files(tmp_path / "out")) == 4
    assert len(opened(tmp_path / "out").row_groups) == 17
    assert done.bytes == 2000


def test_standard_library_is_real_python_text(tmp_path: Path) -> None:
    done = prepare.prepare(prepare.PYTHON_STDLIB, tmp_path / "out", "text")
    assert done.bytes > 5_000_000
    assert any("def namedtuple(" in t for t in prepared_texts(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no such file or folder; accepted: python-stdlib"), ("hollow", "no text found")],
)
def test_source_without_text_is_refused_and_leaves_nothing(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=message):
        prepare.prepare(str(tmp_path / source), tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["hollow"]


def test_prepared_folder_is_not_overwritten(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", ["old"], shards=1)
    with pytest.raises(DataError, match="not empty"):
        prepare.prepare(prepare.PYTHON_STDLIB, tmp_path / "out", "text")
    assert prepared_texts(tmp_path / "out") == ["old"]


def test_bytes_are_not_copied_into_python_objects(tmp_path: Path) -> None:
    """A row group's bytes come straight from the joined column buffer."""
    write_shards(tmp_path, documents(10), shards=1)
    text = opened(tmp_path)
    tokens = text.training_bytes(text.row_groups[0])
    assert tokens.dtype == np.uint8
    assert not tokens.flags.owndata
