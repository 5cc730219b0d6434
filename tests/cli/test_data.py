"""`data prepare` and `data inspect`."""

import re
from pathlib import Path

import pytest

from tests.conftest import documents, run_cli, write_shards


def test_data_is_prepared_and_inspected(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = run_cli("data", "prepare", "book.txt", "out")
    assert result.exit_code == 0
    assert "out: 64 documents, 0.1 MB of text in 1 files" in result.output
    output = run_cli("data", "inspect", "out").output
    assert re.search(r"documents\s+│ 64 ", output)
    assert "a line of text" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("book.txt", "out", "--column", ""), "Error: column '': not a name for a column"),
        (("book.txt", ""), "Error: FOLDER is empty text"),
        (("", "out"), "Error: empty text names no file or folder"),
        (("book.txt", "a\0b"), "the character NUL has no place in a path"),
        (("a\0b", "out"), "the character NUL has no place in a path"),
        (("book.txt", "book.txt"), "Error: book.txt: a file, not a folder"),
    ],
    ids=["column", "folder", "source", "nul in folder", "nul in source", "file"],
)
def test_bad_words_are_one_clear_error(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = run_cli("data", "prepare", *words)
    assert result.exit_code == 2
    assert message in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]


def test_inspect_names_the_files_that_training_does_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "text", documents(80))
    (tmp_path / "text" / "more.jsonl").touch()
    assert "text: not read, as only .parquet files are: more.jsonl" in run_cli("data", "inspect", "text").output
    assert run_cli("data", "inspect", "a\0b").exit_code == 2
