"""Sources to parquet shards: nothing is lost, and a source that cannot be read leaves nothing behind."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bdh_mlflow.data import parquet, prepare
from bdh_mlflow.errors import DataError
from tests.conftest import documents, write_shards
from tests.data.test_parquet import opened


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


def test_source_tree_gives_a_document_a_file_and_names_what_it_skips(tmp_path: Path) -> None:
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
