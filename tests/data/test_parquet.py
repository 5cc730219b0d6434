"""A folder of parquet files as documents: what is read, what is validation text, and what is refused."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data import parquet, prepare, validation
from bdh_mlflow.data.columns import TOKENIZER_KEY
from bdh_mlflow.data.order import Order, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.data.shards import Tokenizing
from bdh_mlflow.errors import DataError
from bdh_mlflow.vocabulary import BYTES, of_content
from tests.conftest import documents, write_shards
from tests.vocabulary import made

SPLIT = "5edb1d7e1b5a1bf719844634951b797813951e4185213c271b1e2697b2cee837"
ORDER = "bc9aabfab6e4735cbb371817142a7a5da06765153dd39804b55bf4795c26ed3a"


def opened(folder: Path, val_fraction: float = 0.0, column: str = "text") -> ParquetText:
    return ParquetText(DatasetConfig(parquet_dir=str(folder), val_fraction=val_fraction, text_column=column))


def all_bytes(text: ParquetText) -> bytes:
    return b"".join(text.training_tokens(g).tobytes() for g in text.row_groups)


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
    validation = {d for g in text.row_groups for d in text.validation_tokens(g).tobytes().decode().split("\0")[:-1]}
    assert training | validation == set(texts)
    assert training & validation == set()
    assert 25 < len(validation) < 80


def test_validation_split_stays_when_files_are_added(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(50), shards=1)
    before = opened(tmp_path, val_fraction=0.2)
    kept = [before.validation_tokens(g).tobytes() for g in before.row_groups]
    pq.write_table(pa.table({"text": documents(50, seed=1)}), tmp_path / "aa.parquet")
    after = opened(tmp_path, val_fraction=0.2)
    old = [after.validation_tokens(g).tobytes() for g in after.row_groups if after.files[g.file].name == "part-0.parquet"]
    assert old == kept


def test_two_documents_are_enough_for_a_validation_split(tmp_path: Path) -> None:
    write_shards(tmp_path, ["a" * 50, "b" * 50], shards=1)
    text = opened(tmp_path, val_fraction=0.001)
    (group,) = text.row_groups
    letters = {bytes(set(part.tolist()) - {0}) for part in (text.training_tokens(group), text.validation_tokens(group))}
    assert letters == {b"a", b"b"}


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
    tokens = text.training_tokens(text.row_groups[0])
    assert tokens.dtype == np.uint8
    assert not tokens.flags.owndata


NAMES = ("Z.parquet", "a.parquet", "b/c.parquet", "b/\u00e9 \u00fc.parquet", "b-x.parquet", "b.parquet", "lang=en/part 0#%.parquet")


def ordinary_folder(root: Path) -> Path:
    """Names of every ordinary kind, in the order in which they are read, and two that are not read."""
    for number, name in enumerate([*NAMES, "_h/x.parquet", ".q.parquet"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"document {number} {row} " * (row % 7) for row in range(40)]
        pq.write_table(pa.table({"text": texts}), root / name, row_group_size=11)
    return root


def test_order_and_split_of_an_ordinary_folder_never_change(tmp_path: Path) -> None:
    """Values of version 0.2.0: a run begun with it resumes on the same text, in the same order, without its validation text."""
    text = opened(ordinary_folder(tmp_path), val_fraction=0.1)
    assert [entry["file"] for entry in text.manifest] == list(NAMES)
    held_out = hashlib.sha256(b"".join(text.validation_tokens(g).tobytes() for g in text.row_groups)).hexdigest()
    assert held_out == SPLIT
    batches = iter(TrainingBatches(text, Order(3, 2, 16, 7), None))
    order = hashlib.sha256(b"".join(next(batches).tokens.numpy().tobytes() for _ in range(50))).hexdigest()
    assert order == ORDER


def test_digest_is_of_column_names_sizes_and_footers(tmp_path: Path) -> None:
    """By its definition, as file sizes differ between versions of pyarrow."""
    manifest = []
    for name in NAMES:
        metadata = pq.read_metadata(ordinary_folder(tmp_path) / name)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        size = (tmp_path / name).stat().st_size
        manifest.append({"file": name, "bytes": size, "row_groups": [[g.num_rows, g.total_byte_size] for g in groups]})
    assert opened(tmp_path).digest == hashlib.sha256(json.dumps(["text", manifest], sort_keys=True).encode()).hexdigest()[:32]


def rename(file: Path, name: bytes) -> None:
    os.rename(bytes(file), bytes(file.parent) + b"/" + name)  # noqa: PTH104 (a name that is not text)


@pytest.mark.parametrize("name", ["part-1.PARQUET", "part-1.Parquet", b"caf\xe9.parquet", "line\nend.parquet"], ids=ascii)
def test_parquet_files_of_any_name_are_read(tmp_path: Path, name: str | bytes) -> None:
    write_shards(tmp_path, documents(20))
    rename(tmp_path / "part-1.parquet", name.encode() if isinstance(name, str) else name)
    text = opened(tmp_path, val_fraction=0.2)
    read = [part for g in text.row_groups for part in (text.training_tokens(g).tobytes(), text.validation_tokens(g).tobytes())]
    assert Counter(b"".join(read).decode().split("\0")[:-1]) == Counter(documents(20))
    assert len(text.digest) == 32
    assert json.loads(text.describe())["digest"] == text.digest


def test_linked_subfolders_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", documents(20), shards=1)
    write_shards(tmp_path / "disk", documents(20, seed=1), shards=1)
    (tmp_path / "in" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "loop").symlink_to(".")
    text = opened(tmp_path / "in")
    assert [entry["file"] for entry in text.manifest] == ["more/part-0.parquet", "part-0.parquet"]
    assert text.rows == 40


@pytest.mark.parametrize("name", ["b.parquet", "more"])
def test_a_link_to_nothing_is_an_error_rather_than_less_text(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, documents(20))
    (tmp_path / name).symlink_to("not-mounted")
    with pytest.raises(DataError, match=f"{name}: a link to not-mounted, which does not exist"):
        opened(tmp_path)


def test_files_that_are_not_read_are_noted(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(20))
    assert list(opened(tmp_path).notes()) == []
    for name in ("a.jsonl", "b.parquet.zst", "c.pq", "d.txt", ".hidden", "_SUCCESS"):
        (tmp_path / name).touch()
    assert list(opened(tmp_path).notes()) == [f"{tmp_path}: not read, as only .parquet files are: a.jsonl, b.parquet.zst, c.pq and 1 more"]


def test_a_folder_of_other_files_is_refused_with_what_prepares_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"no parquet files in it .*, but a\.jsonl\. .*: bdh-mlflow data prepare "):
        opened(tmp_path)


def test_a_folder_of_hidden_parquet_files_says_so(tmp_path: Path) -> None:
    write_shards(tmp_path / "_tmp", ["a"], shards=1)
    with pytest.raises(DataError, match=r"hidden files or folders, which are not read: _tmp/part-0\.parquet"):
        opened(tmp_path)


def test_a_missing_folder_names_the_one_that_is_spelled_alike(tmp_path: Path) -> None:
    write_shards(tmp_path / "corpus", ["a"])
    with pytest.raises(DataError, match=r"corpsu: no such folder; did you mean corpus\?"):
        opened(tmp_path / "corpsu")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns are named `text`"):
        opened(tmp_path)


def test_names_with_dots_and_nested_columns_do_not_hide_the_text(tmp_path: Path) -> None:
    table = pa.table({"meta": [{"text": "no"}], "text.lang": ["en"], "text": ["yes"], "a.b": ["dotted"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert all_bytes(opened(tmp_path)) == b"yes\0"
    assert all_bytes(opened(tmp_path, column="a.b")) == b"dotted\0"
    with pytest.raises(DataError, match=r"no column `meta\.text`"):
        opened(tmp_path, column="meta.text")


@pytest.mark.parametrize("writer", [{"compression": "none"}, {"compression": "zstd", "data_page_version": "2.0"}], ids=["plain", "zstd"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, writer: dict[str, Any]) -> None:
    """Footer and pages with wrong bytes; pyarrow answers with many kinds of errors."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": documents(60)}), file, row_group_size=20, **writer)
    intact, draw, refused = file.read_bytes(), np.random.default_rng(1), 0
    for _ in range(150):
        raw = bytearray(intact)
        for place in draw.integers(0, len(raw), 3):
            raw[place] = draw.integers(256)
        file.write_bytes(raw)
        try:
            all_bytes(opened(tmp_path))
        except DataError:
            refused += 1
    assert refused > 20


def test_a_folder_of_an_unfinished_preparation_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, ["a"])
    (tmp_path / parquet.UNFINISHED).mkdir()
    with pytest.raises(DataError, match="a preparation is writing here, or one was killed"):
        opened(tmp_path)


def tokens_replaced(folder: Path, tokens: list[list[int] | None], kind: pa.DataType) -> None:
    """One file whose column of tokens holds these lists, as if they were prepared."""
    schema = pa.schema([("text", pa.string()), ("tokens", kind)], {TOKENIZER_KEY: str(made.of_bpe().digest)})
    pq.write_table(pa.table({"text": ["def"] * len(tokens), "tokens": pa.array(tokens, kind)}, schema), folder / "a.parquet")


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        ([[1, 2], [made.SIZE]], pa.list_(pa.uint16()), "a.parquet: row group 0: token 280 in column `tokens`, the tokenizer has 280"),
        ([[1, 2], [-1]], pa.list_(pa.int32()), "column `tokens` holds list<element: int32>; prepare the folder again"),
        (["ab", "c"], pa.string(), "column `tokens` holds string, no lists; prepare the folder again"),
        ([[1, None], [2]], pa.list_(pa.uint16()), "column `tokens` holds list<element: uint16>, some null"),
    ],
    ids=["out of range", "signed", "no lists", "null"],
)
def test_prepared_tokens_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path, tokens: Any, kind: pa.DataType, message: str) -> None:
    tokens_replaced(tmp_path, tokens, kind)
    text = made.opened(tmp_path, "tokens")
    with pytest.raises(DataError) as refused:
        text.training_tokens(text.row_groups[0])
    assert message in str(refused.value)


def test_empty_documents_have_no_tokens_and_no_separator(tmp_path: Path) -> None:
    tokens_replaced(tmp_path, [[5], None, [], [6, 7]], pa.list_(pa.uint16()))
    text = made.opened(tmp_path, "tokens")
    assert text.training_tokens(text.row_groups[0]).tolist() == [5, 0, 6, 7, 0]


def test_tokens_of_another_tokenizer_are_not_taken_and_a_line_says_so(tmp_path: Path) -> None:
    made.written(tmp_path / "text", "text", documents(20))
    (note,) = made.opened(tmp_path / "text", "text").notes()
    assert "2 of 2 files hold no tokens, so tokens are made of their text each time it is read" in note
    made.written(tmp_path / "tokens", "tokens", documents(20))
    assert list(made.opened(tmp_path / "tokens", "tokens").notes()) == []
    other = ParquetText(DatasetConfig(parquet_dir=str(tmp_path / "tokens")), tokenizer=of_content("huggingface", made.bpe(270), None, "x"))
    assert "2 of 2 files hold tokens of another tokenizer" in next(other.notes())
    group = other.row_groups[0]
    assert other.training_tokens(group).max() < 270


def test_documents_that_are_not_text_or_not_given_back_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff"])}), tmp_path / "a.parquet")
    text = made.opened(tmp_path, "text")
    with pytest.raises(DataError, match=r"a.parquet: row group 0: a document that is not UTF-8; .* tokenizer.type: byte"):
        text.training_tokens(text.row_groups[0])
    pq.write_table(pa.table({"text": ["two  spaces"]}), tmp_path / "a.parquet")
    own = of_content("sentencepiece", made.sentencepiece_model(remove_extra_whitespaces=True), None, "x")
    folder = DatasetConfig(parquet_dir=str(tmp_path), val_fraction=0)
    strict, lossy = (ParquetText(folder, tokenizer=own, lossy=lossy) for lossy in (False, True))
    with pytest.raises(DataError, match=r"does not give back: for 'two  spaces' it gives ' two spaces' back\. .* tokenizer.lossy: true"):
        strict.training_tokens(strict.row_groups[0])
    assert own.decode(lossy.training_tokens(lossy.row_groups[0]).tolist()) == " two spaces\u2400"


@pytest.mark.parametrize(
    ("kind", "content", "separator"),
    [
        ("huggingface", made.bpe(), None),
        ("huggingface", made.bpe(), "def"),
        ("huggingface", made.spaces_first(), None),
        ("sentencepiece", made.sentencepiece_model(), None),
        ("tiktoken", made.tiktoken_file(), None),
    ],
    ids=["bpe", "separated by a word", "llama", "sentencepiece", "tiktoken"],
)
def test_bytes_of_validation_tokens_are_those_of_their_text(tmp_path: Path, kind: str, content: bytes, separator: str | None) -> None:
    """With windows of one token every token of the validation text is predicted once; a space that encoding puts first is no text."""
    write_shards(tmp_path, [text.replace("def", "for") for text in documents(60)])
    counted = []
    for own in (BYTES, of_content(kind, content, separator, "x")):
        text = ParquetText(DatasetConfig(parquet_dir=str(tmp_path), val_fraction=0.2), tokenizer=own)
        batches = validation.drawn(text, 10**6, 1, 1)
        counted.append(text.bytes_per_token(batches) * len(batches))
    assert counted[1] == pytest.approx(counted[0], rel=1e-12)


def test_documents_without_tokens_leave_nothing_prepared_or_not(tmp_path: Path) -> None:
    stripped = json.loads(made.bpe())
    stripped["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    own = of_content("huggingface", json.dumps(stripped).encode(), None, "x")
    write_shards(tmp_path, ["def", "   ", "x", " \n"], shards=1)
    read = []
    for _ in range(2):
        text = ParquetText(DatasetConfig(parquet_dir=str(tmp_path), val_fraction=0), tokenizer=own, lossy=True)
        read.append(text.training_tokens(text.row_groups[0]).tolist())
        made.add_tokens(tmp_path, own)
    assert read[0] == read[1]
    assert own.decode(read[0]) == "def\u2400x\u2400"


def test_a_folder_prepared_with_losses_is_taken_by_who_accepts_them(tmp_path: Path) -> None:
    own = of_content("sentencepiece", made.sentencepiece_model(remove_extra_whitespaces=True), None, "x")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "two  spaces"}) + "\n" + json.dumps({"text": "x"}))
    prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text", tokenizing=Tokenizing(own, lossy=True))
    folder = DatasetConfig(parquet_dir=str(tmp_path / "out"), val_fraction=0)
    assert ParquetText(folder, tokenizer=own, lossy=True).rows == ParquetText(folder).rows == 2
    with pytest.raises(DataError, match=r"part-00000.parquet: prepared with --lossy, .* set tokenizer.lossy: true"):
        ParquetText(folder, tokenizer=own)
