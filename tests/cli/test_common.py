"""What commands share."""

import shlex

from bdh_mlflow.cli.common import mlflow_run


def test_mlflow_run_line_is_read_back_by_a_shell() -> None:
    values = {"resume": "latest", "training.compile": True, "scheduler.decay_steps": None, "training.learning_rate": 1e-5}
    line = mlflow_run("my configs/a.yaml", values, "two words")
    start = ["mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "two words"]
    assert shlex.split(line) == [
        *start, "-P", "config=my configs/a.yaml", "-P", "resume=latest", "-P", "training.compile=true", "-P", "scheduler.decay_steps=null",
        "-P", "training.learning_rate=1e-05",
    ]  # fmt: skip
