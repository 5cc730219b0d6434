"""How long a comparison takes: `python benchmarks/compare.py [--runs 100] [--points 10000]`.

Makes runs with so many points of train/loss and a tenth of that of val/loss in a SQLite store, then times the whole command in a process
of its own: reading all points, the page and its pictures.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

BATCH = 1000  # points per request; MLflow takes no more


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=100)
    options.add_argument("--points", type=int, default=10_000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        fill(MlflowClient(uri), Path(folder), given.runs, given.points)
        config = Path(folder) / "config.yaml"
        config.write_text(f"tracking: {{tracking_uri: '{uri}'}}\n")
        command = [sys.executable, "-m", "bdh_mlflow", "compare", "bdh", "--no-log"]
        command += ["--config", str(config), "--out", f"{folder}/compare.html"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
        took = time.perf_counter() - started
        size = (Path(folder) / "compare.html").stat().st_size
        print(f"{given.runs} runs of {given.points:,} points: {took:.1f} s, page of {size / 1e6:.1f} MB")


def fill(client: MlflowClient, folder: Path, runs: int, points: int) -> None:
    experiment = client.create_experiment("bdh", artifact_location=f"file://{folder}/artifacts")
    for number in range(runs):
        run_id = client.create_run(experiment, run_name=f"run {number}").info.run_id
        settings = {"batch_size": 8, "block_size": 64, "gradient_accumulation_steps": 1, "seed": number % 4, "learning_rate": number // 4}
        client.log_batch(run_id, params=[Param(f"training.{key}", str(value)) for key, value in settings.items()])
        points_of_run = [Metric("train/loss", 2 + math.exp(-i / points) + number / 100, i, i) for i in range(1, points + 1)]
        points_of_run += [Metric("val/loss", 2 + math.exp(-i / points), i, i) for i in range(10, points + 1, 10)]
        for first in range(0, len(points_of_run), BATCH):
            client.log_batch(run_id, points_of_run[first : first + BATCH])


if __name__ == "__main__":
    main()
