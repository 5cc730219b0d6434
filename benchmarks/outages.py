"""A run killed at random moments, its server down half of the time: `python benchmarks/outages.py [--kills 20] [--seed 0]`.

Every other pair of kills ends the sender as well as the training. After the last one the server is started again and `bdh-mlflow sync`
runs: every point in the journal must be on the server exactly once, and so must the run and the model of each checkpoint. A second `sync`
must deliver nothing. Exit code 1 if not.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.tracking.journal import JournalReader
from bdh_mlflow.tracking.records import Points
from scripts.servers import Server

TINY = {
    "model": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4, "dropout": 0.1},
    "training": {"block_size": 8, "batch_size": 2},
    "dataset": {"val_fraction": 0.3},
    "low_precision": {"compute_dtype": "float32", "use_4bit": False},
    "tracking": {"log_system_metrics": False},
}
OWN_COUNT = ("by_tokens/", "system/", "tracker/")  # metrics with steps of their own: several points may share one


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "empty.db"
        MlflowClient(f"sqlite:///{store}").search_experiments()
        server = Server(store, folder / "server")
        up = True
        for number in range(given.kills):
            down = number % 2 == 1
            if down == up:
                server.signal(signal.SIGKILL) if down else server.start()
                up = not down
            process = start(folder, server.uri)
            time.sleep(draw.uniform(4, 18))  # it takes some seconds to start: some kills hit that
            with_sender = number % 4 >= 2
            kill(process, with_sender)
            print(
                f"kill {number + 1}: server {'down' if down else 'up'}, sender {'killed' if with_sender else 'left'}, {progress(folder)}",
                flush=True,
            )
        if not up:
            server.start()
        try:
            return report(folder, server)
        finally:
            server.signal(signal.SIGKILL)


def start(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    settings = {
        "training.max_iters": 10**7,
        "training.checkpoint_freq": 50,
        "training.test_freq": 200,
        "training.checkpoint_dir": folder / "checkpoints",
        "training.keep_checkpoints": 3,
        "dataset.parquet_dir": folder / "text",
        "dataset.source": Path(__file__).parent.parent / "README.md",
    }
    tiny = folder / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(tiny)]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if checkpoint.list_all(folder / "checkpoints"):
        command += ["--resume", "latest"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def kill(process: subprocess.Popen[bytes], with_sender: bool) -> None:
    children = [pid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    for pid in children if with_sender else ():
        os.kill(int(pid), signal.SIGKILL)
    process.wait()


def progress(folder: Path) -> str:
    directories = checkpoint.list_all(folder / "checkpoints")
    steps = [c.manifest.step for d in directories for c in checkpoint.list_run(d).checkpoints]
    return f"{len(directories)} run directories, newest checkpoint {max(steps, default=0)}"


def report(folder: Path, server: Server) -> int:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    config = folder / "any.yaml"
    config.write_text(f"training: {{checkpoint_dir: {folder / 'checkpoints'}}}\n")
    command = [sys.executable, "-m", "bdh_mlflow", "sync", "--config", str(config)]
    wrong, journalled = 0, 0
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        print(f"{done.stdout}{done.stderr}".strip())
        wrong += done.returncode
    wrong += any(": 0 records" not in line for line in done.stdout.splitlines()[:-1])
    for place in checkpoint.list_all(folder / "checkpoints"):  # a folder without a checkpoint is removed when everything in it is delivered
        logged: Counter[tuple[str, int]] = Counter()
        with contextlib.closing(JournalReader(place)) as reader:
            state, segments = reader.delivered(), len(reader.index.segments)
            for entry in reader.read(0, reader.index.update()):
                if isinstance(entry.record, Points):
                    logged.update((key, entry.record.step) for key in entry.record.values if not key.startswith(OWN_COUNT))
        assert state.run_id is not None
        journalled += len(logged)
        run = server.client.get_run(state.run_id)
        keys = [key for key in run.data.metrics if not key.startswith(OWN_COUNT)]
        there = Counter((key, m.step) for key in keys for m in server.client.get_metric_history(state.run_id, key))
        missing, twice = set(logged) - set(there), [point for point, times in there.items() if times > 1]
        audit = [m.value for m in server.client.get_metric_history(state.run_id, "resume/replay_max_abs_diff")]
        print(
            f"{place.name}: {segments} segments, {len(logged)} points, {sum(logged.values()) - len(logged)} again after a kill; "
            f"{len(missing)} missing, {len(twice)} twice, replay difference {max(audit, default=0.0)}, status {run.info.status}"
        )
        experiment = [run.info.experiment_id]
        models = Counter(m.name for m in server.client.search_logged_models(experiment, f"source_run_id = '{state.run_id}'"))
        runs = server.client.search_runs(experiment, f"tags.`bdh.training` = '{run.data.tags['bdh.training']}'")
        if len(runs) > 1 or any(times > 1 for times in models.values()):
            print(f"  {len(runs)} runs of one training run, models {models}")
            wrong += 1
        for name, points in (("missing", missing), ("twice", twice)):
            for key, step in sorted(points)[:10]:
                print(f"  {name}: {key} at step {step}")
        wrong += len(missing) + len(twice) + any(audit)
    if not journalled:
        print(f"nothing was trained: {(folder / 'log').read_text()[-2000:]}")
    return 1 if wrong or not journalled else 0


if __name__ == "__main__":
    sys.exit(main())
