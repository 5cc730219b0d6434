"""The examples of docs/track.md run as they are, each as a program of its own, in their order and in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.test_structure import PROJECT
from tests.track.runs import points
from tests.track.test_loops import STACKS, skip_without

pytestmark = pytest.mark.slow  # five programs that import torch, one of them transformers and one lightning

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (PROJECT / "docs" / "track.md").read_text(), re.M | re.S)


def test_the_examples_run_as_they_are(store: MlflowClient, tmp_path: Path) -> None:
    for stack in STACKS:
        skip_without(stack)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    for number, code in enumerate(EXAMPLES):
        script = tmp_path / f"example_{number}.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stderr.splitlines()[-1].startswith("track: run "), done.stderr
        assert ": FINISHED after step " in done.stderr, done.stderr
    experiment = store.get_experiment_by_name("my experiment").experiment_id
    signals, lightning, huggingface, plain = store.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert {run.info.status for run in (signals, lightning, huggingface, plain)} == {"FINISHED"}
    assert [step for step, _ in points(store, plain.info.run_id, "train/loss")] == list(range(1, 121)), "once each, over two programs"
    assert [step for step, _ in points(store, huggingface.info.run_id, "loss")] == [5, 10, 15, 20]
    assert huggingface.data.params["n_embd"] == "16"
    assert [step for step, _ in points(store, lightning.info.run_id, "train/loss")] == list(range(16))
    assert lightning.data.params == {"width": "8"}
    for run, steps in ((plain, (50, 100)), (huggingface, (10, 20)), (lightning, (8, 16)), (signals, (100,))):
        folder = Path(run.info.artifact_uri) / "checkpoints" / run.data.tags["bdh.run_dir"]
        assert {p.name for p in folder.glob("checkpoint_*.json")} == {f"checkpoint_{step}.json" for step in steps}, run.info.run_name
