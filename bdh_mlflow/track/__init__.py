"""Tracking for any training loop: what `bdh-mlflow train` does with MLflow, for programs that train something else with something else.

    from bdh_mlflow import track

    with track.run("my experiment", params={"lr": 3e-4}) as run:
        for step in range(1, 1001):
            loss = train_one_step()
            run.metrics({"train/loss": loss}, step)
            if step % 100 == 0:
                torch.save(model.state_dict(), "model.pt")
                run.checkpoint("model.pt", step)

Every call is one line in a journal on disk and returns; a process beside the loop sends it to MLflow, in order and exactly once, whenever
the server answers. The names here are stable, and so are the modules `huggingface` and `lightning` for those trainers. Imports neither
torch nor MLflow; a run that samples the machine loads the latter before it begins.
"""

from bdh_mlflow.errors import BdhError, CheckpointError, InputError, ResumeError, SaveError, TrackingError
from bdh_mlflow.text import Sample
from bdh_mlflow.track.begin import run
from bdh_mlflow.track.later import find, sync
from bdh_mlflow.track.settings import Settings
from bdh_mlflow.track.tracked import NullRun, Run

__all__ = [
    "BdhError",
    "CheckpointError",
    "InputError",
    "NullRun",
    "ResumeError",
    "Run",
    "Sample",
    "SaveError",
    "Settings",
    "TrackingError",
    "find",
    "run",
    "sync",
]
