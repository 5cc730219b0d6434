"""The checkout that a run comes from, as a commit and a patch."""

import subprocess
from pathlib import Path

from bdh_mlflow import host


def test_uncommitted_changes_are_a_patch(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert host.source_state(tmp_path) == (None, False, "")
    git("init", "-q")
    (tmp_path / "a").write_text("one\n")
    git("add", "a")
    git("commit", "-qm", "a")
    assert host.source_state(tmp_path) == (git("rev-parse", "HEAD").strip(), False, "")
    (tmp_path / "a").write_text("two\n")
    (tmp_path / "new.py").write_text("x = 1\n")
    (tmp_path / "data.bin").write_bytes(bytes(100))
    (tmp_path / "sub").mkdir()
    _, dirty, patch = host.source_state(tmp_path / "sub")
    assert dirty
    assert "-one\n+two" in patch
    assert "+++ b/new.py\n@@ -0,0 +1 @@\n+x = 1" in patch
    assert "# not in the repository, not shown: data.bin" in patch
