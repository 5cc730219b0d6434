"""Sources to parquet shards: nothing is lost, and a source that cannot be read leaves nothing behind."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bdh_mlflow.data import columns, parquet, prepare, shards, sources
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
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
    assert done.written.documents == len(texts) > 2
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
    assert done.skipped == ((shown(tree / "pic.png"), "binary"),)


def test_parquet_source_keeps_its_text_column_only(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", documents(30), shards=2)
    prepare.prepare(str(tmp_path / "in"), tmp_path / "out", "text")
    assert Counter(prepared_texts(tmp_path / "out")) == Counter(documents(30))


def test_large_sources_become_several_row_groups_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(50)))
    done = prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text")
    assert done.written.files == len(parquet.parquet_files(tmp_path / "out")) == 4
    assert len(opened(tmp_path / "out").row_groups) == 17
    assert done.written.bytes == 2000


def test_standard_library_is_real_python_text(tmp_path: Path) -> None:
    done = prepare.prepare(sources.PYTHON_STDLIB, tmp_path / "out", "text")
    assert done.written.bytes > 5_000_000
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
        prepare.prepare(sources.PYTHON_STDLIB, tmp_path / "out", "text")
    assert prepared_texts(tmp_path / "out") == ["old"]


def test_plain_text_is_cut_at_line_ends_only(tmp_path: Path) -> None:
    content = "a\u2028b\x0cc\x85d\x1ce\n" * 2000
    (tmp_path / "book.txt").write_text(content, encoding="utf-8")
    prepare.prepare(str(tmp_path / "book.txt"), tmp_path / "out", "text")
    texts = prepared_texts(tmp_path / "out")
    assert "".join(texts) == content
    assert all(t.endswith("\n") for t in texts)


def never_read(source: str, column: str, skipped: object, meter: object) -> Iterator[str]:
    raise AssertionError("the target is checked before the source is read")


def into_a_link(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    return tmp_path / "out"


def into_an_empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def into_the_current_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    os.chdir(tmp_path / "out")
    return Path()


def into_a_name_of_254_bytes(tmp_path: Path) -> Path:
    return tmp_path / ("é" * 127)


def into_new_folders(tmp_path: Path) -> Path:
    return tmp_path / "x" / "y" / "z"


def into_a_name_that_is_not_utf8(tmp_path: Path) -> Path:
    return tmp_path / "caf\udce9"


TARGETS = [
    into_a_link,
    into_an_empty_folder,
    into_the_current_folder,
    into_a_name_of_254_bytes,
    into_new_folders,
    into_a_name_that_is_not_utf8,
]


def everything(folder: Path) -> list[str]:
    return sorted(ascii(str(p.relative_to(folder))) for p in folder.rglob("*"))


@pytest.mark.parametrize("target", TARGETS)
def test_any_new_or_empty_folder_takes_the_result_or_keeps_nothing(tmp_path: Path, target: Callable[[Path], Path]) -> None:
    lines = "".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(50))
    (tmp_path / "good.jsonl").write_text(lines)
    (tmp_path / "bad.jsonl").write_text(lines + "no\n")
    folder = target(tmp_path)
    before, inode = everything(tmp_path), folder.stat().st_ino if folder.exists() else None
    with pytest.raises(DataError, match="line 51: not JSON"):
        prepare.prepare(str(tmp_path / "bad.jsonl"), folder, "text")
    assert everything(tmp_path) == before
    done = prepare.prepare(str(tmp_path / "good.jsonl"), folder, "text")
    assert [p.name for p in folder.iterdir()] == ["part-00000.parquet"]
    (file,) = parquet.parquet_files(folder)
    assert done.written.documents == sum(rows for rows, _ in columns.footer(file, "text").groups) == 50
    assert inode in (None, folder.stat().st_ino), "an existing folder stays the one it was"


def test_moving_into_an_existing_folder_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(50)))
    (tmp_path / "out").mkdir()
    real, moved = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 3:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DataError, match="out: cannot be written: No space left on device"):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", "text")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.touch(), "out: a file, not a folder"),
        (lambda out: out.symlink_to("later"), "out: a link to later, which does not exist"),
        (lambda out: out.symlink_to("out"), "out: a link to out, which does not exist or leads back"),
        (lambda out: os.mkfifo(out), "out: a named pipe, not a folder"),
        (lambda out: write_shards(out, ["old"]), r"out: not empty \(it holds part-0"),
        (lambda out: (out / parquet.UNFINISHED).mkdir(parents=True), "another preparation is writing here"),
    ],
    ids=["file", "dangling", "loop", "pipe", "full", "unfinished"],
)
def test_targets_that_cannot_become_the_result_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(sources, "documents", never_read)
    make(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare.prepare("book.txt", tmp_path / "out", "text")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("n" * 256, "too long"),
        ("new/er/" + "n" * 256, "too long"),
        ("a\0b", "NUL byte"),
        ("book.txt/x", "cannot be"),
    ],
    ids=["long", "long in new folders", "nul", "below a file"],
)
def test_impossible_names_are_refused_and_leave_nothing(tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "book.txt").write_text("text\n" * 99)
    with pytest.raises(DataError, match=message):
        prepare.prepare("book.txt", Path(folder), "text")
    assert everything(tmp_path) == ["'book.txt'"]


@pytest.mark.parametrize("column", ["", "a\0", "caf\udce9"], ids=ascii)
def test_impossible_columns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    monkeypatch.setattr(sources, "documents", never_read)
    with pytest.raises(DataError, match="not a name for a column"):
        prepare.prepare("book.txt", tmp_path / "out", column)


def test_no_text_names_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abcd":
        (tmp_path / "in" / f"{name}.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no text found; skipped .*a\.bin: binary; .*b\.bin: binary; .*c\.bin: binary; and 1 more"):
        prepare.prepare(str(tmp_path / "in"), tmp_path / "out", "text")
