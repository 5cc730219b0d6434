"""Files of any kind to documents: all their text, or which one is left out and why; never the bytes or markup of a format."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh_mlflow.data import sources
from bdh_mlflow.errors import DataError

TEXTS = ["alpha é\n" * 20, "beta\u2028\x85\x0c|\n" * 20, "gamma"]
LINES = "".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
ARRAY = json.dumps([{"text": t} for t in TEXTS], indent=2).encode()
PLAIN = "".join(TEXTS).encode()
PNG = b"\x89PNG\0\0"


def zstd(raw: bytes) -> bytes:
    packed: bytes = pa.compress(raw, "zstd", asbytes=True)
    return packed


def read(source: Path | str, column: str = "text") -> tuple[list[str], dict[str, str]]:
    skipped: list[tuple[str, str]] = []
    return list(sources.documents(str(source), column, skipped)), {Path(name).name: reason for name, reason in skipped}


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "bom"])
@pytest.mark.parametrize(
    ("pack", "ending"),
    [(bytes, ""), (gzip.compress, ".gz"), (gzip.compress, ""), (bz2.compress, ".BZ2"), (lzma.compress, ".xz"), (zstd, ".zst")],
)
def test_records_are_read_however_they_are_packed(
    tmp_path: Path, name: str, mark: bytes, pack: Callable[[bytes], bytes], ending: str
) -> None:
    (tmp_path / (name + ending)).write_bytes(pack(mark + LINES))
    assert read(tmp_path / (name + ending)) == (TEXTS, {})
    assert read(tmp_path) == (TEXTS, {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_encodings_are_told_by_the_byte_order_mark(tmp_path: Path, name: str, encoding: str) -> None:
    content = {"a.jsonl": LINES, "a.txt": PLAIN, "a.json": ARRAY}[name]
    (tmp_path / name).write_bytes(content.decode().encode(encoding))
    assert "".join(read(tmp_path / name)[0]) == "".join(TEXTS)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_packed_plain_text_is_read_under_any_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "book").write_bytes(pack(PLAIN))
    assert "".join(read(tmp_path / "book")[0]).encode() == PLAIN


@pytest.mark.parametrize("content", [ARRAY, json.dumps({"text": TEXTS[0]}, indent=1).encode()], ids=["array", "one"])
def test_json_of_records_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json")[0] == (TEXTS if content is ARRAY else TEXTS[:1])


FORMATS = {
    "a.csv": (b"id,text\n1,x\n", "a table"),
    "a.TSV.gz": (gzip.compress(b"id\ttext\n"), "a table"),
    "a.html": (b"<p>x</p>", "markup"),
    "a.xml": (b"<x/>", "markup"),
    "a.json": (b'{"name": 1}', "JSON that does not hold records with text under `text`"),
    "b.json": (b'["x"]', "JSON that does not hold records"),
    "c.json": (b"[" * 100_000, "nested too deeply"),
    "d.json": (ARRAY[:-9], "not JSON"),
    "a.pdf": (b"%PDF-1.7 x", "a document with layout"),
    "a.png": (PNG, "binary"),
    "noise": (bytes(range(1, 256)), "binary"),
    "a.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "a.parquet.gz": (gzip.compress(b"PAR1xxPAR1"), "compressed parquet"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_refused_alone_and_named_in_a_folder(tmp_path: Path, name: str) -> None:
    content, reason = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.py").write_text("x = 1\n")
    texts, skipped = read(tmp_path)
    assert texts == ["x = 1\n"]
    assert list(skipped) == [name]
    assert reason in skipped[name]
    with pytest.raises(DataError, match=f"{name}: no text found: .*; accepted: python-stdlib, a txt, jsonl"):
        read(tmp_path / name)


def test_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", PLAIN)
    with pytest.raises(DataError, match=r"a\.zip: no text found: an archive .*; unpack it"):
        read(tmp_path / "a.zip")


def test_folders_behind_links_are_read_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    for folder in ("in", "disk"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    for name, target in {"more": "../disk", "loop": ".", "gone.txt": "nowhere"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe")
    texts, skipped = read(tmp_path / "in")
    assert texts == ["in", "disk"]
    assert skipped == {"gone.txt": "a link to nowhere, which does not exist or leads back to itself", "pipe": "a named pipe"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ' + b"[" * 100_000, "line 2: not JSON that can be read: nested too deeply"),
        (b'{"text": "a", "text": "b"}', "line 2: an object with several fields `text`"),
        (b'{"\\ud800": 1}', r"line 2: no field `text`; it has \\ud800"),
        (b"null", "line 2: expected an object"),
        (b'{"text": "\xff"}', "cannot be read: .*utf-8"),
    ],
    ids=["deep", "twice", "surrogate", "null", "latin"],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        read(tmp_path / "a.jsonl")


def test_numbers_of_any_length_beside_the_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + ', "s": NaN}\n')
    assert read(tmp_path / "a.jsonl")[0] == ["a"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_cut_files_are_an_error_in_a_folder_too(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack(LINES * 99)[:-9])
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read"):
            read(source)


def test_a_name_that_promises_compression_is_held_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read: not compressed, although its name says so"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["a.parquet", "_a.parquet", ".a.parquet", "A.PARQUET", "blob"])
def test_a_parquet_file_is_read_whatever_lies_beside_it(tmp_path: Path, name: str) -> None:
    """Its whole folder was indexed, so that a neighbour could be the reason of a refusal."""
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"no")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "z.parquet")
    assert read(tmp_path / name)[0] == TEXTS


def test_a_folder_of_parquet_files_opens_each_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time grew with the square of the number of files: 20 s for 400."""
    for number in range(20):
        pq.write_table(pa.table({"text": [f"{number:02}"]}), tmp_path / f"{number:02}.parquet")
    opened: list[object] = []
    real = pq.ParquetFile

    def counted(file: object) -> pq.ParquetFile:
        opened.append(file)
        return real(file)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    assert read(tmp_path)[0] == [f"{number:02}" for number in range(20)]
    assert len(opened) == 40  # the footer and the only row group


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\0b", "NUL byte"),
        ("", "without a name"),
        ("n" * 300, "too long"),
        ("/dev/zero", "a device; accepted"),
        ("pipe", "a named pipe; accepted"),
    ],
    ids=["nul", "empty", "long", "device", "pipe"],
)
def test_sources_that_cannot_be_read_are_refused_at_once(tmp_path: Path, source: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=message):
        sources.documents(source, "text", [])
