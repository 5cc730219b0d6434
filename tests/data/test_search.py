"""Search in parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdh_mlflow.data.search import Found, Hit, Pattern, search
from bdh_mlflow.errors import DataError
from tests.conftest import run_cli, write_shards
from tests.data.test_parquet import opened

TEXTS = ["one cat, two Cats", "no such animal", "a cat\u00e9gorie", None, "", "CAT"]


def found(folder: Path, pattern: str, *, ignore_case: bool = False, context: int = 4, most: int = 10) -> list[Found]:
    return list(search(opened(folder), Pattern(pattern, ignore_case, context), most))


def test_matches_are_counted_and_the_first_is_shown_with_what_stands_around_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=4)
    first, second = found(tmp_path, r"c(a)t\w*")
    name = "a.parquet"
    assert first == Found(name, 4, 2, 2, [Hit(name, 0, "one ", "cat", ", tw", 1), Hit(name, 2, "a ", "cat", "\u00e9go", 1)])
    assert second == Found(name, 2, 0, 0, [])
    assert sum(part.times for part in found(tmp_path, "cat", ignore_case=True)) == 4
    shown = [hit for part in found(tmp_path, "CAT", ignore_case=True, most=2) for hit in part.hits]
    assert [(hit.row, hit.match, hit.times) for hit in shown] == [(0, "cat", 2), (2, "cat", 1)]


def test_what_is_no_pattern_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, ["x"])
    with pytest.raises(DataError, match=r"x\(: not a regular expression that RE2 takes: Invalid regular expression: missing \)"):
        found(tmp_path, "x(")


def test_the_command_prints_places_and_counts(tmp_path: Path) -> None:
    write_shards(tmp_path / "text", ["def a():\n\tpass", "x", "def b(): def c()"], shards=2)
    output = run_cli("data", "search", r"def \w", "text", "--context", "8").output
    assert "text/part-0.parquet:0: def a():\u2424 pa" in output
    assert "text/part-0.parquet:1 (2 times): def b(): def \n" in output
    assert "3 matches in 2 of 3 documents" in output
    assert run_cli("data", "search", "zebra", "text", "--limit", "0").output.endswith("0 matches in 0 of 3 documents\n")
    assert run_cli("data", "search", "[", "text").exit_code == 2
