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


def test_a_vocabulary_is_trained_looked_at_and_used(tmp_path: Path) -> None:
    write_shards(tmp_path / "texts", documents(80))
    made_by = run_cli("data", "vocabulary", "texts", "--size", "270", "--out", "own.json", "--val-fraction", "0.2")
    assert made_by.exit_code == 0, made_by.output
    for part in (
        "bytes per token, training text",
        "bytes per token, validation text",
        "% of the tokens occur",
        "most frequent",
        "own.json: digest ",
    ):
        assert part in made_by.output
    assert "--set tokenizer.path=own.json --set model.vocab_size=null" in made_by.output.splitlines()[-1]
    again = run_cli("data", "vocabulary", "texts", "--tokenizer", "own.json", "--val-fraction", "0.2")
    assert again.output.splitlines()[:10] == made_by.output.splitlines()[:10]
    parquet = (tmp_path / "texts" / "part-0.parquet").read_bytes()
    taken = run_cli("data", "vocabulary", "texts", "--size", "270", "--out", "texts/part-0.parquet")
    assert (taken.exit_code, "there already; give another name" in taken.output) == (2, True)
    assert (tmp_path / "texts" / "part-0.parquet").read_bytes() == parquet
    words = ("--tokenizer", "own.json", "--separator", "return", "--lossy", "--processes", "1")
    prepared = run_cli("data", "prepare", "texts", "out", *words)
    assert prepared.exit_code == 0, prepared.output
    assert "bytes each; every document is given back exactly" in prepared.output
    assert "--set tokenizer.separator=return --set tokenizer.lossy=true" in prepared.output.splitlines()[-1]
    assert "tokens of" in run_cli("data", "inspect", "out", "--tokenizer", "own.json").output
    with_separator = run_cli("data", "inspect", "texts", "--tokenizer", "own.json", "--separator", "return")
    assert (with_separator.exit_code, "digest" in with_separator.output) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vocabulary", "texts"), "give --size and --out to train one, or --tokenizer to look at one"),
        (("vocabulary", "texts", "--size", "256", "--out", "x.json"), "--size 256: at least 258"),
        (("vocabulary", "texts", "--size", "300", "--out", "no/x.json"), "--out no/x.json: there is no folder no"),
        (("prepare", "texts", "out", "--lossy"), "--lossy, --separator and --processes are of --tokenizer"),
        (("prepare", "texts", "out", "--tokenizer", "none.json"), "none.json: no such file"),
        (("prepare", "texts", "out", "--tokenizer", "tiktoken:gpt3"), "gpt3: no encoding of tiktoken; did you mean `gpt2`?"),
    ],
)
def test_words_about_vocabularies_that_make_no_sense_are_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    write_shards(tmp_path / "texts", documents(20))
    result = run_cli("data", *words)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
