"""Steps of the gate between two real `mlflow run`s: check what the first left, write down what to resume, check what the second left."""

import shutil
import sys
from pathlib import Path

from mlflow import MlflowClient

from bdh_mlflow import checkpoint

client = MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
experiment = client.get_experiment_by_name("bdh")
assert experiment is not None
runs = client.search_runs([experiment.experiment_id])
top = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
assert len(top) == 1, f"{len(top)} top-level runs"
(run,) = top
(directory,) = checkpoint.list_all(Path("checkpoints"))
steps = sorted(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))
last = {"first": 4, "resumed": 8}[sys.argv[1]]
assert run.info.status == "FINISHED", run.info.status
assert steps == list(range(1, last + 1)), steps
assert run.data.tags["bdh.latest_checkpoint"] == f"checkpoints/{directory.name}/checkpoint_{last}.pt"
if sys.argv[1] == "first":
    Path("target").write_text(f"runs:/{run.info.run_id}/{run.data.tags['bdh.latest_checkpoint']}")
    shutil.rmtree("checkpoints")
print(f"{sys.argv[1]}: one run {run.info.status}, steps {steps[0]} to {steps[-1]}, {directory.name}")
