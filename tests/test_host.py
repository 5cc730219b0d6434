"""The machine and the checkout."""

import subprocess
import time
from pathlib import Path

import pytest

from bdh_mlflow import host
from bdh_mlflow.tracking import system_metrics


class Broken:
    def collect_metrics(self) -> None:
        raise RuntimeError("the driver is gone")


def test_samples_go_on_when_one_monitor_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = system_metrics._monitors()
    monkeypatch.setattr(system_metrics, "_monitors", lambda: [Broken(), *real])
    told: list[tuple[dict[str, float], int]] = []
    samples = system_metrics.SystemMetrics(lambda values, step: told.append((values, step)), time.time() - 1.0, interval_s=0.05)
    while len(told) < 2:
        time.sleep(0.01)
    samples.close()
    assert all("system/cpu_utilization_percentage" in values and "system/disk_usage_percentage" in values for values, _ in told)
    steps = [step for _, step in told]
    assert steps == sorted(steps)
    assert steps[0] >= 20  # counted from the beginning of the run, a second ago


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
