"""`data prepare` and `data inspect`."""

import re
from pathlib import Path

from tests.conftest import run_cli


def test_data_is_prepared_and_inspected(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a line of text\n" * 5000)
    result = run_cli("data", "prepare", "book.txt", "out")
    assert result.exit_code == 0
    assert "out: 64 documents, 0.1 MB of text in 1 files" in result.output
    output = run_cli("data", "inspect", "out").output
    assert re.search(r"documents\s+│ 64 ", output)
    assert "a line of text" in output
